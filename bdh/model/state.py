"""The memory of a text that a model has read: fixed in size, however long the text."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bdh.model.private_api import register_pytree
from bdh.storage import atomic_file

FILE_FORMAT = "bdh-synaptic-state-1"


@dataclass
class Columns:
    """What a state reads at once."""

    v: torch.Tensor
    """The embedded tokens, (B, T, D)."""
    mask: torch.Tensor | None
    """Bool (B, T), False for padding; None where nothing is masked."""
    starts: torch.Tensor | None
    """Bool (B, T), True for the first token of a document; None where none starts."""

    def first(self, count: int) -> "Columns":
        mask, starts = (None if each is None else each[:, :count] for each in (self.mask, self.starts))
        return Columns(self.v[:, :count], mask, starts)


@dataclass
class _Read:
    before: "SynapticState"
    columns: Columns
    advance: Callable[["SynapticState", Columns], object]
    is_run: bool
    """Whether it is one token after the other, to which a further one may be added."""


class SynapticState:
    """The sums S that the attention reads, for a batch of sequences, and where each sequence stands.

    It is what ``past_key_values`` carries: pass it to ``forward`` to go on from it. ``forward`` advances it in
    place; ``clone`` it first to keep the earlier one.

    Attributes:
        sums: one tensor (B, H, N, D) for each pass, float32 (float64 for a float64 model).
        positions: int64 (B,): tokens read by each sequence, padding not counted. Exact.
        num_columns: columns fed so far, padding included; what transformers calls the sequence length.
    """

    is_compileable = False  # asked by transformers' `generate`
    is_croppable = False  # asked there on Apple's GPUs: not without a record of what was read

    def __init__(self, sums: list[torch.Tensor], positions: torch.Tensor, num_columns: int):
        self.sums = sums
        self.positions = positions
        self.num_columns = num_columns
        self._record: list[_Read] | None = None

    @classmethod
    def zeros(
        cls,
        shape: Sequence[int],
        num_passes: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "SynapticState":
        """The state before the first token; ``shape`` is (B, H, N, D)."""
        sums = [torch.zeros(*shape, dtype=dtype, device=device) for _ in range(num_passes)]
        return cls(sums, torch.zeros(shape[0], dtype=torch.int64, device=device), 0)

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the sums and positions take."""
        return sum(s.nbytes for s in self.sums) + self.positions.nbytes

    def clone(self) -> "SynapticState":
        """A copy that shares no memory with this one."""
        return SynapticState([s.clone() for s in self.sums], self.positions.clone(), self.num_columns)

    def detach(self) -> "SynapticState":
        """The same state, cut off from the autograd graph."""
        return SynapticState([s.detach() for s in self.sums], self.positions, self.num_columns)

    def to(self, device: torch.device | str) -> "SynapticState":
        """The state on another device."""
        return SynapticState([s.to(device) for s in self.sums], self.positions.to(device), self.num_columns)

    def filter(self, rows: Sequence[int] | torch.Tensor) -> "SynapticState":
        """A state of the given rows, in that order; a row may be taken more than once."""
        index = torch.as_tensor(rows, device=self.positions.device)
        if index.dtype == torch.bool:
            raise ValueError("filter takes the numbers of the rows, not a mask: give mask.nonzero()[:, 0]")
        index = index.to(torch.int64)
        sums = [s.index_select(0, index) for s in self.sums]
        return SynapticState(sums, self.positions.index_select(0, index), self.num_columns)

    @classmethod
    def concat(cls, states: Sequence["SynapticState"]) -> "SynapticState":
        """One state with the rows of all of them. They may stand at different positions.

        Raises:
            ValueError: there is none, or they come from models of different shapes.
        """
        if not states:
            raise ValueError("concat got no states: it needs at least one")
        shapes = {tuple((*s.shape[1:], s.dtype) for s in state.sums) for state in states}
        if len(shapes) > 1:
            raise ValueError(f"states of different models cannot be joined: their shapes are {sorted(shapes, key=str)}")
        sums = [torch.cat(parts) for parts in zip(*(state.sums for state in states), strict=True)]
        positions = torch.cat([state.positions for state in states])
        return cls(sums, positions, max(state.num_columns for state in states))

    def save(self, path: str | Path) -> None:
        """Writes the state to a safetensors file, which is replaced as a whole.

        Raises:
            DiskFullError: there is no room for it; a file that was there before stays.
        """
        tensors = {f"sums.{i}": s.contiguous() for i, s in enumerate(self.sums)}
        tensors["positions"] = self.positions
        facts = {"num_columns": self.num_columns, "num_passes": len(self.sums)}
        with atomic_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"format": FILE_FORMAT, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "SynapticState":
        """Reads a file that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut off, or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no state file {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FILE_FORMAT:
                    raise ValueError(f"{path} is not a saved state: its format is {metadata.get('format')!r}")
                facts = json.loads(metadata["facts"])
                sums = [file.get_tensor(f"sums.{i}") for i in range(facts["num_passes"])]
                return cls(sums, file.get_tensor("positions"), facts["num_columns"])
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete state file: {error}") from error

    # What transformers' `generate` asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_columns

    def activate_past_recording(self) -> None:
        """From now on the state remembers what it reads, so that :meth:`crop` can take columns back.

        It costs a copy of the sums for each text read at once, and for each run of single tokens.
        """
        self._record = []

    def remember(self, columns: Columns, advance: Callable[["SynapticState", Columns], object]) -> None:
        """For a model about to read the columns: they are recorded, where :meth:`activate_past_recording` asked for it.

        Args:
            advance: reads columns into a state.
        """
        if self._record is None:
            return
        is_single = columns.v.shape[1] == 1 and columns.mask is None and columns.starts is None
        if is_single and self._record and self._record[-1].is_run:
            run = self._record[-1].columns
            run.v = torch.cat([run.v, columns.v.detach()], 1)
        else:
            kept = Columns(columns.v.detach(), columns.mask, columns.starts)
            self._record.append(_Read(self.clone(), kept, advance, is_single))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest columns back: -3 three of them. Those that were read at once with them are read again.

        If that fails, the state is left as it was.

        Raises:
            ValueError: it is above 0, or goes back behind the last crop or :meth:`activate_past_recording`.
        """
        record = self._record or []
        num_recorded = sum(read.columns.v.shape[1] for read in record)
        if not -num_recorded <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop got {tokens_to_remove}: must be between -{num_recorded}, the columns read since the state was last "
                "cropped or activate_past_recording() called, and 0"
            )
        if self._record is not None:
            self._record = []
        state = self
        while tokens_to_remove < 0:
            read = record.pop()
            state = read.before
            tokens_to_remove += read.columns.v.shape[1]
            if tokens_to_remove > 0:
                read.advance(state, read.columns.first(tokens_to_remove))
        self.sums, self.positions, self.num_columns = state.sums, state.positions, state.num_columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keeps the rows of the beams that go on; called between the steps of a beam search."""
        self.sums = [s.index_select(0, beam_idx.to(s.device)) for s in self.sums]
        self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))
        self._record = None if self._record is None else []  # of rows that have changed places


register_pytree(SynapticState, ["sums", "positions", "num_columns"])
