"""An endless shuffled supply of a source's text, and its tokens."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bdh.data.parts import Part, Skipped, describe, from_plain, to_plain
from bdh.data.readers import ChainReader
from bdh.data.source import Source
from bdh.data.split import StreamSplit
from bdh.tokenizer.encoding import TextEncoder

_BUFFER_BYTES = 1 << 26
_MASK = (1 << 64) - 1
_logger = logging.getLogger(__name__)


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
        self._drawn: list[Part] = []  # for a call that an error ended
        self._start_pass()

    def _start_pass(self, state: dict[str, Any] | None = None, skipped: dict[str, int] | None = None) -> None:
        self._buffer: list[Part] = []
        self._buffer_bytes = 0
        self._num_read = 0  # in units of the split
        self._num_drawn = 0
        self._is_read = False
        self._skipped = Skipped(dict(skipped or {}))
        self._open(state)

    def _open(self, state: dict[str, Any] | None) -> None:
        self._reader: ChainReader = self._source.open(self._skipped, state)
        self._parts: Iterator[Part] = iter(self._reader)

    def draw(self, num_bytes: int) -> list[Part]:
        """The next parts, so many that they have ``num_bytes`` of text or a little more.

        Raises:
            ValueError: the text cannot be read. Then nothing is lost: the next call tries again from there.
            OSError: the same of a file.
        """
        num_bytes -= sum(len(part.utf8) for part in self._drawn)
        while num_bytes > 0:
            part = self._draw()
            num_bytes -= len(part.utf8)
            self._drawn.append(part)
        drawn, self._drawn = self._drawn, []
        return drawn

    def _draw(self) -> Part:
        self._fill()
        if not self._buffer:
            if self._num_drawn == 0:
                raise ValueError("the source gave no text to train on: it has been changed since the start")
            if self.epoch == 0 and self._skipped.counts:
                _logger.warning("the first pass through the training text%s", describe(self._skipped))
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
            try:
                part = next(self._parts, None)
            except (ValueError, OSError):
                self._open(self._reader.state())  # as an iterator that has raised is at its end
                raise
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
            "skipped": self._skipped.counts,
            "drawn": to_plain(self._drawn),
            "buffer": torch.frombuffer(
                bytearray(b"".join(part.utf8 for part in self._buffer) or b"\0"), dtype=torch.uint8
            ),
            "buffer_lengths": [len(part.utf8) for part in self._buffer],
            "buffer_ends": [part.ends_document for part in self._buffer],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start_pass(state["reader"], state.get("skipped"))  # older checkpoints did not count
        self.epoch = state["epoch"]
        self._num_drawn, self._num_read, self._is_read = state["num_drawn"], state["num_read"], state["is_read"]
        text, start = state["buffer"].numpy().tobytes(), 0
        for length, ends_document in zip(state["buffer_lengths"], state["buffer_ends"], strict=True):
            self._buffer.append(Part(text[start : start + length], ends_document))
            start += length
        self._buffer_bytes = start
        self._drawn = from_plain(state.get("drawn", []))


def encode_parts(parts: list[Part], encoder: TextEncoder) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the parts, one after the other, with ``<eos>`` behind each document where there is one.

    Returns:
        The tokens, and for each whether it is the first of its part, which the part before tells nothing of.
    """
    pieces, starts = [], []
    for part, tokens in zip(parts, encoder.encode_utf8([part.utf8 for part in parts]), strict=True):
        if part.ends_document and encoder.eos_token_id is not None:
            tokens = np.append(tokens, np.array(encoder.eos_token_id, dtype=encoder.dtype))
        pieces.append(tokens)
        starts.append(np.arange(len(tokens)) == 0)
    return np.concatenate(pieces), np.concatenate(starts)


def _random_number(seed: int, epoch: int, draw: int) -> int:
    """64 bits that depend on the three numbers alone: SplitMix64's mixing, once for each."""
    bits = 0
    for number in (seed, epoch, draw):
        bits = (bits + number + 0x9E3779B97F4A7C15) & _MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
        bits ^= bits >> 31
    return bits
