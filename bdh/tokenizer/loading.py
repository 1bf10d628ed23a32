"""Opens tokenizers: the built-in one, a folder, a hub id."""

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bdh.tokenizer.byte_level import SPECIAL_TOKENS, byte_tokenizer
from bdh.tokenizer.config import BYTE, TOKENIZER_FILE, TokenizerConfig, check_tokenizer_there

_CONFIG_FILE = "tokenizer_config.json"


def load_tokenizer(config: TokenizerConfig | str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a setting names.

    Args:
        config: the settings, or just their ``path``: ``byte``, a folder, a ``tokenizer.json``, or a hub id.

    Raises:
        FileNotFoundError: the folder is missing or holds no tokenizer; the hub has none or cannot be reached.
        ValueError: what is there cannot be read as a fast tokenizer, or its ids are not those of its file.
    """
    settings = config if isinstance(config, TokenizerConfig) else TokenizerConfig(path=str(config))
    name = settings.path
    if name == BYTE:
        return byte_tokenizer(settings.special_tokens)
    check_tokenizer_there(name)
    folder = Path(name)
    if folder.is_file():
        return _from_file(folder)
    return _from_folder(name) if folder.is_dir() else _from_hub(name)


def _from_folder(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    # The tokenizers library raises plain Exception for a damaged file; there is nothing narrower to catch.
    except Exception as error:
        raise ValueError(
            f"tokenizer.path is {name!r}: its tokenizer files cannot be read: {_first_line(error)}"
        ) from error
    return _checked(tokenizer, name, Path(name) / TOKENIZER_FILE)


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    """A bare ``tokenizer.json``. Its special tokens are found by their usual names."""
    if (path.parent / _CONFIG_FILE).is_file() and path.name == TOKENIZER_FILE:
        return _from_folder(str(path.parent))
    try:
        backend = Tokenizer.from_file(str(path))
    # The tokenizers library raises plain Exception for a damaged file; there is nothing narrower to catch.
    except Exception as error:
        raise ValueError(
            f"tokenizer.path is {str(path)!r}: it is no {TOKENIZER_FILE} of the tokenizers library: {_first_line(error)}"
        ) from error
    _check_ids(backend.get_vocab(), path, str(path))
    special = {role: token for role, token in SPECIAL_TOKENS.items() if backend.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"tokenizer.path is {name!r}: there is no such folder here, and the hub gave no tokenizer of that name "
            f"({_first_line(error)}). Without a network these work: byte, a folder that holds {TOKENIZER_FILE}, and "
            "what the hub's cache holds already, with HF_HUB_OFFLINE=1"
        ) from error
    file = try_to_load_from_cache(name, TOKENIZER_FILE)
    return _checked(tokenizer, name, Path(file) if isinstance(file, str) else None)


def _checked(tokenizer: object, name: str, file: Path | None) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer.path is {name!r}: it is a {type(tokenizer).__name__}, not a fast tokenizer; convert it to one "
            f"that saves {TOKENIZER_FILE}"
        )
    _check_ids(tokenizer.get_vocab(), file, name)
    return tokenizer


def _check_ids(vocabulary: dict[str, int], file: Path | None, name: str) -> None:
    """Of a tokenizer that was read, against its tokenizer.json: the library numbers added tokens itself.

    Raises:
        ValueError: two tokens share an id, or a token has another id than in the file.
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
