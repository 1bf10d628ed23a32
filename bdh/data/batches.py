"""Batches of training sequences, the loaders that draw them from a text, and a thread that prepares the next batch."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from bdh.words import counted

_NOT_COUNTED = -100  # the label that PyTorch and transformers ignore in the loss


@dataclass(frozen=True)
class Batch:
    """A batch of token sequences, with the targets that the loss counts and the starts of documents.

    Attributes:
        tokens: int64 (B, T + 1): all but the last are inputs, all but the first are targets.
        is_target: bool (B, T): whether the loss counts ``tokens[:, 1:]``; None if it counts all.
        starts: bool (B, T): whether a document starts at ``tokens[:, :-1]``. Its tokens see nothing before it, and its
            first position is 0. None if tokens attend across documents.
    """

    tokens: torch.Tensor
    is_target: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    @classmethod
    def stack(cls, batches: Sequence["Batch"]) -> "Batch":
        """Concatenates batches. In batches without marks, all tokens count and no document starts."""

        def joined(parts: Sequence[torch.Tensor | None], default: bool) -> torch.Tensor | None:
            if all(part is None for part in parts):
                return None
            return torch.cat([batch._filled(part, default) for batch, part in zip(batches, parts, strict=True)])

        return cls(
            torch.cat([batch.tokens for batch in batches]),
            joined([batch.is_target for batch in batches], True),
            joined([batch.starts for batch in batches], False),
        )

    @classmethod
    def of_documents(cls, tokens: torch.Tensor, starts: torch.Tensor) -> "Batch":
        """Returns a batch in which tokens attend only to their own document.

        Args:
            tokens: int64 (B, T + 1).
            starts: bool (B, T + 1): True for the first token of a document. It does not count as a target, since it has
                no context, so that the loss is that of the separate documents.
        """
        return cls(tokens, is_target=~starts[:, 1:], starts=starts[:, :-1]) if starts.any() else cls(tokens)

    @property
    def input_ids(self) -> torch.Tensor:
        """The inputs, (B, T)."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """The targets, (B, T): the next token of each input, or -100 if it does not count."""
        following = self.tokens[:, 1:]
        return following if self.is_target is None else following.masked_fill(~self.is_target, _NOT_COUNTED)

    @property
    def num_targets(self) -> int:
        """The number of tokens that the loss counts."""
        return self.tokens[:, 1:].numel() if self.is_target is None else int(np.count_nonzero(self.is_target.numpy()))

    def split(self, num_sequences: int) -> Iterator["Batch"]:
        """Yields batches of ``num_sequences`` sequences, in order."""
        for start in range(0, len(self.tokens), num_sequences):
            yield self[start : start + num_sequences]

    def documents(self) -> list[torch.Tensor]:
        """The inputs of each document, int64 (T,), up to the last after which a token counts: padding is in none of them."""
        found = []
        for tokens, target, start in zip(self.input_ids, self.targets, self._filled(self.starts, False), strict=True):
            cuts = [0, *start[1:].nonzero()[:, 0].add(1).tolist(), len(tokens)]
            for begin, end in pairwise(cuts):
                if len(counting := (target[begin:end] >= 0).nonzero()):
                    found.append(tokens[begin : begin + int(counting[-1]) + 1])
        return found

    def __getitem__(self, sequences: slice) -> "Batch":
        return self._each(lambda tensor: tensor[sequences])

    def pinned(self) -> "Batch":
        """Returns the batch in pinned memory, from which a GPU can copy while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _filled(self, marks: torch.Tensor | None, default: bool) -> torch.Tensor:
        """Marks of the inputs, bool (B, T); where there are none, ``default``."""
        return torch.full_like(self.input_ids, default, dtype=torch.bool) if marks is None else marks

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        is_target, starts = (None if each is None else change(each) for each in (self.is_target, self.starts))
        return Batch(change(self.tokens), is_target, starts)


def starts_after(tokens: torch.Tensor, document_end: int) -> torch.Tensor:
    """Returns whether a document starts at each token (B, length): after each ``document_end``.

    The first token of a sequence never counts as a start, since the token before it is unknown.
    """
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == document_end
    return starts


class Loader(ABC):
    """An endless iterator over training batches, whose position can be saved."""

    _prepared: Batch | None = None

    def prepare(self) -> Batch:
        """Returns this process's sequences of the next step, without advancing. :meth:`next` then returns the same.

        The state before and after the call describes the same position in the text.

        Raises:
            ValueError: the text cannot be read. The loader and its state continue from this position once it can.
            OSError: a file cannot be read, likewise.
        """
        if self._prepared is None:
            self._prepared = self._read()
        return self._prepared

    def next(self) -> Batch:
        """Returns the sequences of the next step, and advances. Raises as :meth:`prepare`."""
        batch, self._prepared = self.prepare(), None
        self._move_on()
        return batch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a position. Raises ``ValueError`` if it is of another kind of loader or of other settings."""
        self._load(state)
        self._prepared = None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns the position: numbers, strings, lists and tensors. For several processes, see :func:`join_states`."""

    @abstractmethod
    def _read(self) -> Batch:
        """Reads the sequences of the next step without changing the position."""

    @abstractmethod
    def _move_on(self) -> None:
        """Advances to the position after the sequences that were read."""

    @abstractmethod
    def _load(self, state: dict[str, Any]) -> None: ...


def join_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combines the loader states of all processes, by rank, into one that any number of processes can load."""
    if "num_lanes" not in states[0]:
        return states[0]  # the same in every process; the shares of a mix are the weights of its sources
    return {**states[0], "shares": [share for state in states for share in state["shares"]]}


def check_state(state: dict[str, Any], kind: str, **fixed: Any) -> None:
    """Raises ``ValueError`` if the state is of another kind of loader, or was saved with other settings."""
    if state.get("kind") != kind:
        raise ValueError(
            f"the loader's state is of kind {state.get('kind')!r}, not {kind!r}: it was saved with another "
            "data.streaming or train.carry_state"
        )
    for name, value in fixed.items():
        if state[name] != value:
            raise ValueError(f"the loader's state was made with {name} {state[name]!r}, but now it is {value!r}")


def check_sequences(batch_size: int, rank: int, world_size: int) -> slice:
    """Returns a process's part of the global batch. Raises ``ValueError`` if it cannot be divided evenly."""
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"the global batch has {counted(batch_size, 'sequence')}: it must be a multiple of the {world_size} processes that share it"
        )
    number = batch_size // world_size
    return slice(rank * number, (rank + 1) * number)


def step_generator(seed: int, *counter: int) -> np.random.Generator:
    """Returns a random generator that depends only on these numbers."""
    return np.random.Generator(np.random.Philox(key=seed, counter=list(counter)))


class StepLoader(Loader):
    """A loader whose sequences depend only on the seed, the step and their index in the global batch."""

    def __init__(self, kind: str, seed: int, batch_of_step: Callable[[int], Batch]):
        """Creates a loader.

        Args:
            kind: the name of the kind of loader, for its state.
            seed: the seed, which the state contains.
            batch_of_step: returns this process's sequences of a step.
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
    """Returns a loader of windows at random positions of a text: the i-th draw of a step is the start of sequence i.

    Args:
        text: the tokens.
        block_size: T.
        batch_size: the number of sequences of the global batch.
        own: the sequences of the global batch that belong to this process.
        seed: the seed of the draws.
        end: the token that ends a document, if tokens must not attend across documents.
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
    """Returns a loader of sequences that continue from step to step, so that the state can be carried.

    The arguments are those of :func:`window_loader`. The text is treated as a circle. The sequences start at equal
    distances, from a point that depends on the seed. When each has reached the start of the next one, every token has
    been predicted once. A document starts after each ``end``, and at the beginning of the text.

    Raises:
        ValueError: the text is too short, so that sequences would overlap.
    """
    distance = len(text) // batch_size
    if distance <= block_size:
        raise ValueError(
            f"with train.carry_state, {counted(batch_size, 'sequence')} start {counted(distance, 'token')} apart in "
            f"{counted(len(text), 'training token')}: must be more than train.block_size, {block_size}, apart; lower "
            "train.batch_size or train.block_size, or use more text"
        )
    entries = (int(step_generator(seed, 0, 0, 0, 0).integers(len(text))) + np.arange(batch_size) * distance)[own]

    def next_blocks(step: int) -> Batch:
        index = (entries[:, None] + step * block_size + np.arange(-1, block_size + 1)) % len(text)
        tokens, starts = torch.from_numpy(text[index].astype(np.int64)), torch.from_numpy(index == 0)
        if end is not None:
            starts |= starts_after(tokens, end)
        return Batch.of_documents(tokens[:, 1:], starts[:, 1:])  # the first only shows whether a document ended

    return StepLoader("continued windows", seed, next_blocks)


class DataStopped(ValueError):
    """The sequences of the next step cannot be read in this or another process; the step has not started."""


class Batches:
    """Provides this process's batches step by step, and prepares the next one in a background thread.

    Within :meth:`prepared_ahead` a thread reads, tokenizes, packs and pins the batch of the next step while the current
    step runs. The saved position is always that after the batches that were returned.
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
        """Wraps a loader.

        Args:
            loader: the loader.
            gather: :meth:`bdh.distributed.world.World.gather` of the processes that train together.
            num_processes: the number of processes.
            are_alike: whether all processes have the same number of targets in each step, and can only fail to read
                text together. The processes then need not communicate.
            pin_memory: whether to use pinned memory, so that a GPU can copy while it computes.
        """
        self._loader, self._gather, self._pin_memory = loader, gather, pin_memory
        self._num_processes, self._are_alike = num_processes, are_alike
        self._requests: SimpleQueue[Future[tuple[Batch, int]] | None] | None = None
        self._prepared: Future[tuple[Batch, int]] | None = None

    @contextmanager
    def prepared_ahead(self) -> Iterator[None]:
        """A context in which the next batch is prepared in the background."""
        requests: SimpleQueue[Future[tuple[Batch, int]] | None] = SimpleQueue()

        def work() -> None:
            while (future := requests.get()) is not None:
                try:
                    future.set_result(self._prepare())
                except BaseException as error:  # raised in the main thread
                    future.set_exception(error)

        # A daemon thread, so that the process can end after an error even while the thread waits for another process.
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
        """Returns the batch of the next step, and the number of targets in the batches of all processes.

        Raises:
            DataStopped: a process cannot read its batch. All processes raise it, and :meth:`state_dict` is the position
                from which to continue when the text has been fixed.
        """
        prepared, self._prepared = self._prepared, None
        batch, num_targets = self._prepare() if prepared is None else prepared.result()
        self._loader.next()
        self._prepare_next()
        return batch, num_targets

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the batches that were returned. All processes must call it together."""
        if self._prepared is not None:
            self._prepared.exception()  # waits for the thread, which may be moving the loader
        return join_states(self._gather(self._loader.state_dict()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a position. Not allowed within :meth:`prepared_ahead`.

        Raises:
            ValueError: the state is of another kind of loader.
        """
        self._loader.load_state_dict(state)

    def _prepare_next(self) -> None:
        if self._requests is not None:
            self._prepared = Future()
            self._requests.put(self._prepared)

    def _prepare(self) -> tuple[Batch, int]:
        """Prepares the result of :meth:`next`. Raises ``DataStopped`` in all processes if one cannot read its batch."""
        batch = reason = cause = None
        try:
            batch = self._loader.prepare()
        except (ValueError, OSError) as error:
            cause, reason = error, str(error)
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.filename}: {error.strerror}"
        num_targets = 0 if batch is None else batch.num_targets
        found = [(reason, num_targets)] * self._num_processes
        if not self._are_alike:  # communicates between the background threads, so that steps do not wait for it
            found = self._gather((reason, num_targets), beside_training=True)
        if there := [each for each, _ in found if each is not None]:
            raise DataStopped(there[0]) from cause
        assert batch is not None
        return batch.pinned() if self._pin_memory else batch, sum(number for _, number in found)
