"""The state that is carried from step to step: truncated backpropagation through time, a block long."""

import torch
from torch.distributed.tensor import DTensor

from bdh.model import BDHForCausalLM, SynapticState


class CarriedState:
    """The states of this process's rows, one for each forward pass of a step.

    A step reads on from them; gradients end at its first token.
    """

    def __init__(self, model: BDHForCausalLM, num_passes: int, rows_each: int):
        """
        Args:
            num_passes: forward passes of a step, of ``rows_each`` rows each.
        """
        self._model = model
        self._rows_each = rows_each
        self._states = [model.new_state(rows_each) for _ in range(num_passes)]

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self._states)

    def before(self, index: int) -> SynapticState:
        """What the forward pass ``index`` of a step goes on from. ``forward`` leaves it alone until :meth:`keep`."""
        state = self._states[index]
        return SynapticState(list(state.sums), state.positions, state.num_columns)

    def keep(self, index: int, state: SynapticState) -> None:
        """Takes over the state behind the forward pass ``index``, without its graph."""
        self._states[index] = state.detach()

    def forget(self) -> None:
        """Starts all rows afresh: what a forward pass that is not finite leaves would spoil all that follow."""
        self._states = [self._model.new_state(self._rows_each) for _ in self._states]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all rows in one: "sums.0" ..., (rows, H, N, D) of each pass, and "positions" (rows,)."""
        state = SynapticState.concat(self._states)
        return {f"sums.{index}": sums for index, sums in enumerate(state.sums)} | {"positions": state.positions}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what :meth:`tensors` gave, or the part of it that belongs to this process."""
        local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        sums = [local[f"sums.{index}"] for index in range(len(local) - 1)]
        whole = SynapticState(sums, local["positions"], 0)
        numbers = torch.arange(whole.batch_size).split(self._rows_each)
        self._states = [whole.filter(rows) for rows in numbers]
