"""The names of tokens in log-probabilities: their text, or, where they are no whole characters, their bytes."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from bdh.tokenizer.byte_level import byte_of_character
from bdh.vocabulary import vocabulary_size


def tokenizer_info(tokenizer: PreTrainedTokenizerFast, template: str | None, max_length: int) -> dict[str, Any]:
    """A tokenizer's facts by the names of its tokenizer_config.json; special tokens that it has not are None."""
    kinds = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"))
    added = {
        str(token): {
            "content": each.content,
            **{name: getattr(each, name) for name in ("lstrip", "normalized", "rstrip", "single_word", "special")},
        }
        for token, each in tokenizer.added_tokens_decoder.items()
    }
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": vocabulary_size(tokenizer),
        "model_max_length": max_length,
        **kinds,
        **tokenizer.special_tokens_map,
        "chat_template": template,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
    }


class TokenNames:
    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        # Of its own, since reading and encoding at the same time in two threads fails.
        self._tokenizer = tokenizer = copy.deepcopy(tokenizer)
        self._added = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items()}
        decoder = tokenizer.backend_tokenizer.decoder
        self._byte_of = byte_of_character() if "ByteLevel" in repr(decoder) else None
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def name(self, token: int) -> str:
        """Distinct for distinct bytes: ``bytes:\\xf0`` for a byte that is no character."""
        found = self.bytes_of(token)
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode("utf-8")
        if self._byte_of is not None:
            characters = self._tokenizer.convert_ids_to_tokens(token) or ""  # an id that no token has
            return bytes(self._byte_of[character] for character in characters)
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode("utf-8")
