"""Conversations from .jsonl files, in which only the assistant's tokens count: reading, a corpus, and packing."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from bdh.data.batches import Batch, StepLoader, check_sequences, step_generator
from bdh.data.config import BUILTIN, DataConfig, mix_sources
from bdh.data.corpus import ProgressCallback, ValidationPart
from bdh.data.files import OTHER_TYPES, file_type, find_files, item_names
from bdh.data.json_files import parse_line
from bdh.data.reading import Skipped, num_kept, text_lines, to_utf8
from bdh.data.sources import Source, training_source, validation_source
from bdh.data.tokenized import TokenizedCorpus, TokenMeta, TokenWriter
from bdh.tokenizer.chat import ROLES, ChatEncoder
from bdh.words import counted

_CHAT_TYPE = ".jsonl"
_DEFAULT_COLUMN = "messages"
# The bits of a token beside its id, in the stream of conversations on disk.
IS_ANSWER = np.uint32(1 << 31)
STARTS = np.uint32(1 << 30)
ID_BITS = np.uint32((1 << 30) - 1)

_BATCH = 256  # conversations that are encoded together
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversation:
    """A conversation, which is one line of a file."""

    messages: list[dict[str, str]]
    """The messages, each with a role and a content."""
    where: str
    """File and line, for error messages."""


class ChatCorpus(TokenizedCorpus):
    """Conversations that are tokenized once; see :mod:`bdh.data.tokenized`.

    The loss counts the assistant's tokens, including the end of its turn. A training sequence contains several
    conversations, each of which is read with an empty state. A validation sequence contains one.
    """

    is_chat = True
    no_tokens_because = "conversations are no single text: only what the assistant writes counts"

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerFast, block_size: int, progress: ProgressCallback
    ):
        """Tokenizes the conversations, or loads their tokens from the cache.

        Raises:
            ValueError: a line is not a conversation, the tokenizer has no usable chat template, nothing is left to
                train on or to validate on, or ``data.streaming`` is set.
        """
        if config.streaming:
            raise ValueError(
                "data.streaming is true, but conversations are tokenized before the training: set data.streaming=false"
            )
        self.block_size = block_size
        self._pad_id = tokenizer.pad_token_id or 0  # padding is neither attended to nor counted
        encoder = ChatEncoder(tokenizer)
        sources = _chat_sources(config)
        super().__init__(
            config,
            sources,
            ["chat", encoder.hash],
            lambda writer: _tokenize(config, sources, encoder, writer, progress),
        )
        self._train, self._validation = self._streams
        self._train_pieces, num_cut = pieces_of(self._train, block_size)
        self._val_pieces, _ = pieces_of(self._validation, block_size)
        if not len(self._train_pieces) or not len(self._val_pieces):
            part = "validate on" if len(self._train_pieces) else "train on"
            raise ValueError(f"data.source {config.source!r} has no answers to {part}: the chat template marks none")
        self._packed = packed(np.diff(self._train_pieces)[:, 0].tolist(), block_size + 1)
        if num_cut:
            _logger.warning(
                "%s of %s conversations are longer than train.block_size, %s tokens: they continue in another "
                "sequence, without the earlier text",
                f"{num_cut:,}",
                f"{self.facts['documents'] - self.facts['val_documents']:,}",
                f"{block_size:,}",
            )
        num_val_answers = int(np.count_nonzero(self._validation & IS_ANSWER))
        self.val_bytes_per_token = self.facts["val_bytes"] / num_val_answers
        self.facts |= {
            "format": "chat",
            "train_answer_tokens": int(np.count_nonzero(self._train & IS_ANSWER)),
            "val_answer_tokens": num_val_answers,
            "rows": len(self._packed),
            "cut_documents": num_cut,
        }

    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> StepLoader:
        if carry_state:
            raise ValueError(
                "train.carry_state is true, but each conversation starts with an empty state: set it to false"
            )
        own = check_sequences(batch_size, rank, world_size)

        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return step_generator(seed, 0, 0, 0, epoch).permutation(len(self._packed))

        def sequences(step: int) -> Batch:
            """Returns the sequences of a step. Each epoch contains every sequence once, in another order."""
            epochs, places = np.divmod(step * batch_size + np.arange(batch_size)[own], len(self._packed))
            chosen = [self._packed[order(epoch)[place]] for epoch, place in zip(epochs.tolist(), places, strict=True)]
            return self._batch(self._train, [self._train_pieces[pieces] for pieces in chosen], self.block_size + 1)

        return StepLoader("chat", seed, sequences)

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        """Returns windows of the validation conversations one after the other, int64 (n, block_size + 1).

        Conversations that are too short for one window are repeated.
        """
        length = self.block_size + 1
        number = min(num_windows, max(1, len(self._validation) // length))
        return torch.from_numpy(np.resize(self._validation & ID_BITS, (number, length)).astype(np.int64))

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """Returns evenly spaced validation conversations, or all, each in its own sequence.

        Each piece of a conversation that is longer than a sequence counts as a conversation.

        Args:
            num_windows: the maximum number of conversations.
            document_end: not used.
        """
        number = min(num_windows, len(self._val_pieces))
        chosen = self._val_pieces[np.linspace(0, len(self._val_pieces) - 1, number).astype(np.int64)]
        batch = self._batch(self._validation, chosen[:, None], int(np.diff(chosen).max()))
        return [ValidationPart("", batch, self.val_bytes_per_token)]

    def _batch(self, stream: np.ndarray, sequences: Sequence[np.ndarray] | np.ndarray, length: int) -> Batch:
        """Returns a batch of sequences that consist of pieces.

        Args:
            stream: tokens with marks.
            sequences: for each sequence, the start and end of its pieces in the stream, (pieces, 2).
            length: the number of tokens in a sequence, including padding.
        """
        tokens = np.full((len(sequences), length), self._pad_id, dtype=np.int64)
        is_answer, starts = np.zeros((2, *tokens.shape), dtype=bool)
        for number, pieces in enumerate(sequences):
            end = 0
            for start, stop in pieces:
                begin, end = end, end + stop - start
                marked = stream[start:stop]
                tokens[number, begin:end] = marked & ID_BITS
                is_answer[number, begin + 1 : end] = marked[1:] & IS_ANSWER  # the first is not predicted
                starts[number, begin] = True
        return Batch(*map(torch.from_numpy, (tokens, is_answer[:, 1:], starts[:, :-1])))


def _tokenize(
    config: DataConfig,
    sources: tuple[Source, Source | None],
    encoder: ChatEncoder,
    writer: TokenWriter,
    progress: ProgressCallback,
) -> TokenMeta:
    skipped = Skipped()

    def write(source: Source) -> None:
        conversations = read_conversations(source.files, config.text_column, config.encoding_errors)
        while read := list(islice(conversations, _BATCH)):
            batch = [conversation for conversation in read if has_answer(conversation)]
            if len(batch) < len(read):
                skipped["conversations without a message of the assistant"] += len(read) - len(batch)
            for conversation, (ids, is_answer) in zip(batch, _encoded(batch, encoder), strict=True):
                answers = (m["content"] for m in conversation.messages if m["role"] == "assistant")
                writer.write(with_marks(ids, is_answer), sum(len(answer.encode()) for answer in answers), 1)
                ends.append((writer.num_tokens, writer.num_bytes))
            progress("tokenizing", writer.num_bytes, None)

    ends = [(0, 0)]  # tokens, and bytes of answers, up to the end of each conversation
    training, validation = sources
    write(training)
    kept = len(ends) - 1
    if validation is None:
        kept = num_kept(kept, config.val_fraction)
    else:
        write(validation)
    number = len(ends) - 1
    if kept in (0, number):
        raise ValueError(
            f"data.source {config.source!r} has {counted(number, 'conversation')} with an answer: at least one to train on "
            f"and one to validate on are needed{skipped}"
        )
    train_tokens, train_bytes = ends[kept]
    return writer.finish(np.dtype(np.uint32), train_tokens, train_bytes, number - kept, dict(skipped))


def _encoded(batch: list[Conversation], encoder: ChatEncoder) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        return encoder.encode([conversation.messages for conversation in batch])
    except ValueError:
        for conversation in batch:  # one by one, to name the one that the template refuses
            try:
                encoder.encode([conversation.messages])
            except ValueError as error:
                raise ValueError(f"{conversation.where}: {error}") from error
        raise


def holds_chat(config: DataConfig) -> bool:
    """Whether the settings, or those of a source in the mix, name conversations.

    With ``data.format`` "auto", they do if every file is a .jsonl file and the first line of the first one has a list
    of messages. If ``data.text_column`` is set, the files contain text.
    """
    if config.mix is not None:
        return any(holds_chat(source.config) for source in mix_sources(config))
    if config.format != "auto":
        return config.format == "chat"
    if config.text_column is not None:
        return False
    try:
        found = [[] if item in BUILTIN else find_files(item, Skipped()) for item in item_names(config.source)]
        files = [file for files in found for file in files or []]
        if not files or not all(found) or any(file_type(file) != _CHAT_TYPE for file in files):
            return False
        first = next((line.text for line in text_lines(files[0], "replace")), "")
        row = parse_line(first, str(files[0]))
    except (FileNotFoundError, ValueError):
        return False  # the error is reported when the source is read
    return isinstance(row, dict) and isinstance(row.get(_DEFAULT_COLUMN), list)


def read_conversations(files: Sequence[Path], column: str | None, encoding_errors: str) -> Iterator[Conversation]:
    """Yields the conversations of files, in order. Blank lines are ignored.

    Args:
        files: the files.
        column: the field that contains the list of messages; None for "messages".
        encoding_errors: the setting ``data.encoding_errors``.

    Raises:
        ValueError: a line is not a conversation. The message contains the file and the number of the line.
    """
    for path in files:
        for line in text_lines(path, encoding_errors):
            where = f"{path}, line {line.number}"
            row = parse_line(line.text, where)
            yield Conversation(_messages(row, column or _DEFAULT_COLUMN, where, encoding_errors), where)


def chat_texts(config: DataConfig, held_out: bool) -> Iterator[str]:
    """Yields the texts of messages, either those to train on or those held out by :class:`ChatCorpus`."""

    def read(source: Source) -> Iterator[Conversation]:
        return filter(has_answer, read_conversations(source.files, config.text_column, config.encoding_errors))

    training, validation = _chat_sources(config)
    if validation is not None:
        chosen = read(validation if held_out else training)
    else:
        kept = num_kept(sum(1 for _ in read(training)), config.val_fraction)
        chosen = islice(read(training), kept, None) if held_out else islice(read(training), kept)
    for conversation in chosen:
        yield from (message["content"] for message in conversation.messages if message["content"])


def has_answer(conversation: Conversation) -> bool:
    """Whether a conversation has a message of the assistant. Otherwise there is nothing to learn from it."""
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


def _chat_sources(config: DataConfig) -> tuple[Source, Source | None]:
    """Returns the sources to train on and to validate on, restricted to their .jsonl files.

    The second one is None if validation conversations are split off the first.
    """
    training, validation = training_source(config), validation_source(config)
    for source in filter(None, (training, validation)):
        files = [path for path in source.files if file_type(path) == _CHAT_TYPE]
        if not files:
            raise ValueError(
                f"data.source {config.source!r} holds no conversations: they are read from {_CHAT_TYPE} files, also as .gz "
                "or .zst; for text set data.format=text"
            )
        if len(files) < len(source.files):
            source.skipped[OTHER_TYPES] += len(source.files) - len(files)
        source.shard_files = [files]
    return training, validation


def with_marks(ids: np.ndarray, is_answer: np.ndarray) -> np.ndarray:
    """Returns a conversation as uint32: token ids, with marks for the assistant's tokens and for the first token."""
    marked = ids.astype(np.uint32) | np.where(is_answer, IS_ANSWER, np.uint32(0))
    marked[:1] |= STARTS
    return marked


def pieces_of(stream: np.ndarray, block_size: int) -> tuple[np.ndarray, int]:
    """Cuts conversations, which follow each other, into pieces that fit into sequences of ``block_size + 1`` tokens.

    A longer conversation continues in another piece, which is read with an empty state. The last token of a piece is
    only a target there, and is the first input of the next piece, so that every token is predicted once. Pieces without
    tokens that count are dropped.

    Returns:
        The start and end of each piece, int64 (pieces, 2), and the number of conversations that were cut.
    """
    begins = np.flatnonzero(stream & STARTS)
    ends = np.append(begins[1:], len(stream))
    each = np.maximum(1, -(-(ends - begins - 1) // block_size))  # pieces of each conversation
    which = np.repeat(np.arange(len(begins)), each)
    index = np.arange(len(which)) - np.repeat(np.cumsum(each) - each, each)
    starts = begins[which] + index * block_size
    stops = np.minimum(starts + block_size + 1, ends[which])
    num_answers = np.concatenate([[0], np.cumsum((stream & IS_ANSWER) != 0)])
    counts = num_answers[stops] > num_answers[np.minimum(starts + 1, stops)]  # the first token is not a target
    return np.stack([starts, stops], axis=1)[counts], int((each > 1).sum())


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs pieces into few sequences by best fit: the longest first, each into the fullest sequence in which it fits.

    Args:
        lengths: the number of tokens of each piece, at most ``capacity``.
        capacity: the number of tokens that fit in a sequence.

    Returns:
        The indices of the pieces in each sequence.
    """
    sequences: list[list[int]] = []
    by_space: dict[int, list[list[int]]] = {}  # sequences by the tokens that they have left
    spaces = 0  # a bit for each number of tokens that some sequence has left
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[piece]
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, sequence = capacity, []
            sequences.append(sequence)
        sequence.append(piece)
        by_space.setdefault(space - length, []).append(sequence)
        spaces |= 1 << (space - length)
    return sequences
