"""Rows of a token stream: at random starts to train on, evenly spaced ones to validate on."""

from typing import Any

import numpy as np
import torch

from bdh.data.batch import Batch
from bdh.data.documents import batch_of_documents, starts_behind


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


class WindowLoader:
    """Windows of ``block_size + 1`` tokens at random starts.

    Row i of step s starts where the i-th draw of Philox, keyed by the seed and counted from s, says: it depends
    on (seed, s, i) alone, not on how many processes share the rows. With ``document_end``, the token behind
    documents, the batches say where documents start, and those first tokens are not predicted.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        rows: slice,
        seed: int,
        document_end: int | None = None,
    ):
        self._tokens = tokens
        self._length = block_size + 1
        self._batch_size = batch_size
        self._rows = rows
        self._seed = seed
        self._document_end = document_end
        self._step = 0

    def prepare(self) -> None:
        pass

    def next(self) -> Batch:
        """The rows of the next step."""
        num_starts = len(self._tokens) - self._length + 1
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 0, self._step]))
        starts = generator.integers(num_starts, size=self._batch_size)[self._rows]
        self._step += 1
        windows = torch.from_numpy(take_windows(self._tokens, starts, self._length))
        if self._document_end is None:
            return Batch(windows)
        return batch_of_documents(windows, starts_behind(windows, self._document_end))

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "windows", "step": self._step, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another kind of loader, or of another seed.
        """
        check_state(state, "windows", seed=self._seed)
        self._step = state["step"]


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


def evenly_spaced_windows(tokens: np.ndarray, block_size: int, num_windows: int) -> torch.Tensor:
    """See :meth:`bdh.data.corpus.Corpus.validation_windows`."""
    last_start = len(tokens) - block_size - 1
    number = min(num_windows, last_start // block_size + 1)
    starts = np.linspace(0, last_start, number).astype(np.int64)
    return torch.from_numpy(take_windows(tokens, starts, block_size + 1))


def take_windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """(windows, length), int64."""
    windows = np.empty((len(starts), length), dtype=np.int64)
    for row, start in zip(windows, starts, strict=True):
        row[:] = tokens[start : start + length]
    return windows
