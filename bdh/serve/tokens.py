"""The names of tokens in log-probabilities: their text, or, where they are no whole characters, their bytes."""

import copy
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from bdh.tokenizer.byte_level import byte_of_character


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
