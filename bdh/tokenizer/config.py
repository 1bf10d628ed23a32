"""The settings of the section ``tokenizer``, and loading the tokenizer that they name.

Only :func:`load_tokenizer` imports transformers, so that settings can be read without it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from bdh.hub import is_path, why_not_asked, why_not_reached
from bdh.storage import recover_dir
from bdh.text_files import read_text
from bdh.validation import Allowed, Faults, PathText, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE = "byte"
TOKENIZER_FILE = "tokenizer.json"
DEFAULT_CHAT_TEMPLATE = "default"


@dataclass
class TokenizerConfig(Settings):
    path: Annotated[PathText, Allowed(str.strip, "byte, a folder or a hub id")] = BYTE
    """byte (each byte is a token), a folder written by `bdh tokenizer train` or an export, a tokenizer.json, or a hub
    id."""
    special_tokens: bool = False
    """byte only: add <pad> <bos> <eos> <unk> after the 256 bytes. Then <eos> ends every document."""

    chat_template: Annotated[PathText, Allowed(str.strip, "default, the name of a file")] | None = None
    """A .jinja file, or default. None: the tokenizer's own; if it has none, training on conversations adds the default
    with its tokens."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(
            not self.special_tokens or self.path == BYTE,
            "special_tokens",
            self.special_tokens,
            f"false with the tokenizer {self.path!r}, which has its own: only byte takes it",
        )

    def check_available(self) -> None:
        if self.path != BYTE:
            check_tokenizer_there(self.path)
        if self.chat_template not in (None, DEFAULT_CHAT_TEMPLATE):
            read_template(Path(str(self.chat_template)))


def check_tokenizer_there(name: str) -> None:
    """Raises an exception unless a name can be a tokenizer: a file, a folder that contains one, or a hub id.

    Raises:
        FileNotFoundError: the name is none of these.
    """
    folder = Path(name)
    recover_dir(folder)
    if folder.is_dir() and not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(
            f"tokenizer.path is {name!r}: this folder holds no {TOKENIZER_FILE}, so it is neither a tokenizer nor an "
            "exported model"
        )
    if folder.exists():
        return
    if is_path(name):
        raise FileNotFoundError(f"tokenizer.path is {name!r}: there is no such folder")
    if (reason := why_not_asked(name)) is not None:
        raise FileNotFoundError(f"tokenizer.path is {name!r}: there is no such folder, and {reason}")
    if (reason := why_not_reached(name)) is not None:
        raise _not_found(name, reason)


def read_template(path: Path) -> str:
    """Reads the file of ``tokenizer.chat_template``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer.chat_template is {str(path)!r}: there is no such file; {DEFAULT_CHAT_TEMPLATE!r} takes the one "
            "that comes with bdh"
        )
    return read_text(path)


def load_tokenizer(config: TokenizerConfig | str | Path) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer that a setting names.

    Args:
        config: the settings, or only their ``path``: ``byte``, a folder, a ``tokenizer.json``, or a hub id.

    Raises:
        FileNotFoundError: the folder does not exist or contains no tokenizer, or the hub has none or is unreachable.
        ValueError: the files cannot be read as a fast tokenizer, or its ids differ from those in its file.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from bdh.tokenizer.plain import byte_tokenizer, first_line

    settings = config if isinstance(config, TokenizerConfig) else TokenizerConfig(path=str(config))
    if settings.path == BYTE:
        return byte_tokenizer(settings.special_tokens)
    check_tokenizer_there(settings.path)
    path, is_local = Path(settings.path), Path(settings.path).exists()
    if path.is_file() and not (path.name == TOKENIZER_FILE and (path.parent / "tokenizer_config.json").is_file()):
        return _bare_tokenizer(path)
    name = str(path.parent) if path.is_file() else settings.path
    setting = f"tokenizer.path is {name!r}"
    try:
        # By default, transformers would ask in a terminal whether to run code from the folder.
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=is_local, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
        if is_local:
            raise ValueError(f"{setting}: its tokenizer files cannot be read: {first_line(error)}") from error
        if not isinstance(error, OSError | ValueError):
            raise
        raise _not_found(name, first_line(error)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{setting}: it is a {type(tokenizer).__name__}, not a fast tokenizer; convert it to one that saves "
            f"{TOKENIZER_FILE}"
        )
    if is_local:
        _check_ids(tokenizer.get_vocab(), Path(name) / TOKENIZER_FILE, name)
    else:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(name, TOKENIZER_FILE)
        _check_ids(tokenizer.get_vocab(), Path(file) if isinstance(file, str) else None, name)
    return tokenizer


def _not_found(name: str, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"tokenizer.path is {name!r}: there is no such folder here, and the hub gave no tokenizer of that name ({reason}). "
        f"Without a network these work: byte, a folder that holds {TOKENIZER_FILE}, and what the hub's cache holds already, "
        "with HF_HUB_OFFLINE=1"
    )


def _bare_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Loads a ``tokenizer.json`` without its other files. Special tokens are recognized by their usual names."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from bdh.tokenizer.plain import SPECIAL_TOKENS, first_line

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer.path is {str(path)!r}: it is not a {TOKENIZER_FILE} of the tokenizers library: "
            f"{first_line(error)}"
        ) from error
    _check_ids(backend.get_vocab(), path, str(path))
    special = {role: token for role, token in SPECIAL_TOKENS.items() if backend.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _check_ids(vocabulary: dict[str, int], file: Path | None, name: str) -> None:
    """Compares the ids of a loaded tokenizer with its tokenizer.json, since the library renumbers added tokens.

    Raises:
        ValueError: two tokens share an id, or a token's id differs from that in the file.
    """
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or [] if file else []
    for token in added:
        given = vocabulary.get(token["content"])
        if given != token["id"]:
            raise ValueError(
                f"tokenizer.path is {name!r}: its added token {token['content']!r} has the id {token['id']}, but the "
                f"tokenizers library reads it as {given}: ids of added tokens must follow on the vocabulary without a gap"
            )
    by_id: dict[int, str] = {}
    for text, number in vocabulary.items():
        if by_id.setdefault(number, text) != text:
            raise ValueError(
                f"tokenizer.path is {name!r}: its tokens {by_id[number]!r} and {text!r} share the id {number}: each needs "
                "one of its own"
            )
