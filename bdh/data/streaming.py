"""Training straight from a source: read, shuffled, tokenized and packed as it goes, nothing on disk.

Memory holds the shuffle buffer (``shuffle_buffer_documents`` parts of documents, 64 MiB of text at most), the
tokens of about 1 MiB of text, the collected validation tokens, and what ``datasets`` reads at a time.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from bdh.data.batch import Batch
from bdh.data.config import DataConfig
from bdh.data.corpus import Corpus, announce, check_long_enough, describe
from bdh.data.parts import Part, Skipped
from bdh.data.progress import ProgressCallback
from bdh.data.readers import ChainReader
from bdh.data.source import Source, training_source, validation_source
from bdh.data.split import StreamSplit, stream_split
from bdh.data.windows import check_rows, check_state, take_windows
from bdh.tokenizer.encoding import TextEncoder

_BUFFER_BYTES = 1 << 26
_ENCODED_BYTES = 1 << 20  # of text that is tokenized at a time
_MAX_READ_BYTES = 1 << 28  # of text in search of validation tokens
_MASK = (1 << 64) - 1


class StreamingCorpus(Corpus):
    """A corpus that is read while training.

    Without a validation source of its own, every ``round(1 / val_fraction)``-th part of it is held out: a part is
    a document, or 256 KiB of a longer one. (A source of not more parts is split as it is without streaming, see
    :func:`bdh.data.split.stream_split`.) Of the held-out text, the first ``val_tokens`` tokens are kept to
    validate on; the search for them ends after 256 MiB of text.
    """

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self.block_size = block_size
        self._config = config
        self._encoder = encoder
        validation = validation_source(config)
        self._source = training_source(config)
        self._split = None if validation is not None else stream_split(self._source, config.val_fraction)

        skipped = Skipped(dict(self._source.skipped.counts))
        collector = _Collector(config, encoder, block_size, progress)
        if validation is not None:
            collector.read(((part, True) for part in validation.open(skipped)), needs_training=False)
            collector.read(((part, False) for part in self._source.open(skipped)), needs_validation=False)
        else:
            assert self._split is not None
            marked = self._split.marked(self._source.open(skipped))
            collector.read((part, held_out) for part, held_out, _ in marked)
        if collector.num_read_bytes == 0:
            raise ValueError(f"data.source {config.source!r} holds no text" + describe(skipped))
        announce(config, skipped)
        self._validation = collector.tokens()
        check_long_enough(config, collector.num_train_tokens, len(self._validation), block_size)

        self.val_bytes_per_token = collector.num_val_bytes / max(1, len(self._validation))
        identity: list[Any] = [self._source.fingerprint()]
        identity.append(validation.fingerprint() if validation else config.val_fraction)
        if self._split is not None and self._split.unit != "parts":
            identity.append(self._split)
        identity += [config.text_column, config.encoding_errors, encoder.hash]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
        self.facts = {
            "source": config.source,
            "streaming": True,
            "documents": None,
            "train_tokens": None,
            "val_tokens": len(self._validation),
            "val_bytes": collector.num_val_bytes,
            "dtype": encoder.dtype.name,
            "skipped": skipped.counts,
            "fingerprint": self.fingerprint,
        }

    def train_loader(self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> "StreamLoader":
        rows = check_rows(batch_size, rank, world_size)
        parts = ShuffledParts(self._source, self._split, self._config.shuffle_buffer_documents, seed)
        return StreamLoader(parts, self._encoder, self.block_size, batch_size, rows)

    def train_tokens(self) -> np.ndarray:
        raise ValueError("a streaming corpus is never tokenized as a whole: set data.streaming=false")

    def validation_tokens(self) -> np.ndarray:
        return self._validation


class StreamLoader:
    """Packs the tokens of shuffled parts into rows.

    Each row is ``block_size + 1`` tokens, and its last one is also the first of the next row: every token is
    predicted once. Each process reads everything and takes its rows.
    """

    def __init__(self, parts: "ShuffledParts", encoder: TextEncoder, block_size: int, batch_size: int, rows: slice):
        self._parts = parts
        self._encoder = encoder
        self._block_size = block_size
        self._batch_size = batch_size
        self._rows = rows
        self._tokens = np.empty(0, dtype=encoder.dtype)  # tokenized, and not yet behind us

    @property
    def epoch(self) -> int:
        """How often the source has been read to its end."""
        return self._parts.epoch

    def next(self) -> Batch:
        """The rows of the next step; nothing marks documents."""
        num_new = self._batch_size * self._block_size
        pieces, num_tokens = [self._tokens], len(self._tokens)
        while num_tokens < num_new + 1:
            # A token is a byte at least, so this is never much too much: a small source is not read far ahead.
            missing = num_new + 1 - num_tokens
            encoded = encode_parts(self._parts.draw(min(missing, _ENCODED_BYTES)), self._encoder)
            pieces.append(encoded)
            num_tokens += len(encoded)
        tokens = np.concatenate(pieces)
        self._tokens = tokens[num_new:].copy()
        starts = np.arange(self._batch_size)[self._rows] * self._block_size
        return Batch(torch.from_numpy(take_windows(tokens, starts, self._block_size + 1)))

    def state_dict(self) -> dict[str, Any]:
        tokens = torch.from_numpy(self._tokens.astype(np.int64))
        return {"kind": "stream", "tokens": tokens, **self._parts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another kind of loader, or of another seed.
        """
        check_state(state, "stream", seed=self._parts.seed)
        self._parts.load_state_dict(state)
        self._tokens = state["tokens"].numpy().astype(self._encoder.dtype)


class ShuffledParts:
    """An endless supply of a source's parts: each pass through the source is shuffled in another way.

    A buffer is kept full, and each part that is drawn is one of it at random. The k-th draw of a pass depends on
    (seed, pass, k) alone.
    """

    def __init__(self, source: Source, split: StreamSplit | None, buffer_documents: int, seed: int):
        """
        Args:
            split: which parts to hold out, or None.
        """
        self._source = source
        self._split = split
        self._buffer_documents = buffer_documents
        self.seed = seed
        self.epoch = 0
        self._start_pass()

    def _start_pass(self, state: dict[str, Any] | None = None) -> None:
        self._buffer: list[Part] = []
        self._buffer_bytes = 0
        self._num_read = 0  # in units of the split
        self._num_drawn = 0
        self._is_read = False
        self._reader: ChainReader = self._source.open(state=state)
        self._parts: Iterator[Part] = iter(self._reader)

    def draw(self, num_bytes: int) -> list[Part]:
        """The next parts, so many that they have ``num_bytes`` of text or a little more."""
        drawn = []
        while num_bytes > 0:
            part = self._draw()
            num_bytes -= len(part.utf8)
            drawn.append(part)
        return drawn

    def _draw(self) -> Part:
        self._fill()
        if not self._buffer:
            if self._num_drawn == 0:
                raise ValueError("the source gave no text to train on: it has been changed since the start")
            self.epoch += 1
            self._start_pass()
            self._fill()
        number = _random_number(self.seed, self.epoch, self._num_drawn) % len(self._buffer)
        self._buffer[number], self._buffer[-1] = self._buffer[-1], self._buffer[number]
        part = self._buffer.pop()
        self._buffer_bytes -= len(part.utf8)
        self._num_drawn += 1
        return part

    def _fill(self) -> None:
        while not self._is_read and len(self._buffer) < self._buffer_documents and self._buffer_bytes < _BUFFER_BYTES:
            part = next(self._parts, None)
            if part is None:
                self._is_read = True
                return
            if self._split is None:
                kept = [part]
            else:
                marked = list(self._split.marked([part], self._num_read))
                kept, self._num_read = [piece for piece, held_out, _ in marked if not held_out], marked[-1][2]
            self._buffer += kept
            self._buffer_bytes += sum(len(piece.utf8) for piece in kept)

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "num_drawn": self._num_drawn,
            "num_read": self._num_read,
            "is_read": self._is_read,
            "reader": self._reader.state(),
            "buffer": torch.frombuffer(
                bytearray(b"".join(part.utf8 for part in self._buffer) or b"\0"), dtype=torch.uint8
            ),
            "buffer_lengths": [len(part.utf8) for part in self._buffer],
            "buffer_ends": [part.ends_document for part in self._buffer],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start_pass(state["reader"])
        self.epoch = state["epoch"]
        self._num_drawn, self._num_read, self._is_read = state["num_drawn"], state["num_read"], state["is_read"]
        text, start = state["buffer"].numpy().tobytes(), 0
        for length, ends_document in zip(state["buffer_lengths"], state["buffer_ends"], strict=True):
            self._buffer.append(Part(text[start : start + length], ends_document))
            start += length
        self._buffer_bytes = start


class _Collector:
    """Reads a source until there are validation tokens, and enough to train on for a single row."""

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self._max_tokens = max(config.val_tokens, block_size + 1)
        self._block_size = block_size
        self._encoder = encoder
        self._progress = progress
        self._pieces: list[np.ndarray] = []
        self._num_val_tokens = 0
        self.num_val_bytes = 0
        self.num_train_tokens = 0
        self.num_read_bytes = 0

    def read(
        self, parts: Iterable[tuple[Part, bool]], needs_training: bool = True, needs_validation: bool = True
    ) -> None:
        """
        Args:
            parts: each with whether it is held out.
        """
        for part, held_out in parts:
            self.num_read_bytes += len(part.utf8)
            if held_out and self._num_val_tokens < self._max_tokens:
                self._keep(part)
            elif not held_out and self.num_train_tokens <= self._block_size:
                self.num_train_tokens += len(encode_parts([part], self._encoder))
            self._progress("collecting validation text", self.num_read_bytes, None)
            lacks_training = needs_training and self.num_train_tokens <= self._block_size
            wanted = self._block_size + 1 if self.num_read_bytes > _MAX_READ_BYTES else self._max_tokens
            lacks_validation = needs_validation and self._num_val_tokens < wanted
            if not lacks_training and not lacks_validation:
                return

    def _keep(self, part: Part) -> None:
        tokens = encode_parts([part], self._encoder)
        self._pieces.append(tokens)
        self._num_val_tokens += len(tokens)
        self.num_val_bytes += len(part.utf8)

    def tokens(self) -> np.ndarray:
        return np.concatenate(self._pieces) if self._pieces else np.empty(0, dtype=self._encoder.dtype)


def encode_parts(parts: list[Part], encoder: TextEncoder) -> np.ndarray:
    """The tokens of the parts, one after the other, with ``<eos>`` behind each document where there is one."""
    pieces = []
    for part, tokens in zip(parts, encoder.encode_utf8([part.utf8 for part in parts]), strict=True):
        pieces.append(tokens)
        if part.ends_document and encoder.eos_token_id is not None:
            pieces.append(np.array([encoder.eos_token_id], dtype=encoder.dtype))
    return np.concatenate(pieces)


def _random_number(seed: int, epoch: int, draw: int) -> int:
    """64 bits that depend on the three numbers alone: SplitMix64's mixing, once for each."""
    bits = 0
    for number in (seed, epoch, draw):
        bits = (bits + number + 0x9E3779B97F4A7C15) & _MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
        bits ^= bits >> 31
    return bits
