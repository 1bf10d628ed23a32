"""The byte-level tokenizer: a token is a byte of the UTF-8 text, and its id is the byte's value."""

import json
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
# UTF-8 has the bytes 0xC0, 0xC1 and 0xF5 to 0xFF in no text (RFC 3629, section 1): their ids are free.
TOKENS_OF_UNUSED_BYTES = {"pad_token": ("<pad>", 0xFF), "eos_token": ("<eos>", 0xFE)}
_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def byte_tokenizer(special_tokens: bool = False) -> "PreTrainedTokenizerFast":
    """The tokenizer of 256 entries whose ids are the bytes' values.

    Every text comes back exactly. With ``special_tokens``, ``<pad> <bos> <eos> <unk>`` follow as 256 to 259.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import, and not needed to read tokens

    backend = Tokenizer(models.BPE(vocab=byte_of_character(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if special_tokens:
        backend.add_special_tokens(list(SPECIAL_TOKENS.values()))  # in this order: 256, 257, ...
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **(SPECIAL_TOKENS if special_tokens else {})
    )


def with_padding(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """The tokenizer with ``<pad>`` and ``<eos>``, which padded batches, the harness and trainers ask for.

    In a byte tokenizer without special tokens they take the place of two bytes that no UTF-8 text has, so that the
    vocabulary stays as large as the model's. Every other tokenizer is returned as it is.
    """
    has_special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) != (None, None, None)
    if has_special or not is_byte_tokenizer(tokenizer):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    for name, byte in TOKENS_OF_UNUSED_BYTES.values():
        _rename(vocabulary, byte, name)
        parts["added_tokens"].append({**_SPECIAL, "id": byte, "content": name})
    parts["added_tokens"].sort(key=lambda token: token["id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        chat_template=tokenizer.chat_template,
        **{role: name for role, (name, _) in TOKENS_OF_UNUSED_BYTES.items()},
    )


def without_padding(backend: Tokenizer) -> Tokenizer:
    """What :func:`with_padding` made its tokenizer of: the same tokens for every text."""
    parts = json.loads(backend.to_str())
    of_bytes = {byte: character for character, byte in byte_of_character().items()}
    for token in parts["added_tokens"]:
        if token["id"] < NUM_BYTES:
            _rename(parts["model"]["vocab"], token["id"], of_bytes[token["id"]])
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] >= NUM_BYTES]
    return Tokenizer.from_str(json.dumps(parts))


def is_byte_tokenizer(tokenizer: Any) -> bool:
    """Whether every text becomes its own UTF-8 bytes, as with :func:`byte_tokenizer`, also once saved and loaded.

    Any special tokens may follow the bytes, and those of :func:`with_padding` may stand among them.
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
        and renamed.items() <= {(byte, name) for name, byte in TOKENS_OF_UNUSED_BYTES.values()}
        and parts["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and list(added)[len(renamed) :] == list(range(NUM_BYTES, len(tokenizer)))
        and all(token["special"] for token in parts["added_tokens"])
    )


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token adds to a text, by its id: exactly these bytes, wherever it stands; none for special tokens.

    Args:
        tokenizer: a ``PreTrainedTokenizerFast`` or a :class:`bdh.tokenizer.plain.PlainTokenizer`.

    Raises:
        ValueError: the tokenizer is not byte-level: what a token adds depends on those beside it, as with WordPiece, or
            the spelling is not known.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    if not isinstance(decoder, decoders.ByteLevel):
        raise ValueError(
            f"its tokens have no bytes of their own (its decoder is {type(decoder).__name__}, not ByteLevel): train one "
            "of the kinds bpe or unigram, or use byte"
        )
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocabulary = tokenizer.get_vocab()
    byte_of = byte_of_character()
    found = [b""] * (max(vocabulary.values()) + 1)
    for text, number in vocabulary.items():
        if number not in special:
            is_spelled = all(character in byte_of for character in text)
            found[number] = bytes(map(byte_of.__getitem__, text)) if is_spelled else text.encode()
    return found


def byte_of_character() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table), to the byte.

    Printable bytes of Latin-1 stand for themselves, the other 68 for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(NUM_BYTES) if byte not in set(printable)]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(NUM_BYTES + i) for i, byte in enumerate(others)})
    return {characters[byte]: byte for byte in range(NUM_BYTES)}


def _rename(vocabulary: dict[str, int], byte: int, name: str) -> None:
    old = next(token for token, number in vocabulary.items() if number == byte)
    del vocabulary[old]
    vocabulary[name] = byte
