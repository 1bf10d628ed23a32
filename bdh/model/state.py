"""What a model remembers of the texts that it has read: fixed in size, however long they are."""

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
"""Dtype and shape of tensors by their names."""
Pattern = tuple[str, Shapes]


@dataclass
class Columns:
    """What a state reads at once."""

    v: torch.Tensor  # the embedded tokens, (B, T, D)
    mask: torch.Tensor | None  # bool (B, T), False for padding; None where nothing is masked
    starts: torch.Tensor | None  # bool (B, T), True for the first token of a document; None where none starts

    @property
    def is_single(self) -> bool:
        """Whether it is one token for each sequence, neither padding nor a document's first."""
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
    """Whether it is one token after the other, to which a further one may be added."""


class SynapticState:
    """The sums S that the attention reads, for a batch of sequences, and where each sequence stands.

    It is what ``past_key_values`` carries: pass it to ``forward`` to continue from it. ``forward`` advances it in
    place; ``clone`` it first to keep the earlier one. Slots of the engine, snapshots and stored prefixes are states of
    one sequence. With a window it holds the last tokens instead of sums (:mod:`bdh.ops.eager`).

    Args:
        tensors: by name, one tensor (B, ...) for each of the L layer steps. A list is that of the sums.

    Attributes:
        kind: what the tensors mean: "sums"; "sums bfloat16"; "rows int16" (:mod:`bdh.ops.cpu.code_steps`); with ", scaled" those
            that fade by a factor which follows from the position (:mod:`bdh.ops.cpu.recurrence`); "window:W". States of one kind
            and model can be copied into each other.
        positions: int64 (B,): tokens read by each sequence, padding not counted. Exact. On the device of the tensors, or
            on the CPU.
        num_columns: columns read so far, padding included; what transformers calls the sequence length.
    """

    is_compileable = False  # asked by transformers' `generate`
    is_croppable = False  # asked there on Apple's GPUs: not without a record of what was read

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
        # The sequences that are half-written, by their numbers in the state of which all that share it are views.
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
        """The sums before the first token; ``shape`` is (B, H, N, D)."""
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
        """The state before the first token.

        Args:
            shapes: dtype and shape of each tensor of a layer step, without B.
            positions_device: that of the positions, by default ``device``.
        """
        tensors = {
            name: [torch.zeros(batch_size, *shape, dtype=dtype, device=device) for _ in range(num_layer_steps)]
            for name, (dtype, shape) in shapes.items()
        }
        positions = torch.zeros(batch_size, dtype=torch.int64, device=positions_device or device)
        return cls(tensors, positions, 0, kind)

    @property
    def sums(self) -> list[torch.Tensor]:
        """One tensor (B, H, N, D) for each layer step, float32 (float64 for a float64 model); not of a window."""
        return self.tensors["sums"]

    @sums.setter
    def sums(self, sums: list[torch.Tensor]) -> None:
        self.tensors["sums"] = sums

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    @property
    def position(self) -> int:
        """That of the only sequence; a ``ValueError`` where there are several."""
        if self.batch_size != 1:
            raise ValueError(f"the state has {self.batch_size} sequences: only one alone has a position")
        return self.positions.item()  # type: ignore[return-value]

    @position.setter
    def position(self, position: int) -> None:
        self.positions.fill_(position)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tensors and positions take."""
        return sum(tensor.nbytes for tensor in self._memory())

    @property
    def pattern(self) -> Pattern:
        """Its kind, and dtype and shape (L, ...) of what it holds of a sequence: equal for states that can be copied."""
        held = {name: tensors for name, tensors in self.tensors.items() if tensors}
        return self.kind, {name: (t[0].dtype, (len(t), *t[0].shape[1:])) for name, t in held.items()}

    # Whole, or torn: half-written when an exception came, so that nobody knows what it holds.

    @property
    def is_torn(self) -> bool:
        """Whether a sequence's memory is being written, or was when an exception came. Such a state is never read, only
        cleared or overwritten."""
        return bool(self._torn) and not self._torn.isdisjoint(self._numbers)

    @is_torn.setter
    def is_torn(self, is_torn: bool) -> None:
        (self._torn.update if is_torn else self._torn.difference_update)(self._numbers)

    @property
    def _numbers(self) -> range:
        return range(self._first, self._first + self.batch_size)

    def check_whole(self) -> None:
        """
        Raises:
            RuntimeError: an exception has left it half-written.
        """
        if self.is_torn:
            raise RuntimeError("an exception has left the state half-written: it can only be cleared or overwritten")

    # Copies, selections and views.

    def _mapped(
        self, change: Callable[[torch.Tensor], torch.Tensor], positions: torch.Tensor | None = None
    ) -> "SynapticState":
        """A state of changed tensors, and of positions changed alike where none are given."""
        tensors = {name: [change(t) for t in tensors] for name, tensors in self.tensors.items()}
        return SynapticState(
            tensors, change(self.positions) if positions is None else positions, self.num_columns, self.kind
        )

    def clone(self) -> "SynapticState":
        """A copy that shares no memory with this one.

        Raises:
            RuntimeError: an exception has left it half-written.
        """
        self.check_whole()
        return self._mapped(torch.clone)

    def detach(self) -> "SynapticState":
        """The same state, cut off from the autograd graph."""
        return self._mapped(torch.Tensor.detach, self.positions)

    def to(self, device: torch.device | str) -> "SynapticState":
        """The state on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def sequence(self, index: int) -> "SynapticState":
        """A view of one sequence: it shares memory with this state, and whether that is torn."""
        index = range(self.batch_size)[index]
        view = self._mapped(lambda tensor: tensor[index : index + 1])
        view._torn, view._first = self._torn, self._first + index
        return view

    def filter(self, sequences: Sequence[int] | torch.Tensor) -> "SynapticState":
        """A state of the given sequences, in that order; a sequence may be taken more than once."""
        index = torch.as_tensor(sequences)
        if index.dtype == torch.bool:
            raise ValueError("filter takes the numbers of the sequences, not a mask: give mask.nonzero()[:, 0]")
        self.check_whole()
        index = index.to(torch.int64)
        return self._mapped(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    @classmethod
    def concat(cls, states: Sequence["SynapticState"]) -> "SynapticState":
        """One state with the sequences of all of them. They may stand at different positions.

        Raises:
            ValueError: there is none, or they come from models of different shapes.
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
        """Makes this the state of ``other``, in the memory that it has.

        Raises:
            ValueError: ``other`` is of another kind, shape or number of sequences.
            RuntimeError: an exception has left ``other`` half-written.
        """
        other.check_whole()
        if (self.pattern, self.batch_size) != (other.pattern, other.batch_size):
            raise ValueError(
                f"a state {other.pattern} of {other.batch_size} sequences cannot become one {self.pattern} of "
                f"{self.batch_size}"
            )
        self.is_torn = True
        for tensor, source in zip(self._memory(), other._memory(), strict=True):
            tensor.copy_(source)
        self.num_columns = other.num_columns
        self.is_torn = False

    def clear(self) -> None:
        """Forgets everything: the state before the first token, in the memory that it has."""
        self.is_torn = True
        for tensor in self._memory():
            tensor.zero_()
        self.num_columns = 0
        self.is_torn = False

    def _memory(self) -> list[torch.Tensor]:
        return [*(tensor for name in sorted(self.tensors) for tensor in self.tensors[name]), self.positions]

    # Files.

    def save(self, path: str | Path) -> None:
        """Writes the state to a safetensors file, which is replaced as a whole.

        Raises:
            DiskFullError: it does not fit on the disk; a file that was there before stays.
            RuntimeError: an exception has left it half-written.
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
                names = sorted({name.rpartition(".")[0] for name in file.keys()} - {""})  # noqa: SIM118 (not a dict)
                tensors = {name: [file.get_tensor(f"{name}.{i}") for i in range(facts["num_passes"])] for name in names}
                return cls(tensors, file.get_tensor("positions"), facts["num_columns"], facts.get("kind", "sums"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete state file: {error}") from error

    # What transformers' `generate` asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_columns

    def activate_past_recording(self) -> None:
        """From now on the state remembers what it reads, so that :meth:`crop` can take columns back: with a copy of the sums
        for each text read at once, and for each run of single tokens."""
        self._record = []

    def remember(self, columns: Columns, advance: Callable[["SynapticState", Columns], object]) -> None:
        """For a model about to read the columns: they are recorded, where :meth:`activate_past_recording` asked for it.
        ``advance`` reads columns into a state."""
        if self._record is None:
            return
        if columns.is_single and self._record and self._record[-1].is_run:
            run = self._record[-1].columns
            run.v = torch.cat([run.v, columns.v.detach()], 1)
        else:
            kept = Columns(columns.v.detach(), columns.mask, columns.starts)
            self._record.append(_Read(self.clone(), kept, advance, columns.is_single))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest columns back: -3 three of them. Those that were read at once with them are read again.

        If that fails, the state is left as it was.

        Raises:
            ValueError: it is above 0, or goes back before the last crop or :meth:`activate_past_recording`.
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
        """Keeps the sequences of the beams that continue; called between the steps of a beam search."""
        chosen = self.filter(beam_idx)
        self.tensors, self.positions = chosen.tensors, chosen.positions
        self._record = None if self._record is None else []  # of sequences that have changed places


# torch.export, and so ONNX, takes a state as input and output, as it does lists and dicts. The public way for that,
# ``torch.export.register_dataclass``, is for dataclasses, which FSDP copies where a state is to be advanced in place.


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
