"""Streaming: reads, shuffles, tokenizes and packs a source during training, and stores nothing on disk.

Memory holds the shuffle buffers (``shuffle_buffer_documents`` chunks of text, at most 64 MiB, divided among all
processes), the chunks that are waiting for a place in them, the collected validation tokens, and what ``datasets``
reads at a time.
"""

import hashlib
import io
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bdh.data.batches import Batch, Loader, check_sequences, check_state, step_generator
from bdh.data.config import DataConfig
from bdh.data.corpus import Corpus, ProgressCallback, announce, check_long_enough, left_out
from bdh.data.reading import ChainReader, Chunk, Skipped, Split, State, from_plain, split_of
from bdh.data.sources import Source, show_columns, training_source, validation_source
from bdh.tokenizer.plain import TextEncoder

_BUFFER_BYTES = 1 << 26
_MAX_LANES = 64
_MASK = (1 << 64) - 1
_MAX_READ_BYTES = 1 << 28  # the limit on the text that is searched for validation tokens
_logger = logging.getLogger(__name__)


class StreamingCorpus(Corpus):
    """A corpus that is read during training.

    Without a separate validation source, every ``round(1 / val_fraction)``-th chunk is held out. A chunk is a document,
    or 256 KiB of a longer one. (A source with no more than that many chunks is split as it is without streaming, see
    :func:`bdh.data.reading.split_of`.) The first ``val_tokens`` tokens of the held-out text are used for validation.
    The search for them ends after 256 MiB of text.
    """

    no_tokens_because = "a streaming corpus is never tokenized as a whole: set data.streaming=false"

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self.block_size, self._config, self._encoder = block_size, config, encoder
        validation = validation_source(config)
        self._source = training_source(config)
        show_columns(config, self._source, validation)
        self._split = None
        skipped = left_out({}, self._source, validation)
        collected = _Collected(config, encoder, block_size, progress)
        if validation is not None:
            collected.read(((chunk, True) for chunk in validation.open(skipped)), until_enough=(True,))
            collected.read(((chunk, False) for chunk in self._source.open(skipped)), until_enough=(False,))
        else:
            self._split = split_of(self._source.open, config.val_fraction, streaming=True)
            marked = self._split.marked(self._source.open(skipped))
            collected.read((chunk, held_out) for chunk, held_out, _ in marked)
        if collected.num_read_bytes == 0:
            raise ValueError(f"data.source {config.source!r} holds no text{skipped}")
        announce(config, skipped)
        self._validation = np.concatenate(collected.pieces)
        check_long_enough(config, collected.num_tokens[False], len(self._validation), block_size)

        self.val_bytes_per_token = collected.num_val_bytes / max(1, len(self._validation))
        identity: list[Any] = [validation.fingerprint() if validation else config.val_fraction]
        if self._split is not None and self._split.unit != "parts":
            identity.append(self._split)
        self._identity = [*identity, config.text_column, config.encoding_errors, encoder.hash]
        self.fingerprint = self._fingerprint(None)
        self.facts = {
            "source": config.source,
            "streaming": True,
            "documents": None,
            "train_tokens": None,
            "val_tokens": len(self._validation),
            "val_bytes": collected.num_val_bytes,
            "dtype": encoder.dtype.name,
            "skipped": dict(skipped),
            "fingerprint": self.fingerprint,
        }

    def fingerprint_before(self, loader_state: dict[str, Any]) -> str:
        shares = loader_state.get("shares", [loader_state])  # versions before 0.2 stored a single one
        return self._fingerprint(min(shares, key=lambda share: share.get("num_dealt", 0))["reader"])

    def _fingerprint(self, until: State | None) -> str:
        identity = [self._source.fingerprint(until), *self._identity]
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]

    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        own = check_sequences(batch_size, rank, world_size)
        return StreamLoader(
            self._source, self._split, self._encoder, self._config, self.block_size, batch_size, own, seed, carry_state
        )

    def validation_tokens(self) -> np.ndarray:
        return self._validation


@dataclass
class _Lane:
    """A sequence of chunks that are dealt to the lane, shuffled among themselves, and read one after the other."""

    number: int
    num_sequences: int = 1
    """The number of sequences that are read from it in each step."""
    epoch: int = 0
    """The number of the pass through the source from which its shuffle buffer is filled."""
    num_drawn: int = 0
    first_undealt: int = 0
    """The chunks of this lane whose numbers are below this one have already been dealt to it."""
    waiting: deque[tuple[int, Chunk]] = field(default_factory=deque)
    """Chunks that were dealt to the lane but are not in the buffer yet, each with the number of its pass."""
    buffer: list[Chunk] = field(default_factory=list)
    drawn: list[Chunk] = field(default_factory=list)
    """Chunks that were drawn from the buffer but are not tokenized yet."""
    tokens: list[np.ndarray] = field(default_factory=list)
    starts: list[np.ndarray] = field(default_factory=list)
    """For each token, whether it is the first one of a chunk."""
    num_tokens: int = 0

    def add(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.tokens.append(tokens)
        self.starts.append(starts)
        self.num_tokens += len(tokens)

    def num_lacking(self, block_size: int) -> int:
        """Returns the number of tokens that must still be read for the next step."""
        return max(0, self.num_sequences * block_size + 1 - self.num_tokens)

    def following(self, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of the next step, and for each of them whether it is the first one of a chunk.

        The last token is only a target in this step, and is the first token of the step after it.
        """
        if len(self.tokens) > 1:
            self.tokens, self.starts = [np.concatenate(self.tokens)], [np.concatenate(self.starts)]
        end = self.num_sequences * block_size + 1
        return self.tokens[0][:end], self.starts[0][:end]

    def move_on(self, block_size: int) -> None:
        num_taken = self.num_sequences * block_size
        self.tokens, self.starts = [self.tokens[0][num_taken:]], [self.starts[0][num_taken:]]
        self.num_tokens -= num_taken

    def state_dict(self) -> dict[str, Any]:
        chunks = [*self.drawn, *self.buffer, *(chunk for _, chunk in self.waiting)]
        text = b"".join(chunk.utf8 for chunk in chunks) or b"\0"
        return {
            "number": self.number,
            "epoch": self.epoch,
            "num_drawn": self.num_drawn,
            "tokens": torch.from_numpy(np.concatenate([np.empty(0, np.int64), *self.tokens]).astype(np.int64)),
            "starts": torch.from_numpy(np.concatenate([np.empty(0, bool), *self.starts])),
            "text": torch.frombuffer(bytearray(text), dtype=torch.uint8),
            "lengths": [len(chunk.utf8) for chunk in chunks],
            "ends_document": [chunk.ends_document for chunk in chunks],
            "sizes": [len(self.drawn), len(self.buffer)],
            "waiting_epochs": [epoch for epoch, _ in self.waiting],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], num_sequences: int, first_undealt: int, dtype: np.dtype) -> "_Lane":
        chunks = _chunks_of(state["text"], state["lengths"], state["ends_document"])
        num_drawn, num_buffered = state["sizes"]
        lane = cls(state["number"], num_sequences, state["epoch"], state["num_drawn"], first_undealt)
        lane.drawn, lane.buffer = chunks[:num_drawn], chunks[num_drawn : num_drawn + num_buffered]
        lane.waiting.extend(zip(state["waiting_epochs"], chunks[num_drawn + num_buffered :], strict=True))
        lane.add(state["tokens"].numpy().astype(dtype), state["starts"].numpy())
        return lane


class StreamLoader(Loader):
    """Reads sequences continuously from the shuffled chunks of a source (documents, or 256 KiB of longer ones).

    The sequences of the global batch are divided among *lanes*, each of which continues from step to step. In each
    round, every lane gets one chunk, in an order that depends on the seed and the round. A lane shuffles its chunks in
    a buffer. What a lane reads therefore depends only on the seed, the text and the number of lanes. Each process keeps
    and tokenizes the chunks of its own lanes, and all processes together get the sequences that a single process would.
    """

    def __init__(
        self,
        source: Source,
        split: Split | None,
        encoder: TextEncoder,
        config: DataConfig,
        block_size: int,
        batch_size: int,
        own: slice,
        seed: int,
        carry_state: bool,
    ):
        """Creates a loader that starts at the beginning of a source.

        Args:
            source: the source.
            split: the rule for the chunks to hold out, or None.
            encoder: encodes the text.
            config: the settings.
            block_size: the number of tokens that each sequence predicts.
            batch_size: the number of sequences of the global batch.
            own: the sequences of the global batch that belong to this process.
            seed: the seed of the shuffling.
            carry_state: whether each sequence has its own lane, and continues in the next step where it ended.
        """
        self._source, self._split, self._encoder = source, split, encoder
        self._block_size, self._seed = block_size, seed
        self._kind = "continued stream" if carry_state else "stream"
        self._marks_documents = carry_state or config.pack == "documents"
        self._carries_state = carry_state
        number = self._num_lanes = batch_size if carry_state else min(batch_size, _MAX_LANES)
        self._buffer_documents = -(-config.shuffle_buffer_documents // number)
        self._buffer_bytes = _BUFFER_BYTES // number
        bounds = [lane * batch_size // number for lane in range(number + 1)]
        self._lanes = {
            lane: _Lane(lane, end - begin)
            for lane, (begin, end) in enumerate(pairwise(bounds))
            if begin < own.stop and end > own.start
        }
        begins = np.concatenate([np.full(lane.num_sequences, i) for i, lane in enumerate(self._lanes.values())])
        # The start of each sequence in the concatenated tokens of these lanes, each of which has one token more.
        self._index = np.arange(len(begins)) * block_size + begins
        first = bounds[min(self._lanes)]
        self._own = slice(own.start - first, own.stop - first)  # within the sequences of these lanes
        self.num_taken = 0
        """The number of chunks that were dealt to this process."""
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._num_dealt = self._num_read = 0
        self._is_empty = True
        self._skipped = Skipped()
        self._reader: ChainReader
        self._begin_pass(0)

    @property
    def epoch(self) -> int:
        """The number of passes through the source that all lanes of this process have completed."""
        return min(lane.epoch for lane in self._lanes.values())

    def _read(self) -> Batch:
        while lacking := [lane for lane in self._lanes.values() if lane.num_lacking(self._block_size)]:
            for lane in lacking:
                # A token has at least one byte, so this never reads much too far ahead in a small source.
                while sum(len(chunk.utf8) for chunk in lane.drawn) < lane.num_lacking(self._block_size):
                    lane.drawn.append(self._draw(lane))
            encoded = iter(self._encoder.encode_utf8([chunk.utf8 for lane in lacking for chunk in lane.drawn]))
            for lane in lacking:
                for chunk in lane.drawn:
                    lane.add(*_with_end(next(encoded), chunk, self._encoder))
                lane.drawn = []
        taken = [lane.following(self._block_size) for lane in self._lanes.values()]
        index = self._index[self._own, None] + np.arange(self._block_size + 1)
        tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in taken])[index].astype(np.int64))
        if not self._marks_documents:
            return Batch(tokens)
        return Batch.of_documents(tokens, torch.from_numpy(np.concatenate([starts for _, starts in taken])[index]))

    def _move_on(self) -> None:
        for lane in self._lanes.values():
            lane.move_on(self._block_size)

    def _draw(self, lane: _Lane) -> Chunk:
        """Draws a random chunk from a lane's buffer, which is filled from one pass through the source at a time."""
        if not lane.buffer:
            while not lane.waiting:
                self._read_on()
            lane.epoch = lane.waiting[0][0]
        num_bytes = sum(len(chunk.utf8) for chunk in lane.buffer)
        while len(lane.buffer) < self._buffer_documents and num_bytes < max(1, self._buffer_bytes):
            while not lane.waiting and self._epoch == lane.epoch:
                self._read_on()
            if not lane.waiting or lane.waiting[0][0] != lane.epoch:
                break
            lane.buffer.append(lane.waiting.popleft()[1])
            num_bytes += len(lane.buffer[-1].utf8)
        number = _random_number(self._seed, lane.number, lane.num_drawn) % len(lane.buffer)
        lane.num_drawn += 1
        lane.buffer[number], lane.buffer[-1] = lane.buffer[-1], lane.buffer[number]
        return lane.buffer.pop()

    def _read_on(self) -> None:
        """Deals the next chunk of the source, or starts the source again after its last chunk."""
        try:
            chunk = next(self._chunks, None)
        except (ValueError, OSError):
            self._open(self._reader.state())  # because an iterator ends when it raises
            raise
        if chunk is None:
            if self._is_empty:
                raise ValueError("the source gave no text to train on: it has been changed since the start")
            if self._epoch == 0 and self._skipped:
                _logger.warning("the first pass through the training text%s", self._skipped)
            self._begin_pass(self._epoch + 1)
            return
        marked = [(chunk, False, 0)] if self._split is None else list(self._split.marked([chunk], self._num_read))
        self._num_read = marked[-1][2]
        for chunk in (piece for piece, is_held_out, _ in marked if not is_held_out):
            number, self._num_dealt, self._is_empty = self._num_dealt, self._num_dealt + 1, False
            turn, place = divmod(number, self._num_lanes)
            if turn != self._order[0]:
                self._order = turn, step_generator(self._seed, 0, 0, 1, turn).permutation(self._num_lanes)
            lane = self._lanes.get(int(self._order[1][place]))
            if lane is not None and number >= lane.first_undealt:
                lane.waiting.append((self._epoch, chunk))
                self.num_taken += 1

    def _begin_pass(self, epoch: int) -> None:
        self._epoch, self._num_read, self._is_empty, self._skipped = epoch, 0, True, Skipped()
        self._open(None)

    def _open(self, state: State | None) -> None:
        self._reader = self._source.open(self._skipped, state)
        self._chunks = iter(self._reader)

    def state_dict(self) -> dict[str, Any]:
        """Returns this process's part of the position; see :func:`bdh.data.batches.join_states`."""
        share = {
            "lanes": [lane.state_dict() for lane in self._lanes.values()],
            "reader": self._reader.state(),
            "epoch": self._epoch,
            "num_read": self._num_read,
            "num_dealt": self._num_dealt,
            "is_empty": self._is_empty,
            "skipped": dict(self._skipped),
        }
        return {"kind": self._kind, "seed": self._seed, "num_lanes": self._num_lanes, "shares": [share]}

    def _load(self, state: dict[str, Any]) -> None:
        """Restores a position.

        Args:
            state: the state of all processes. Their number can have been different.
        """
        if "shares" not in state and state.get("kind") == self._kind:
            if not self._carries_state:  # with carry_state, each sequence already was a lane
                _logger.warning(
                    "the position in the stream was stored by an earlier version: nothing of the text is lost or repeated, "
                    "but from here on it is shuffled in another order than that version's"
                )
            state = _with_lanes(state, self._num_lanes)
        check_state(state, self._kind, seed=self._seed, num_lanes=self._num_lanes)
        shares = []
        for share in state["shares"]:
            for stored in share["lanes"]:
                if (number := stored["number"]) in self._lanes:
                    self._lanes[number] = _Lane.from_state(
                        stored, self._lanes[number].num_sequences, share["num_dealt"], self._encoder.dtype
                    )
                    shares.append(share)
        # Reading continues from the earliest position of any lane. The other lanes skip the chunks that they have.
        share = min(shares, key=lambda each: each["num_dealt"])
        self._num_dealt = share["num_dealt"]
        self._begin_pass(share["epoch"])
        self._num_read, self._is_empty, self._skipped = share["num_read"], share["is_empty"], Skipped(share["skipped"])
        self._open(share["reader"])


def _with_lanes(state: dict[str, Any], num_lanes: int) -> dict[str, Any]:
    """Converts a state from a version before 0.2, which had no lanes, by dealing its text to lanes.

    No text is lost or repeated, but the sequences after that differ from those of the earlier version.
    """
    lanes = [_Lane(number, epoch=state["epoch"]) for number in range(num_lanes)]
    lengths = state.get("lengths", [len(state["tokens"])])
    starts = state.get("starts", torch.zeros(len(state["tokens"]), dtype=torch.bool))
    for index, (tokens, marks) in enumerate(zip(state["tokens"].split(lengths), starts.split(lengths), strict=True)):
        lanes[index % num_lanes].add(tokens.numpy(), marks.numpy())
    first = from_plain([*state.get("round", []), *state.get("drawn", [])])
    buffered = _chunks_of(state["buffer"], state["buffer_lengths"], state["buffer_ends"])
    for index, chunk in enumerate([*first, *buffered]):
        lanes[index % num_lanes].waiting.append((state["epoch"], chunk))
    share = {
        "lanes": [lane.state_dict() for lane in lanes],
        "reader": state["reader"],
        "epoch": state["epoch"],
        "num_read": state["num_read"],
        "num_dealt": 0,
        "is_empty": not state["num_drawn"],
        "skipped": state.get("skipped", {}),
    }
    return {"kind": state["kind"], "seed": state["seed"], "num_lanes": num_lanes, "shares": [share]}


def _chunks_of(text: torch.Tensor, lengths: list[int], are_ends: list[bool]) -> list[Chunk]:
    utf8 = io.BytesIO(text.numpy().tobytes())
    return [Chunk(utf8.read(length), is_end) for length, is_end in zip(lengths, are_ends, strict=True)]


def _with_end(tokens: np.ndarray, chunk: Chunk, encoder: TextEncoder) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a chunk, with ``<eos>`` after a document, and a mask that is True for the first token.

    The first token is marked because it has no context.
    """
    if chunk.ends_document and encoder.eos_token_id is not None:
        tokens = np.append(tokens, np.array(encoder.eos_token_id, dtype=encoder.dtype))
    return tokens, np.arange(len(tokens)) == 0


def _random_number(*numbers: int) -> int:
    """Returns 64 bits that depend only on the numbers, by applying the mixing of SplitMix64 for each of them."""
    bits = 0
    for number in numbers:
        bits = (bits + number + 0x9E3779B97F4A7C15) & _MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
        bits ^= bits >> 31
    return bits


class _Collected:
    """Collects validation tokens from the beginning of a source, and counts training tokens up to one sequence."""

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self._max_tokens = max(config.val_tokens, block_size + 1)
        self._block_size, self._encoder, self._progress = block_size, encoder, progress
        self.pieces = [np.empty(0, dtype=encoder.dtype)]
        self.num_tokens = {False: 0, True: 0}
        """The number of training tokens (False) and of held-out tokens (True)."""
        self.num_val_bytes = self.num_read_bytes = 0

    def read(self, chunks: Iterable[tuple[Chunk, bool]], until_enough: Sequence[bool] = (False, True)) -> None:
        """Reads chunks until there are enough tokens.

        Args:
            chunks: the chunks, each with whether it is held out.
            until_enough: which tokens must be enough: training tokens (False), held-out tokens (True), or both.
        """
        for chunk, is_held_out in chunks:
            self.num_read_bytes += len(chunk.utf8)
            if self._lacks(is_held_out):
                tokens, _ = _with_end(self._encoder.encode_utf8([chunk.utf8])[0], chunk, self._encoder)
                self.num_tokens[is_held_out] += len(tokens)
                if is_held_out:
                    self.pieces.append(tokens)
                    self.num_val_bytes += len(chunk.utf8)
            self._progress("collecting validation text", self.num_read_bytes, None)
            if not any(map(self._lacks, until_enough)):
                return

    def _lacks(self, held_out: bool) -> bool:
        takes_many = held_out and self.num_read_bytes <= _MAX_READ_BYTES
        return self.num_tokens[held_out] < (self._max_tokens if takes_many else self._block_size + 1)
