"""From texts to token ids: in batches, on all cores, and text is text.

A document that spells out ``<eos>`` gives the tokens of those five characters, never the special token.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer

from bdh.tokenizer.byte_level import is_byte_tokenizer, without_padding
from bdh.tokenizer.plain import AnyTokenizer
from bdh.vocabulary import document_end_id, vocabulary_size

_BATCH_BYTES = 1 << 22


class TextEncoder:
    """A tokenizer made ready for encoding whole corpora.

    It works on a copy of the tokenizer's backend, so that settings for padding and truncation, which
    ``tokenizer(...)`` leaves behind, neither disturb nor are disturbed.
    """

    def __init__(self, tokenizer: AnyTokenizer):
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        self.is_byte_level = is_byte_tokenizer(tokenizer)
        if self.is_byte_level:
            backend = without_padding(backend)
        self.eos_token_id: int | None = document_end_id(tokenizer)
        self.hash: str = hashlib.sha256(f"{backend.to_str()}{self.eos_token_id}".encode()).hexdigest()
        """Equal for tokenizers that encode alike."""
        backend.encode_special_tokens = True  # their spelling in a text is text
        self._backend = backend
        self.dtype = np.dtype(smallest_dtype(vocabulary_size(tokenizer)))
        """Smallest unsigned integer type that holds every token id."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without special tokens, as ``dtype``."""
        if self.is_byte_level:
            return self.encode_utf8([text.encode() for text in texts])
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def encode_utf8(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """As :meth:`encode`, of texts in UTF-8: for the byte-level tokenizer they are the tokens already."""
        if self.is_byte_level:
            return [np.frombuffer(text, dtype=np.uint8).astype(self.dtype, copy=False) for text in texts]
        return self.encode([text.decode() for text in texts])


def encode_texts(tokenizer: AnyTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text. For many calls with one tokenizer, keep a :class:`TextEncoder`.

    Returns:
        One array a text, of the smallest unsigned integer type that holds every id of the vocabulary.
    """
    return TextEncoder(tokenizer).encode(texts)


def compression_ratio(tokenizer: AnyTokenizer, texts: Iterable[str]) -> float:
    """Bytes of UTF-8 text per token, over all texts.

    Raises:
        ValueError: the texts give no token at all.
    """
    encoder = TextEncoder(tokenizer)
    num_bytes = num_tokens = 0
    for batch in batches_of_bytes(text.encode() for text in texts):
        num_bytes += sum(map(len, batch))
        num_tokens += sum(map(len, encoder.encode_utf8(batch)))
    if num_tokens == 0:
        raise ValueError("there is no text to measure the tokenizer on: the texts are empty")
    return num_bytes / num_tokens


def batches_of_bytes(texts: Iterable[bytes], batch_bytes: int = _BATCH_BYTES) -> Iterable[list[bytes]]:
    """Groups texts, in order, into lists of ``batch_bytes`` or a little more; keeps one list at a time."""
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def smallest_dtype(num_entries: int) -> type[np.unsignedinteger]:
    """The smallest unsigned integer type for token ids below ``num_entries``."""
    if num_entries <= 1 << 8:
        return np.uint8
    return np.uint16 if num_entries <= 1 << 16 else np.uint32
