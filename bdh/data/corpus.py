"""What training and evaluation get from the data: batches, loaders whose position can be stored, and corpora.

A :class:`Corpus` is a tokenized text in two parts. ``bdh.train`` uses of it: ``facts`` and ``fingerprint``, its loader
(``prepare``, ``next``, ``state_dict``, ``load_state_dict``; the states of several processes become one with
:func:`join_states`), and the sequences to validate on.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from bdh.data.config import DataConfig
from bdh.data.reading import Skipped
from bdh.data.sources import Source

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with the step's name, the bytes of text done so far, and how many there are, or None if that is unknown."""

_NOT_COUNTED = -100  # PyTorch's and transformers' label of what the loss leaves out
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens, and which of them count.

    Attributes:
        tokens: int64 (B, T + 1): each token but the last is an input, each but the first a target.
        is_target: bool (B, T): whether the loss counts ``tokens[:, 1:]``; None where it counts all of them.
        starts: bool (B, T): whether a document starts at ``tokens[:, :-1]``: it sees nothing of what is before,
            and stands at position 0. None where sequences are read through, whatever they hold.
    """

    tokens: torch.Tensor
    is_target: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    @classmethod
    def stack(cls, batches: Sequence["Batch"]) -> "Batch":
        """The sequences of several batches, in order. Where one marks nothing, all tokens count, and none is a start."""

        def joined(parts: Sequence[torch.Tensor | None], default: bool) -> torch.Tensor | None:
            if all(part is None for part in parts):
                return None
            filled = [torch.full_like(batch.input_ids, default, dtype=torch.bool) for batch in batches]
            return torch.cat([full if part is None else part for full, part in zip(filled, parts, strict=True)])

        return cls(
            torch.cat([batch.tokens for batch in batches]),
            joined([batch.is_target for batch in batches], True),
            joined([batch.starts for batch in batches], False),
        )

    @classmethod
    def of_documents(cls, tokens: torch.Tensor, starts: torch.Tensor) -> "Batch":
        """A batch whose sequences see nothing beyond their documents' starts.

        Args:
            tokens: int64 (B, T + 1).
            starts: bool (B, T + 1): a document starts at that token. It is not predicted: nothing before it is its
                context. So the loss is that of the documents alone.
        """
        return cls(tokens, is_target=~starts[:, 1:], starts=starts[:, :-1]) if starts.any() else cls(tokens)

    @property
    def input_ids(self) -> torch.Tensor:
        """(B, T)."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """(B, T): the token after each, or -100 where it does not count."""
        following = self.tokens[:, 1:]
        return following if self.is_target is None else following.masked_fill(~self.is_target, _NOT_COUNTED)

    @property
    def num_targets(self) -> int:
        """How many tokens the loss counts."""
        return self.tokens[:, 1:].numel() if self.is_target is None else int(self.is_target.sum())

    def split(self, num_sequences: int) -> Iterator["Batch"]:
        """Batches of ``num_sequences``, in order."""
        for start in range(0, len(self.tokens), num_sequences):
            yield self[start : start + num_sequences]

    def __getitem__(self, sequences: slice) -> "Batch":
        return self._each(lambda tensor: tensor[sequences])

    def pinned(self) -> "Batch":
        """In page-locked memory, from which a GPU copies while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        is_target, starts = (None if each is None else change(each) for each in (self.is_target, self.starts))
        return Batch(change(self.tokens), is_target, starts)


def starts_after(tokens: torch.Tensor, document_end: int) -> torch.Tensor:
    """Whether a document starts at each token (B, length): after each ``document_end``.

    The first token of a sequence continues whatever was before it, which the sequence does not show.
    """
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == document_end
    return starts


@dataclass(frozen=True)
class ValidationPart:
    """Sequences to validate on, each of which is read from nothing.

    Attributes:
        name: of the source, where there are several; else "".
        bytes_per_token: UTF-8 text of a token that counts, in the mean.
    """

    name: str
    batch: Batch
    bytes_per_token: float


class Loader(Protocol):
    """An endless supply of training sequences, whose position can be stored."""

    def prepare(self) -> None:
        """Reads what the next step needs, as :meth:`next` does unless it is done before, and raises the same errors.

        It takes nothing: the state before a call and after it are of the same place in the text.
        """

    def next(self) -> Batch:
        """The sequences of the next step that this process gets.

        Raises:
            ValueError: the text cannot be read. The loader, and its state, continue from there once it can.
            OSError: the same of a file.
        """

    def state_dict(self) -> dict[str, Any]:
        """The position: numbers, strings, lists and tensors. Of several processes, see :func:`join_states`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError: the state is of another kind of loader, or was made with other settings."""


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of the loaders of all processes, by rank, as one, which loaders of any number of processes load."""
    if "shares" not in states[0]:
        return states[0]  # every process has the same
    return {**states[0], "shares": [share for state in states for share in state["shares"]]}


def check_state(state: dict[str, Any], kind: str, **fixed: Any) -> None:
    """Raises ValueError: the state is of another kind of loader, or was made with other settings."""
    if state.get("kind") != kind:
        raise ValueError(
            f"the loader's state is of kind {state.get('kind')!r}, not {kind!r}: data.streaming or "
            "train.carry_state was another"
        )
    for name, value in fixed.items():
        if state[name] != value:
            raise ValueError(f"the loader's state was made with {name} {state[name]!r}, but now it is {value!r}")


class StepLoader:
    """A loader whose sequences depend on the seed, the step and their place in the global batch alone."""

    def __init__(self, kind: str, seed: int, batch_of_step: Callable[[int], Batch]):
        """
        Args:
            kind: of the state.
            batch_of_step: the sequences of a step that this process gets.
        """
        self._kind, self._seed, self._batch_of_step, self._step = kind, seed, batch_of_step, 0
        self._prepared: Batch | None = None

    def prepare(self) -> None:
        self._prepared = self._prepared or self._batch_of_step(self._step)

    def next(self) -> Batch:
        batch = self._prepared or self._batch_of_step(self._step)
        self._step, self._prepared = self._step + 1, None
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self._kind, "step": self._step, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self._kind, seed=self._seed)
        self._step, self._prepared = state["step"], None


def window_loader(text: np.ndarray, block_size: int, batch_size: int, own: slice, seed: int, end: int | None) -> Loader:
    """Windows of a text at random starts: where that of sequence i begins is the i-th draw of the step.

    Args:
        own: the sequences of the global batch that this process gets.
        end: the token that ends a document, after which nothing is seen of what was before it.
    """
    windows = sliding_window_view(text, block_size + 1)

    def draw(step: int) -> Batch:
        starts = step_generator(seed, 0, 0, 0, step).integers(len(windows), size=batch_size)[own]
        tokens = torch.from_numpy(windows[starts].astype(np.int64))
        return Batch(tokens) if end is None else Batch.of_documents(tokens, starts_after(tokens, end))

    return StepLoader("windows", seed, draw)


def continued_loader(
    text: np.ndarray, block_size: int, batch_size: int, own: slice, seed: int, end: int | None
) -> Loader:
    """Sequences that read on from step to step, so that a state can be carried. Arguments of :func:`window_loader`.

    The text is a circle, which they enter at equal distances from a point that the seed chooses. When each has come
    to where the next one entered, every token was predicted once. A document starts after each ``end``, and at the
    beginning of the text.

    Raises:
        ValueError: they would read the same text at the same time.
    """
    distance = len(text) // batch_size
    if distance <= block_size:
        raise ValueError(
            f"train.carry_state lets {batch_size} sequences read on through {len(text):,} training tokens, each "
            f"{distance:,} tokens after the next: must be more than a block, {block_size}; a lower "
            "train.batch_size or train.block_size, or more text would do"
        )
    entries = (int(step_generator(seed, 0, 0, 0, 0).integers(len(text))) + np.arange(batch_size) * distance)[own]

    def next_blocks(step: int) -> Batch:
        index = (entries[:, None] + step * block_size + np.arange(-1, block_size + 1)) % len(text)
        tokens, starts = torch.from_numpy(text[index].astype(np.int64)), torch.from_numpy(index == 0)
        if end is not None:
            starts |= starts_after(tokens, end)
        return Batch.of_documents(tokens[:, 1:], starts[:, 1:])  # the first was there to see whether a document ended

    return StepLoader("continued windows", seed, next_blocks)


class Corpus(ABC):
    """A tokenized text in two parts, one to train on and one to validate on.

    ``facts`` is plain data about it; ``fingerprint`` is another where the data are others, and the same where the
    same data lie in another place; ``val_bytes_per_token`` turns a loss per token into one per byte of text.
    """

    facts: dict[str, Any]
    fingerprint: str
    val_bytes_per_token: float
    block_size: int
    is_chat: bool = False
    """Whether there are conversations in it."""
    no_tokens_because: str = ""
    """Why it has no single text of tokens, where it has none."""

    def fingerprint_before(self, loader_state: dict[str, Any]) -> str:
        """As ``fingerprint``, of what a loader had read alone: the same where the text after it has been changed."""
        return self.fingerprint

    @abstractmethod
    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        """Sequences to train on.

        Args:
            batch_size: sequences of the global batch, of which each process gets ``batch_size / world_size`` in a row:
                together they get what one process alone would.
            carry_state: each sequence continues in the next step where it ended, and the batches say where a document
                starts.

        Raises:
            ValueError: the processes cannot share the sequences evenly, or there is too little text for so many.
        """

    def train_tokens(self) -> np.ndarray:
        """The training part, a read-only map of a file.

        Raises:
            ValueError: there is no such thing, as of a stream, a mix or conversations.
        """
        raise ValueError(self.no_tokens_because)

    def validation_tokens(self) -> np.ndarray:
        """The validation part; of a stream what was collected of it. Raises as :meth:`train_tokens`."""
        raise ValueError(self.no_tokens_because)

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        """The same windows each time, evenly spaced over the validation part.

        Returns:
            (n, block_size + 1) token ids, int64. n is ``num_windows``, or less where so many would overlap by
            more than the one token that is the last target of a window and the first input of the next.
        """
        windows = sliding_window_view(self.validation_tokens(), self.block_size + 1)
        last_start = len(windows) - 1
        starts = np.linspace(0, last_start, min(num_windows, last_start // self.block_size + 1)).astype(np.int64)
        return torch.from_numpy(windows[starts].astype(np.int64))

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """The sequences that training is measured on, the same each time; see :meth:`validation_windows`.

        Args:
            document_end: a token after which nothing is seen of what was before it.
        """
        tokens = self.validation_windows(num_windows)
        starts = None if document_end is None else starts_after(tokens, document_end)
        batch = Batch(tokens) if starts is None else Batch.of_documents(tokens, starts)
        return [ValidationPart("", batch, self.val_bytes_per_token)]


def check_long_enough(config: DataConfig, train_tokens: int, val_tokens: int, block_size: int) -> None:
    """Raises ValueError: a part is shorter than one sequence, and ``block_size`` is not 0."""
    parts = (
        ("training", train_tokens, "a lower train.block_size"),
        ("validation", val_tokens, "a higher data.val_fraction, data.val_source, or a lower train.block_size"),
    )
    for part, num_tokens, remedy in parts:
        if block_size > 0 and num_tokens < block_size + 1:
            raise ValueError(
                f"data.source {config.source!r}: the {part} part has {num_tokens} tokens, but one row of "
                f"block_size {block_size} needs {block_size + 1}: more text or {remedy} would do"
            )


def left_out(while_reading: dict[str, int], *sources: Source | None) -> Skipped:
    """What was left out when sources were looked up, and when they were read."""
    skipped = Skipped(dict(while_reading))
    for source in filter(None, sources):
        skipped.include(source.skipped)
    return skipped


def announce(config: DataConfig, skipped: Skipped) -> None:
    if skipped.counts:
        _logger.warning("data.source %r%s", config.source, skipped)


def check_sequences(batch_size: int, rank: int, world_size: int) -> slice:
    """The sequences of the global batch that a process gets. Raises ValueError: the processes cannot share them evenly."""
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"the global batch has {batch_size} rows: it must be a multiple of the {world_size} processes that share it"
        )
    number = batch_size // world_size
    return slice(rank * number, (rank + 1) * number)


def step_generator(seed: int, *counter: int) -> np.random.Generator:
    """Random numbers that depend on these numbers alone."""
    return np.random.Generator(np.random.Philox(key=seed, counter=list(counter)))
