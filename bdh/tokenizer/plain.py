"""Tokenizers without transformers, whose import takes a second: they use only the ``tokenizers`` library.

Contains the byte tokenizer (each token is a byte of the UTF-8 text, and its id the byte's value), a tokenizer for
generation, and the encoding of whole corpora.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, Union
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bdh.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AnyTokenizer = Union["PlainTokenizer", "PreTrainedTokenizerFast"]
T = TypeVar("T")

NUM_BYTES = 256
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
# The bytes 0xC0, 0xC1 and 0xF5 to 0xFF never occur in UTF-8 (RFC 3629, section 1), so their ids are free.
_TOKENS_OF_UNUSED_BYTES = {"pad_token": ("<pad>", 0xFF), "eos_token": ("<eos>", 0xFE)}

_BATCH_BYTES = 1 << 22
_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
# Tokenizer classes of transformers that use tokenizer.json as it is. Other classes may build their own tokenizer.
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_vocabulary_sizes: "WeakKeyDictionary[Any, tuple[int, int]]" = WeakKeyDictionary()


def byte_tokenizer(special_tokens: bool = False) -> "PreTrainedTokenizerFast":
    """Returns the byte tokenizer: 256 entries, whose ids are the values of the bytes.

    Decoding restores every text exactly.

    Args:
        special_tokens: whether to add ``<pad> <bos> <eos> <unk>`` with the ids 256 to 259.
    """
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab=byte_of_character(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = SPECIAL_TOKENS if special_tokens else {}
    backend.add_special_tokens(list(special.values()))  # in this order: 256, 257, ...
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def with_padding(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """Returns the tokenizer with ``<pad>`` and ``<eos>``, which padded batches, lm-eval and trainers require.

    In a byte tokenizer without special tokens they replace two bytes that never occur in UTF-8, so that the vocabulary
    keeps the size of the model's. Any other tokenizer is returned unchanged.
    """
    has_special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) != (None, None, None)
    if has_special or not is_byte_tokenizer(tokenizer):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = _renamed(tokenizer.backend_tokenizer, {byte: name for name, byte in _TOKENS_OF_UNUSED_BYTES.values()})
    backend.add_special_tokens([name for name, _ in _TOKENS_OF_UNUSED_BYTES.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        chat_template=tokenizer.chat_template,
        **{role: name for role, (name, _) in _TOKENS_OF_UNUSED_BYTES.items()},
    )


def is_byte_tokenizer(tokenizer: Any) -> bool:
    """Whether a tokenizer maps every text to its UTF-8 bytes, as :func:`byte_tokenizer` does, also after reloading.

    It can have any special tokens after the bytes, and those of :func:`with_padding`.
    """
    if len(tokenizer) < NUM_BYTES:
        return False
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splitter = parts["model"], parts["pre_tokenizer"] or {}
    added = {token["id"]: token["content"] for token in parts["added_tokens"]}
    renamed = {byte: name for byte, name in added.items() if byte < NUM_BYTES}
    return (
        model["type"] == "BPE"
        and not model["merges"]
        and model["vocab"] == {renamed.get(byte, character): byte for character, byte in byte_of_character().items()}
        and renamed.items() <= {(byte, name) for name, byte in _TOKENS_OF_UNUSED_BYTES.values()}
        and parts["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and list(added)[len(renamed) :] == list(range(NUM_BYTES, len(tokenizer)))
        and all(token["special"] for token in parts["added_tokens"])
    )


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Returns the bytes that each token adds to a text, by token id; none for special tokens.

    Args:
        tokenizer: a ``PreTrainedTokenizerFast`` or a :class:`PlainTokenizer`.

    Raises:
        ValueError: the tokenizer is not byte-level: the bytes of a token depend on its neighbours, as with WordPiece,
            or its spelling of bytes is unknown.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    if not isinstance(decoder, decoders.ByteLevel):
        raise ValueError(
            f"it is not byte-level (its decoder is {type(decoder).__name__}, not ByteLevel): train one of the kinds "
            "bpe or unigram, or use byte"
        )
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocabulary, byte_of = tokenizer.get_vocab(), byte_of_character()
    found = [b""] * (max(vocabulary.values()) + 1)
    for text, number in vocabulary.items():
        if number not in special:
            is_spelled = all(character in byte_of for character in text)
            found[number] = bytes(map(byte_of.__getitem__, text)) if is_spelled else text.encode()
    return found


def byte_of_character() -> dict[str, int]:
    """Returns the byte for each printable character of byte-level vocabularies (GPT-2's table).

    Printable bytes of Latin-1 are represented by themselves, and the other 68 by the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(NUM_BYTES)}


def _renamed(backend: Tokenizer, names: Mapping[int, str]) -> Tokenizer:
    """Returns a copy without the added tokens among the bytes, in which these bytes have other names."""
    parts = json.loads(backend.to_str())
    parts["model"]["vocab"] = {names.get(byte, text): byte for text, byte in parts["model"]["vocab"].items()}
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] >= NUM_BYTES]
    return Tokenizer.from_str(json.dumps(parts))


def copy_of_backend(tokenizer: AnyTokenizer, *, special_is_text: bool = False) -> Tokenizer:
    """Returns a copy of the backend without padding and truncation, which calls of transformers tokenizers leave set.

    Args:
        tokenizer: the tokenizer.
        special_is_text: whether to encode the spelling of a special token in a text as ordinary text.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = special_is_text
    return backend


class PlainTokenizer:
    """A tokenizer that works exactly as transformers' ``PreTrainedTokenizerFast``, without importing transformers.

    Members that both classes have carry the same names, so that functions can accept either class.

    Args:
        backend: the tokenizer of the ``tokenizers`` library.
        special_tokens: the special tokens by their roles, such as ``eos_token``.
        chat_template: the Jinja template. Several templates by name are kept but not used.
        clean_up_tokenization_spaces: the value in the files. It is only stored: :meth:`decode` never cleans up spaces.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | dict[str, str] | None = None,
        *,
        clean_up_tokenization_spaces: bool = False,
    ):
        self.backend_tokenizer = backend
        self.special_tokens_map = dict(special_tokens or {})
        self.chat_template = chat_template
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces

    @classmethod
    def of(cls, tokenizer: Any) -> "PlainTokenizer":
        """Returns the tokenizer itself, or a plain one that shares the backend of a ``PreTrainedTokenizerFast``."""
        if isinstance(tokenizer, PlainTokenizer):
            return tokenizer
        return cls(
            tokenizer.backend_tokenizer,
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
            clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        )

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """Loads the tokenizer of a folder. Returns None if its files require a class of transformers.

        Raises:
            ValueError: the files cannot be read.
        """
        folder = Path(folder)
        if not (folder / _CONFIG_FILE).is_file():
            return None
        try:
            facts = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
            if not isinstance(facts, dict) or _needs_transformers(folder, facts):
                return None
            backend = Tokenizer.from_str((folder / _TOKENIZER_FILE).read_text(encoding="utf-8"))
            added = facts.get("added_tokens_decoder") or {}
            tokens = [_added_token(added[number]) for number in sorted(added, key=int)]
            special = {
                role: _added_token(facts[role])
                for role in [*_ROLES, *(name for name in facts if name.endswith("_token") and name not in _ROLES)]
                if isinstance(facts.get(role), str | dict)
            }
            known = {*map(str, tokens), *map(str, backend.get_added_tokens_decoder().values())}
            extra = facts.get("extra_special_tokens") or facts.get("additional_special_tokens") or []
            for token in [*special.values(), *map(_added_token, extra)]:
                if str(token) not in known:
                    tokens.append(token)
                    known.add(str(token))
            backend.add_tokens(tokens)
        except FileNotFoundError as error:
            reason = f"there is no {Path(error.filename).name}"
            raise ValueError(f"the tokenizer files of {folder} cannot be read: {reason}") from error
        except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
            raise ValueError(f"the tokenizer files of {folder} cannot be read: {first_line(error)}") from error
        return cls(
            backend,
            {role: str(token) for role, token in special.items()},
            _read_templates(folder, facts.get("chat_template")),
            clean_up_tokenization_spaces=bool(facts.get("clean_up_tokenization_spaces")),
        )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Returns the token ids of a text, in which nothing is parsed as a special token.

        Args:
            text: the text.
            add_special_tokens: whether to add the special tokens that the tokenizer puts around texts.
        """
        return self._text_backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    @cached_property
    def _text_backend(self) -> Tokenizer:
        return copy_of_backend(self, special_is_text=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens_map.get(role)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(sorted(self.backend_tokenizer.get_added_tokens_decoder().items()))

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.backend_tokenizer.id_to_token(token)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)


def _needs_transformers(folder: Path, facts: dict[str, Any]) -> bool:
    older = any((folder / name).is_file() for name in ("special_tokens_map.json", "added_tokens.json"))
    names = ("auto_map", "add_bos_token", "add_eos_token", "model_specific_special_tokens")
    return (
        facts.get("tokenizer_class") not in _PLAIN_CLASSES
        or any(facts.get(name) for name in names)
        or isinstance(facts.get("extra_special_tokens"), dict)
        or (older and not facts.get("added_tokens_decoder"))
    )


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(token["content"], **{name: token[name] for name in names if name in token})


def _read_templates(folder: Path, in_config: Any) -> Any:
    """Reads the chat template, or several by name. Files take precedence over the configuration."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (path := folder / "chat_template.jinja").is_file():
        files = {"default": path, **files}
    if not files:
        return {each["name"]: each["template"] for each in in_config} if isinstance(in_config, list) else in_config
    found = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return found["default"] if list(found) == ["default"] else found


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


class TextEncoder:
    """Encodes whole corpora with a tokenizer, in batches and on all cores.

    Special tokens are never parsed: a document that contains ``<eos>`` becomes the tokens of these five characters.
    """

    def __init__(self, tokenizer: AnyTokenizer):
        backend = copy_of_backend(tokenizer)
        self.is_byte_level = is_byte_tokenizer(tokenizer)
        if self.is_byte_level:  # with_padding does not change the encoding of texts
            backend = _renamed(backend, {byte: character for character, byte in byte_of_character().items()})
        self.eos_token_id: int | None = document_end_id(tokenizer)
        self.hash: str = hashlib.sha256(f"{backend.to_str()}{self.eos_token_id}".encode()).hexdigest()
        """A hash that is equal for tokenizers with the same encoding."""
        backend.encode_special_tokens = True
        self._backend = backend
        self.dtype = np.min_scalar_type(vocabulary_size(tokenizer) - 1)
        """The smallest unsigned integer type that holds every token id."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, without special tokens, in ``dtype``."""
        if self.is_byte_level:
            return self.encode_utf8([text.encode() for text in texts])
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def encode_utf8(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Does the same as :meth:`encode` for texts in UTF-8, which for a byte tokenizer are the token ids already."""
        if self.is_byte_level:
            return [np.frombuffer(text, dtype=np.uint8).astype(self.dtype, copy=False) for text in texts]
        return self.encode([text.decode() for text in texts])


def encode_texts(tokenizer: AnyTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the token ids of each text. For many calls with one tokenizer, use a :class:`TextEncoder`.

    Returns:
        An array for each text, in the smallest unsigned integer type that holds every id of the vocabulary.
    """
    return TextEncoder(tokenizer).encode(texts)


def compression_ratio(tokenizer: AnyTokenizer, texts: Iterable[str]) -> float:
    """Returns the number of UTF-8 bytes per token over all texts.

    Raises:
        ValueError: the texts have no tokens.
    """
    encoder = TextEncoder(tokenizer)
    num_bytes = num_tokens = 0
    for batch in batches_of_bytes((text.encode() for text in texts), len):
        num_bytes += sum(map(len, batch))
        num_tokens += sum(map(len, encoder.encode_utf8(batch)))
    if num_tokens == 0:
        raise ValueError("there is no text to measure the tokenizer on: the texts are empty")
    return num_bytes / num_tokens


def batches_of_bytes(items: Iterable[T], num_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Yields the items, in order, in lists of about 4 MiB. Only one list is in memory at a time."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += num_bytes(item)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def vocabulary_size(tokenizer: AnyTokenizer) -> int:
    """Returns the largest token id plus one: the number of embedding entries that a tokenizer needs.

    ``len(tokenizer)`` is the number of tokens, which is smaller if the ids have gaps.
    """
    num_tokens, size = _vocabulary_sizes.get(tokenizer, (-1, 0))
    if num_tokens != len(tokenizer):  # tokens were added since
        num_tokens, size = len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1
        _vocabulary_sizes[tokenizer] = (num_tokens, size)
    return size


def document_end_id(tokenizer: AnyTokenizer) -> int | None:
    """Returns the id of the token that ends documents in training texts, or None.

    It is the tokenizer's ``<eos>``, unless that replaces an unused byte (:func:`with_padding`), which never occurred in
    the training texts.
    """
    end = tokenizer.eos_token_id
    is_byte = end == 0xFE and tokenizer.convert_ids_to_tokens(0xFD) == chr(0xFD)
    return None if is_byte else end


def end_token_ids(model: Any, tokenizer: AnyTokenizer) -> list[int]:
    """Returns the ids of the tokens that end a text, from the tokenizer and the model's ``generation_config``."""
    of_model = model.generation_config.eos_token_id
    ends = {*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id}
    return sorted(ends - {None})


def check_vocabulary(tokenizer: AnyTokenizer, vocab_size: int) -> None:
    """Raises an exception unless a tokenizer fits a model with a vocabulary of this size.

    Raises:
        ValueError: it does not fit.
    """
    if vocabulary_size(tokenizer) == vocab_size + 1 and tokenizer.pad_token_id == vocab_size:
        return  # a padding token that was only added to the tokenizer: the model never receives it
    if vocabulary_size(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer has {counted(vocabulary_size(tokenizer), 'entry', 'entries')} and the model {vocab_size}: "
            "must be the same number"
        )
