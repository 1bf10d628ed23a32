"""The recurrent state of a model: what it remembers of the text it has read, in a fixed size.

:class:`SynapticState` serves as ``cache``, as a slot of the engine, as a snapshot and as a stored prefix.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._pytree import GetAttrKey, register_pytree_node

from bdh.storage import atomic_file

FILE_FORMAT = "bdh-synaptic-state-1"
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The dtype and shape of each tensor, by name."""
Pattern = tuple[str, Shapes]


@dataclass
class Columns:
    """The tokens that one call reads into a state: a column holds one token, or padding, of each sequence."""

    v: torch.Tensor  # the embedded tokens, (B, T, D)
    mask: torch.Tensor | None  # bool (B, T), False for padding; None if nothing is masked
    starts: torch.Tensor | None  # bool (B, T), True for the first token of a document; None if no document starts

    @property
    def is_single(self) -> bool:
        """Whether there is one token for each sequence, and none is padding or the first of a document."""
        return self.v.shape[1] == 1 and self.mask is None and self.starts is None

    def first(self, count: int) -> "Columns":
        mask, starts = (None if each is None else each[:, :count] for each in (self.mask, self.starts))
        return Columns(self.v[:, :count], mask, starts)


@dataclass
class _Read:
    before: "SynapticState"
    columns: Columns
    advance: Callable[["SynapticState", Columns], object]
    is_run: bool
    """Whether the tokens were read one at a time, so that the next single token can be appended."""


class SynapticState:
    """The state of a batch of sequences: the sums S that attention reads, and the position of each sequence.

    Pass it to ``forward`` as ``cache`` to continue from it. ``forward`` advances it in place, so ``clone`` it
    first to keep the earlier state. The engine's slots, snapshots and stored prefixes are states of one sequence each.
    With a window, the state holds the last tokens instead of sums (:mod:`bdh.ops.eager`).

    Args:
        tensors: for each name, a list of L tensors (B, ...), one for each layer step. A plain list stands for the sums.

    Attributes:
        kind: what the tensors hold: "sums", "sums bfloat16", "rows int16" (:mod:`bdh.ops.cpu.code_steps`) or
            "window:W". ", scaled" is appended if the sums of a decaying state are stored without a factor that depends
            on the position (:mod:`bdh.ops.cpu.recurrence`). States of the same kind and model can be copied into each
            other.
        positions: int64 (B,): the number of tokens that each sequence has read, without padding. Either on the device
            of the tensors or on the CPU.
        num_columns: the number of columns read so far, including padding. transformers calls it the sequence length.
    """

    # Read by transformers' `generate`, which omits the columns that were read only if some layer is not linear.
    is_compileable = False
    is_linear = (False,)
    layers = ()

    def __init__(
        self,
        tensors: Mapping[str, list[torch.Tensor]] | list[torch.Tensor],
        positions: torch.Tensor,
        num_columns: int,
        kind: str = "sums",
    ):
        self.tensors = dict(tensors) if isinstance(tensors, Mapping) else {"sums": tensors}
        self.positions = positions
        self.num_columns = num_columns
        self.kind = kind
        self._record: list[_Read] | None = None
        # Indices of half-written sequences in the original state. Its views (see `sequence`) share this set, and
        # `_first` is the index of a view's first sequence.
        self._torn: set[int] = set()
        self._first = 0

    @classmethod
    def zeros(
        cls,
        shape: Sequence[int],
        num_layer_steps: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "SynapticState":
        """Returns an empty state of kind "sums", before the first token; ``shape`` is (B, H, N, D)."""
        B, *rest = shape
        return cls.empty("sums", {"sums": (dtype, tuple(rest))}, num_layer_steps, batch_size=B, device=device)

    @classmethod
    def empty(
        cls,
        kind: str,
        shapes: Shapes,
        num_layer_steps: int,
        *,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        positions_device: torch.device | str | None = None,
    ) -> "SynapticState":
        """Returns an empty state of any kind, before the first token.

        Args:
            kind: see :attr:`kind`.
            shapes: the dtype and shape, without B, of each tensor of a layer step.
            num_layer_steps: L.
            batch_size: B.
            device: the device of the tensors.
            positions_device: the device of ``positions``, by default ``device``.
        """
        tensors = {
            name: [torch.zeros(batch_size, *shape, dtype=dtype, device=device) for _ in range(num_layer_steps)]
            for name, (dtype, shape) in shapes.items()
        }
        positions = torch.zeros(batch_size, dtype=torch.int64, device=positions_device or device)
        return cls(tensors, positions, 0, kind)

    @property
    def sums(self) -> list[torch.Tensor]:
        """A tensor (B, H, N, D) for each layer step: float32, or float64 for a float64 model. A window has no sums."""
        return self.tensors["sums"]

    @sums.setter
    def sums(self, sums: list[torch.Tensor]) -> None:
        self.tensors["sums"] = sums

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    @property
    def position(self) -> int:
        """The position of the only sequence. Raises ``ValueError`` if there are several."""
        if self.batch_size != 1:
            raise ValueError(f"the state has {self.batch_size} sequences: only a single one has a position")
        return self.positions.item()  # type: ignore[return-value]

    @position.setter
    def position(self, position: int) -> None:
        self.positions.fill_(position)

    @property
    def nbytes(self) -> int:
        """The size of the tensors and positions in memory, in bytes."""
        return sum(tensor.nbytes for tensor in self._memory())

    @property
    def pattern(self) -> Pattern:
        """The kind, and the dtype and shape (L, ...) of each tensor of one sequence.

        States with equal patterns and batch sizes can be copied into each other.
        """
        held = {name: tensors for name, tensors in self.tensors.items() if tensors}
        return self.kind, {name: (t[0].dtype, (len(t), *t[0].shape[1:])) for name, t in held.items()}

    # A state is torn if an exception interrupted a write, so that its content is unknown. Otherwise it is whole.

    @property
    def is_torn(self) -> bool:
        """Whether a sequence is being written to, or a write was interrupted by an exception.

        A torn state cannot be read, only cleared or overwritten.
        """
        return bool(self._torn) and not self._torn.isdisjoint(self._numbers)

    @is_torn.setter
    def is_torn(self, is_torn: bool) -> None:
        (self._torn.update if is_torn else self._torn.difference_update)(self._numbers)

    @property
    def _numbers(self) -> range:
        return range(self._first, self._first + self.batch_size)

    def check_whole(self) -> None:
        """Raises an exception if the state is torn.

        Raises:
            RuntimeError: an exception has left the state half-written.
        """
        if self.is_torn:
            raise RuntimeError("an exception has left the state half-written: it can only be cleared or overwritten")

    # Copies, selections and views.

    def _mapped(
        self, change: Callable[[torch.Tensor], torch.Tensor], positions: torch.Tensor | None = None
    ) -> "SynapticState":
        """Returns a state whose tensors are ``change`` of this one's, and so its positions unless they are given."""
        tensors = {name: [change(t) for t in tensors] for name, tensors in self.tensors.items()}
        return SynapticState(
            tensors, change(self.positions) if positions is None else positions, self.num_columns, self.kind
        )

    def clone(self) -> "SynapticState":
        """Returns a copy that shares no memory with this state.

        Raises:
            RuntimeError: an exception has left the state half-written.
        """
        self.check_whole()
        return self._mapped(torch.clone)

    def detach(self) -> "SynapticState":
        """Returns the state detached from the autograd graph. It shares memory with this one."""
        return self._mapped(torch.Tensor.detach, self.positions)

    def to(self, device: torch.device | str) -> "SynapticState":
        """Returns the state on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def sequence(self, index: int) -> "SynapticState":
        """Returns a view of one sequence. It shares memory with this state, and its mark of being torn."""
        index = range(self.batch_size)[index]
        view = self._mapped(lambda tensor: tensor[index : index + 1])
        view._torn, view._first = self._torn, self._first + index
        return view

    def filter(self, sequences: Sequence[int] | torch.Tensor) -> "SynapticState":
        """Returns a copy of the sequences with the given indices, in that order. An index may occur more than once.

        Raises:
            ValueError: ``sequences`` is a boolean mask.
            RuntimeError: an exception has left the state half-written.
        """
        index = torch.as_tensor(sequences)
        if index.dtype == torch.bool:
            raise ValueError("filter takes the numbers of the sequences, not a mask: give mask.nonzero()[:, 0]")
        self.check_whole()
        index = index.to(torch.int64)
        return self._mapped(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    @classmethod
    def concat(cls, states: Sequence["SynapticState"]) -> "SynapticState":
        """Returns one state with the sequences of all given states, which may be at different positions.

        Raises:
            ValueError: no state is given, or the states are of different kinds or from models of different shapes.
            RuntimeError: an exception has left one of them half-written.
        """
        if not states:
            raise ValueError("concat got no states: it needs at least one")
        first = states[0]
        for state in states:
            if state.pattern != first.pattern:
                raise ValueError(
                    f"states of different models cannot be joined: one is {first.pattern}, another {state.pattern}"
                )
            state.check_whole()
        tensors = {
            name: [torch.cat(of_step) for of_step in zip(*(state.tensors[name] for state in states), strict=True)]
            for name in first.tensors
        }
        positions = torch.cat([state.positions for state in states])
        return cls(tensors, positions, max(state.num_columns for state in states), first.kind)

    def copy_(self, other: "SynapticState") -> None:
        """Copies ``other`` into the memory of this state.

        Raises:
            ValueError: ``other`` has another kind, shape or number of sequences.
            RuntimeError: an exception has left ``other`` half-written.
        """
        other.check_whole()
        if (self.pattern, self.batch_size) != (other.pattern, other.batch_size):
            raise ValueError(
                f"a state {other.pattern} of {other.batch_size} sequences cannot be copied into one {self.pattern} of "
                f"{self.batch_size}"
            )
        self.is_torn = True
        for tensor, source in zip(self._memory(), other._memory(), strict=True):
            tensor.copy_(source)
        self.num_columns = other.num_columns
        self.is_torn = False

    def clear(self) -> None:
        """Resets the state in place to that before the first token."""
        self.is_torn = True
        for tensor in self._memory():
            tensor.zero_()
        self.num_columns = 0
        self.is_torn = False

    def _memory(self) -> list[torch.Tensor]:
        return [*(tensor for name in sorted(self.tensors) for tensor in self.tensors[name]), self.positions]

    # Files.

    def save(self, path: str | Path) -> None:
        """Writes the state to a safetensors file, atomically.

        Raises:
            DiskFullError: the file does not fit on the disk; an existing file stays as it was.
            RuntimeError: an exception has left the state half-written.
        """
        self.check_whole()
        tensors = {f"{name}.{i}": t.contiguous() for name, many in self.tensors.items() for i, t in enumerate(many)}
        tensors["positions"] = self.positions
        num_layer_steps = max(len(many) for many in self.tensors.values())
        facts: dict[str, Any] = {"num_columns": self.num_columns, "num_passes": num_layer_steps}
        if self.kind != "sums":
            facts["kind"] = self.kind
        with atomic_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"format": FILE_FORMAT, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "SynapticState":
        """Reads a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or is not a saved state.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no state file {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FILE_FORMAT:
                    raise ValueError(f"{path} is not a saved state: its format is {metadata.get('format')!r}")
                facts = json.loads(metadata["facts"])
                names = sorted({name.rpartition(".")[0] for name in file.keys()} - {""})  # noqa: SIM118 (not a dict)
                tensors = {name: [file.get_tensor(f"{name}.{i}") for i in range(facts["num_passes"])] for name in names}
                return cls(tensors, file.get_tensor("positions"), facts["num_columns"], facts.get("kind", "sums"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete state file: {error}") from error

    # The methods that transformers' `generate` calls on a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_columns

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can remove columns, for which there must be a record of what was read."""
        return self._record is not None

    def activate_past_recording(self) -> None:
        """Starts to record what the state reads, so that :meth:`crop` can remove columns.

        The record copies the state for each chunk of tokens read in one call, and for each run of single tokens.
        """
        self._record = []

    def remember(self, columns: Columns, advance: Callable[["SynapticState", Columns], object]) -> None:
        """Records the columns that a model is about to read, if :meth:`activate_past_recording` was called.

        Args:
            columns: the tokens to be read.
            advance: a function that reads columns into a state, which :meth:`crop` uses to read them again.
        """
        if self._record is None:
            return
        if columns.is_single and self._record and self._record[-1].is_run:
            run = self._record[-1].columns
            run.v = torch.cat([run.v, columns.v.detach()], 1)
        else:
            kept = Columns(columns.v.detach(), columns.mask, columns.starts)
            self._record.append(_Read(self.clone(), kept, advance, columns.is_single))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest columns: ``crop(-3)`` removes three.

        If only a part of a chunk that was read in one call is removed, the rest of the chunk is read again. If that
        fails, the state is left unchanged.

        Args:
            tokens_to_remove: the negative number of columns, as transformers gives it.

        Raises:
            ValueError: the number is above 0, or reaches back before the last crop or :meth:`activate_past_recording`.
        """
        record, recorded = self._record or [], sum(read.columns.v.shape[1] for read in self._record or [])
        if not -recorded <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop got {tokens_to_remove}: must be between -{recorded}, the columns read since the state was last "
                "cropped or activate_past_recording() called, and 0"
            )
        self._record = None if self._record is None else []
        state = self
        while tokens_to_remove < 0:
            read = record.pop()
            state = read.before
            tokens_to_remove += read.columns.v.shape[1]
            if tokens_to_remove > 0:
                read.advance(state, read.columns.first(tokens_to_remove))
        self.tensors, self.positions, self.num_columns = state.tensors, state.positions, state.num_columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Selects the sequences of the beams that continue. Beam search calls it between its steps."""
        chosen = self.filter(beam_idx)
        self.tensors, self.positions = chosen.tensors, chosen.positions
        self._record = None if self._record is None else []  # it describes the sequences in their old order


# Registered as a pytree, so that torch.export, and with it the ONNX export, accepts a state as input and output. The
# public ``torch.export.register_dataclass`` would require a dataclass, and FSDP copies dataclass arguments, so that a
# state would no longer be advanced in place.


def _leaves(state: SynapticState) -> dict[str, Any]:
    return {**state.tensors, "positions": state.positions, "num_columns": state.num_columns}


def _context(state: SynapticState) -> list[str]:
    return [state.kind, *state.tensors]


def _unflatten(leaves: Iterable[Any], context: list[str]) -> SynapticState:
    *tensors, positions, num_columns = leaves
    kind, *names = context
    return SynapticState(dict(zip(names, tensors, strict=True)), positions, num_columns, kind)


register_pytree_node(
    SynapticState,
    lambda state: (list(_leaves(state).values()), _context(state)),
    _unflatten,
    serialized_type_name="bdh.SynapticState",
    flatten_with_keys_fn=lambda state: (
        [(GetAttrKey(name), leaf) for name, leaf in _leaves(state).items()],
        _context(state),
    ),
)
