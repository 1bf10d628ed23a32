"""Conversations from .jsonl files: which files hold them, and a check of every line."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bdh.data import builtin
from bdh.data.config import DataConfig, mix_sources
from bdh.data.files import file_type, find_files, item_names
from bdh.data.jsonl import parse_line, text_lines
from bdh.data.parts import OTHER_TYPES, Skipped, to_utf8
from bdh.data.source import Source, training_source, validation_source
from bdh.data.split import num_kept

CHAT_TYPE = ".jsonl"
DEFAULT_COLUMN = "messages"
# Those of bdh.tokenizer.chat, which is not imported for settings and detection alone.
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """One line of a file."""

    messages: list[dict[str, str]]
    """Each with a role and a content."""
    where: str
    """File and line, for errors."""


def holds_chat(config: DataConfig) -> bool:
    """Whether the section, or a source of its mix, gives conversations: as set, or as the first line of the files tells.

    With ``data.format`` "auto" they are conversations where every file is a .jsonl and the first line of the first one
    has a list of messages; a ``data.text_column`` says that they are text.
    """
    if config.mix is not None:
        return any(holds_chat(source.config) for source in mix_sources(config))
    if config.format != "auto":
        return config.format == "chat"
    if config.text_column is not None:
        return False
    try:
        found = [[] if item in builtin.BUILTIN else find_files(item, Skipped()) for item in item_names(config.source)]
    except (FileNotFoundError, ValueError):
        return False  # whoever reads the source says what is wrong with it
    files = [file for files in found for file in files or []]
    if not all(found) or any(file_type(file) != CHAT_TYPE for file in files):
        return False
    return bool(files) and _begins_with_messages(files[0])


def training_conversations(config: DataConfig) -> Source:
    """The files to train on. Raises as :func:`bdh.data.source.training_source`, and where they are no .jsonl files."""
    return _chat_files(training_source(config), config)


def validation_conversations(config: DataConfig) -> Source | None:
    """The files to validate on; None where they are a share of the others."""
    source = validation_source(config)
    return None if source is None else _chat_files(source, config)


def read_conversations(files: Sequence[Path], column: str | None, encoding_errors: str) -> Iterator[Conversation]:
    """The conversations of files, in order. Empty lines are nothing.

    Args:
        column: the name of the list of messages; None for "messages".

    Raises:
        ValueError: a line is no conversation; the message has the file and the number of the line.
    """
    for path in files:
        for line in text_lines(path, encoding_errors):
            where = f"{path}, line {line.number}"
            row = parse_line(line.text, where)
            yield Conversation(_messages(row, column or DEFAULT_COLUMN, where, encoding_errors), where)


def chat_texts(config: DataConfig, held_out: bool) -> Iterator[str]:
    """The messages of one of the two parts, each a text; split as :class:`bdh.data.chat.ChatCorpus` splits them."""

    def read(source: Source) -> Iterator[Conversation]:
        found = read_conversations(source.files, config.text_column, config.encoding_errors)
        return (each for each in found if has_answer(each))

    validation, training = validation_conversations(config), training_conversations(config)
    if validation is not None:
        chosen: Iterable[Conversation] = read(validation if held_out else training)
    else:
        kept = num_kept(sum(1 for _ in read(training)), config.val_fraction)
        chosen = islice(read(training), kept, None) if held_out else islice(read(training), kept)
    for conversation in chosen:
        yield from (message["content"] for message in conversation.messages if message["content"])


def has_answer(conversation: Conversation) -> bool:
    """Whether the assistant says something: else there is nothing to learn."""
    return any(message["role"] == "assistant" for message in conversation.messages)


def _messages(row: Any, column: str, where: str, encoding_errors: str) -> list[dict[str, str]]:
    example = f'{{"{column}": [{{"role": "user", "content": "..."}}, ...]}}'
    if not isinstance(row, dict) or column not in row:
        has = f"only {', '.join(map(repr, row)) or 'nothing'}" if isinstance(row, dict) else f"{row!r:.80}"
        raise ValueError(f"{where} has no {column!r}, but {has}: a line must be like {example}")
    given = row[column]
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where}: {column} is {given!r:.80}: must be a list of at least one message, as in {example}")
    messages = []
    for number, message in enumerate(given, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            shown = repr(role) if isinstance(message, dict) else f"missing in {message!r:.80}"
            raise ValueError(f"{where}, message {number}: the role is {shown}: must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}, message {number}: the content is {content!r:.80}: must be text")
        text = to_utf8(content, encoding_errors, f"{where}, message {number}").decode()
        messages.append({"role": str(role), "content": text})
    return messages


def _chat_files(source: Source, config: DataConfig) -> Source:
    files = [path for path in source.files if file_type(path) == CHAT_TYPE]
    if not files:
        raise ValueError(
            f"data.source {config.source!r} holds no conversations: they are read from {CHAT_TYPE} files, also as .gz or "
            ".zst; for text set data.format=text"
        )
    if len(files) < len(source.files):
        source.skipped.add(OTHER_TYPES, len(source.files) - len(files))
    source.shard_files = [files]
    return source


def _begins_with_messages(path: Path) -> bool:
    try:
        row = parse_line(next((line.text for line in text_lines(path, "replace")), ""), str(path))
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get(DEFAULT_COLUMN), list)
