"""The sequences of each training step: what a batch is, how it is drawn from a text, and a thread that prepares the next one."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from bdh.words import counted

_NOT_COUNTED = -100  # PyTorch's and transformers' label of what the loss leaves out


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
        return self.tokens[:, 1:].numel() if self.is_target is None else int(np.count_nonzero(self.is_target.numpy()))

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


class Loader(ABC):
    """An endless supply of training sequences, whose position can be stored."""

    _prepared: Batch | None = None

    def prepare(self) -> Batch:
        """The sequences of the next step that this process gets, which :meth:`next` then takes.

        The state before a call and after it are of the same place in the text.

        Raises:
            ValueError: the text cannot be read. The loader, and its state, continue from there once it can.
            OSError: the same of a file.
        """
        if self._prepared is None:
            self._prepared = self._read()
        return self._prepared

    def next(self) -> Batch:
        """Takes the sequences of the next step. Raises as :meth:`prepare`."""
        batch, self._prepared = self.prepare(), None
        self._move_on()
        return batch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError: the state is of another kind of loader, or was made with other settings."""
        self._load(state)
        self._prepared = None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position: numbers, strings, lists and tensors. Of several processes, see :func:`join_states`."""

    @abstractmethod
    def _read(self) -> Batch:
        """The sequences of the next step, after which the position is the same."""

    @abstractmethod
    def _move_on(self) -> None:
        """To the position after the sequences that were read."""

    @abstractmethod
    def _load(self, state: dict[str, Any]) -> None: ...


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of the loaders of all processes, by rank, as one, which loaders of any number of processes load."""
    if "num_lanes" not in states[0]:
        return states[0]  # every process has the same; the shares of a mix are the weights of its sources
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


def check_sequences(batch_size: int, rank: int, world_size: int) -> slice:
    """The sequences of the global batch that a process gets. Raises ValueError: the processes cannot share them evenly."""
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"the global batch has {counted(batch_size, 'sequence')}: it must be a multiple of the {world_size} processes that share it"
        )
    number = batch_size // world_size
    return slice(rank * number, (rank + 1) * number)


def step_generator(seed: int, *counter: int) -> np.random.Generator:
    """Random numbers that depend on these numbers alone."""
    return np.random.Generator(np.random.Philox(key=seed, counter=list(counter)))


class StepLoader(Loader):
    """A loader whose sequences depend on the seed, the step and their place in the global batch alone."""

    def __init__(self, kind: str, seed: int, batch_of_step: Callable[[int], Batch]):
        """
        Args:
            kind: of the state.
            batch_of_step: the sequences of a step that this process gets.
        """
        self._kind, self._seed, self._batch_of_step, self._step = kind, seed, batch_of_step, 0

    def _read(self) -> Batch:
        return self._batch_of_step(self._step)

    def _move_on(self) -> None:
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self._kind, "step": self._step, "seed": self._seed}

    def _load(self, state: dict[str, Any]) -> None:
        check_state(state, self._kind, seed=self._seed)
        self._step = state["step"]


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
            f"train.carry_state lets {counted(batch_size, 'sequence')} read on through {counted(len(text), 'training token')}, each "
            f"{counted(distance, 'token')} after the next: must be more than a block, {block_size}; a lower "
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


class DataStopped(ValueError):
    """The sequences of the next step cannot be read, on this process or on another; the step has not begun."""


class Batches:
    """The sequences of this process, step by step.

    Within :meth:`prepared_ahead` a thread reads, tokenizes, packs and pins those of the next step while this one runs. The
    position that is stored is always that of the sequences that were handed out.
    """

    def __init__(
        self,
        loader: Loader,
        gather: Callable[..., list[Any]],
        *,
        num_processes: int,
        are_alike: bool,
        pin_memory: bool,
    ):
        """
        Args:
            gather: of the processes that train together, :meth:`bdh.distributed.world.World.gather`.
            are_alike: whether all processes have as many targets in each step, and none finds text that it cannot read
                where the others read on: then they need not agree.
            pin_memory: so that a GPU copies the sequences while it computes.
        """
        self._loader, self._gather, self._pin_memory = loader, gather, pin_memory
        self._num_processes, self._are_alike = num_processes, are_alike
        self._requests: SimpleQueue[Future[tuple[Batch, int]] | None] | None = None
        self._prepared: Future[tuple[Batch, int]] | None = None

    @contextmanager
    def prepared_ahead(self) -> Iterator[None]:
        """Within it, the next sequences are prepared in the background."""
        requests: SimpleQueue[Future[tuple[Batch, int]] | None] = SimpleQueue()

        def work() -> None:
            while (future := requests.get()) is not None:
                try:
                    future.set_result(self._prepare())
                except BaseException as error:  # for the training's own thread
                    future.set_exception(error)

        # A daemon: should the training end by an error while another process is waited for, this one ends all the same.
        threading.Thread(target=work, daemon=True, name="batches").start()
        self._requests = requests
        self._prepare_next()
        try:
            yield
            if self._prepared is not None:
                self._prepared.exception()  # waits
                self._prepared = None
        finally:
            self._requests = None
            requests.put(None)

    def next(self) -> tuple[Batch, int]:
        """The sequences of the next step, and how many targets the loss counts in those of all processes.

        Raises:
            DataStopped: some process cannot read its own; all raise it, and :meth:`state_dict` is from where they can be
                read once the text is mended.
        """
        prepared, self._prepared = self._prepared, None
        batch, num_targets = self._prepare() if prepared is None else prepared.result()
        self._loader.next()
        self._prepare_next()
        return batch, num_targets

    def state_dict(self) -> dict[str, Any]:
        """The position after what was handed out, of all processes, which call this together."""
        if self._prepared is not None:
            self._prepared.exception()  # waits for the thread, which may be moving the loader
        return join_states(self._gather(self._loader.state_dict()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` where the state is that of another kind of loader. Not while batches are prepared ahead."""
        self._loader.load_state_dict(state)

    def _prepare_next(self) -> None:
        if self._requests is not None:
            self._prepared = Future()
            self._requests.put(self._prepared)

    def _prepare(self) -> tuple[Batch, int]:
        """What :meth:`next` gives. Raises ``DataStopped`` on all processes, if some process cannot read its sequences."""
        batch = reason = cause = None
        try:
            batch = self._loader.prepare()
        except (ValueError, OSError) as error:
            cause, reason = error, str(error)
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.filename}: {error.strerror}"
        num_targets = 0 if batch is None else batch.num_targets
        found = [(reason, num_targets)] * self._num_processes
        if not self._are_alike:  # between these threads: the steps do not wait for it
            found = self._gather((reason, num_targets), beside_training=True)
        if there := [each for each, _ in found if each is not None]:
            raise DataStopped(there[0]) from cause
        assert batch is not None
        return batch.pinned() if self._pin_memory else batch, sum(number for _, number in found)
