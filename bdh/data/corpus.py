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

from bdh.data.config import DataConfig
from bdh.data.reading import Skipped
from bdh.data.sources import Source

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with the step's name, the bytes of text done so far, and how many there are, or None if that is unknown."""

_NOT_COUNTED = -100  # PyTorch's and transformers' label of what the loss leaves out
_logger = logging.getLogger(__name__)


def no_progress(step: str, done_bytes: int, total_bytes: int | None) -> None:
    pass


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and which of them count.

    Attributes:
        tokens: int64 (rows, T + 1): each token but the last is an input, each but the first a target.
        is_target: bool (rows, T): whether the loss counts ``tokens[:, 1:]``; None where it counts all of them.
        starts: bool (rows, T): whether a document starts at ``tokens[:, :-1]``: it sees nothing of what is before,
            and stands at position 0. None where rows are read through, whatever they hold.
    """

    tokens: torch.Tensor
    is_target: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    @classmethod
    def stack(cls, batches: Sequence["Batch"]) -> "Batch":
        """The rows of several batches, in order. Where one marks nothing, all its tokens count, and none is a start."""
        return cls(
            torch.cat([batch.tokens for batch in batches]),
            _cat([batch.is_target for batch in batches], batches, fill=True),
            _cat([batch.starts for batch in batches], batches, fill=False),
        )

    @property
    def input_ids(self) -> torch.Tensor:
        """(rows, T)."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """(rows, T): the token after each, or -100 where it does not count."""
        following = self.tokens[:, 1:]
        return following if self.is_target is None else following.masked_fill(~self.is_target, _NOT_COUNTED)

    @property
    def num_targets(self) -> int:
        """How many tokens the loss counts."""
        return self.tokens[:, 1:].numel() if self.is_target is None else int(self.is_target.sum())

    def split(self, num_rows: int) -> Iterator["Batch"]:
        """Batches of ``num_rows`` rows, in order."""
        for start in range(0, len(self.tokens), num_rows):
            yield self[start : start + num_rows]

    def __getitem__(self, rows: slice) -> "Batch":
        return self._each(lambda tensor: tensor[rows])

    def pinned(self) -> "Batch":
        """In page-locked memory, from which a GPU copies while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        is_target, starts = (None if each is None else change(each) for each in (self.is_target, self.starts))
        return Batch(change(self.tokens), is_target, starts)


@dataclass(frozen=True)
class ValidationPart:
    """Rows to validate on, each of which is read from nothing.

    Attributes:
        name: of the source, where there are several; else "".
        bytes_per_token: UTF-8 text of a token that counts, in the mean.
    """

    name: str
    batch: Batch
    bytes_per_token: float


def _cat(parts: Sequence[torch.Tensor | None], batches: Sequence[Batch], *, fill: bool) -> torch.Tensor | None:
    if all(part is None for part in parts):
        return None
    return torch.cat(
        [
            torch.full_like(batch.input_ids, fill, dtype=torch.bool) if part is None else part
            for part, batch in zip(parts, batches, strict=True)
        ]
    )


def starts_after(tokens: torch.Tensor, document_end: int) -> torch.Tensor:
    """Whether a document starts at each token (rows, length): after each ``document_end``.

    The first token of a row continues whatever was before it, which the row does not show.
    """
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == document_end
    return starts


def batch_of_documents(tokens: torch.Tensor, starts: torch.Tensor) -> Batch:
    """A batch whose rows see nothing beyond their documents' starts.

    Args:
        tokens: int64 (rows, T + 1).
        starts: bool (rows, T + 1): a document starts at that token. It is not predicted: nothing before it is its
            context. So the loss is that of the documents alone.
    """
    if not starts.any():
        return Batch(tokens)
    return Batch(tokens, is_target=~starts[:, 1:], starts=starts[:, :-1])


class Loader(Protocol):
    """An endless supply of training rows, whose position can be stored."""

    def prepare(self) -> None:
        """Reads what the next step needs, as :meth:`next` does unless it is done before, and raises the same errors.

        It takes nothing: the state before a call and after it are of the same place in the text.
        """
        ...

    def next(self) -> Batch:
        """The rows of the next step that this process gets.

        Raises:
            ValueError: the text cannot be read. The loader, and its state, continue from there once it can.
            OSError: the same of a file.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position: numbers, strings, lists and tensors. Of several processes, those of all are stored as one.

        See :func:`join_states`.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
        if self._prepared is None:
            self._prepared = self._batch_of_step(self._step)

    def next(self) -> Batch:
        self.prepare()
        assert self._prepared is not None
        batch, self._prepared = self._prepared, None
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self._kind, "step": self._step, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another kind of loader, or of another seed.
        """
        check_state(state, self._kind, seed=self._seed)
        self._step, self._prepared = state["step"], None


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of the loaders of all processes, by rank, as one, which loaders of any number of processes load."""
    if "shares" not in states[0]:
        return states[0]  # every process has the same
    return {**states[0], "shares": [share for state in states for share in state["shares"]]}


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

    def fingerprint_before(self, loader_state: dict[str, Any]) -> str:
        """As ``fingerprint``, of what a loader had read alone: the same where the text after it has been changed."""
        return self.fingerprint

    @abstractmethod
    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        """Rows to train on.

        Args:
            batch_size: rows of the global batch, of which each process gets ``batch_size / world_size`` in a row:
                together they get what one process alone would.
            carry_state: each row continues in the next step where it ended, and the batches say where a document
                starts.

        Raises:
            ValueError: the processes cannot share the rows evenly, or there is too little text for so many rows.
        """

    @abstractmethod
    def train_tokens(self) -> np.ndarray:
        """The training part, a read-only map of a file.

        Raises:
            ValueError: the corpus is streaming, and so has no such thing.
        """

    @abstractmethod
    def validation_tokens(self) -> np.ndarray:
        """The validation part; of a streaming corpus what was collected of it."""

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        """The same windows each time, evenly spaced over the validation part.

        Returns:
            (n, block_size + 1) token ids, int64. n is ``num_windows``, or less where so many would overlap by
            more than the one token that is the last target of a window and the first input of the next.
        """
        tokens, T = self.validation_tokens(), self.block_size
        last_start = len(tokens) - T - 1
        starts = np.linspace(0, last_start, min(num_windows, last_start // T + 1)).astype(np.int64)
        return torch.from_numpy(take_windows(tokens, starts, T + 1))

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """The rows that training is measured on, the same each time; see :meth:`validation_windows`.

        Args:
            document_end: a token after which nothing is seen of what was before it.
        """
        batch = Batch(self.validation_windows(num_windows))
        if document_end is not None:
            batch = batch_of_documents(batch.tokens, starts_after(batch.tokens, document_end))
        return [ValidationPart("", batch, self.val_bytes_per_token)]


def check_long_enough(config: DataConfig, train_tokens: int, val_tokens: int, block_size: int) -> None:
    """
    Raises:
        ValueError: a part is shorter than one row, and ``block_size`` is not 0.
    """
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


def check_rows(batch_size: int, rank: int, world_size: int) -> slice:
    """The rows of the global batch that a process gets.

    Raises:
        ValueError: the processes cannot share the rows evenly.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"the global batch has {batch_size} rows: it must be a multiple of the {world_size} processes that share it"
        )
    rows = batch_size // world_size
    return slice(rank * rows, (rank + 1) * rows)


def step_generator(seed: int, *counter: int) -> np.random.Generator:
    """Random numbers that depend on these numbers alone."""
    return np.random.Generator(np.random.Philox(key=seed, counter=list(counter)))


def check_state(state: dict[str, Any], kind: str, **fixed: Any) -> None:
    """
    Raises:
        ValueError: the state is of another kind of loader, or was made with other settings.
    """
    if state.get("kind") != kind:
        raise ValueError(
            f"the loader's state is of kind {state.get('kind')!r}, not {kind!r}: data.streaming or "
            "train.carry_state was another"
        )
    for name, value in fixed.items():
        if state[name] != value:
            raise ValueError(f"the loader's state was made with {name} {state[name]!r}, but now it is {value!r}")


def take_windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """(windows, length), int64."""
    windows = np.empty((len(starts), length), dtype=np.int64)
    for row, start in zip(windows, starts, strict=True):
        row[:] = tokens[start : start + length]
    return windows
