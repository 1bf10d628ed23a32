"""The byte-level tokenizer: a token is a byte of the UTF-8 text, and its id is the byte's value."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def byte_tokenizer(special_tokens: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of 256 entries whose ids are the bytes' values.

    Every text comes back exactly. With ``special_tokens``, ``<pad> <bos> <eos> <unk>`` follow as 256 to 259.
    """
    backend = Tokenizer(models.BPE(vocab=byte_of_character(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if special_tokens:
        backend.add_special_tokens(list(SPECIAL_TOKENS.values()))  # in this order: 256, 257, ...
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **(SPECIAL_TOKENS if special_tokens else {}),
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether every text becomes its own UTF-8 bytes, as with :func:`byte_tokenizer`, also once saved and loaded.

    Any special tokens may follow behind the bytes.
    """
    if len(tokenizer) < NUM_BYTES:
        return False
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splitter = parts["model"], parts["pre_tokenizer"] or {}
    return (
        model["type"] == "BPE"
        and not model["merges"]
        and model["vocab"] == byte_of_character()
        and parts["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and [token["id"] for token in parts["added_tokens"]] == list(range(NUM_BYTES, len(tokenizer)))
        and all(token["special"] for token in parts["added_tokens"])
    )


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """What each token adds to a text, by its id: exactly these bytes, wherever it stands; none for special tokens.

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
