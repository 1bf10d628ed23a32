"""States that are carried from one training step to the next (``train.carry_state``)."""

import torch
from torch.distributed.tensor import DTensor

from bdh.model import BDHForCausalLM, SynapticState


class CarriedState:
    """The states of this process's sequences between two steps, one for each micro-batch.

    The next step continues from them. Gradients stop at its first token (truncated backpropagation through time over
    one block).
    """

    def __init__(self, model: BDHForCausalLM, num_micro_batches: int, batch_size: int):
        self._model = model
        self._batch_size = batch_size
        self._states = [model.new_state(batch_size) for _ in range(num_micro_batches)]

    def before(self, index: int) -> SynapticState:
        """Returns the state from which micro-batch ``index`` continues. It is not modified before :meth:`keep`."""
        state = self._states[index]
        return SynapticState(list(state.sums), state.positions, state.num_columns)

    def keep(self, index: int, state: SynapticState) -> None:
        """Stores the state after micro-batch ``index``, detached from the autograd graph."""
        self._states[index] = state.detach()

    def forget(self, when: torch.Tensor) -> None:
        """Resets all sequences if ``when``, bool (), is True: a non-finite loss spoils the states."""
        if when.device.type == "cpu":
            if when:
                self._states = [self._model.new_state(self._batch_size) for _ in self._states]
            return
        for state in self._states:
            for tensor in (*state.sums, state.positions):
                tensor.masked_fill_(when, 0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns copies of the states of all sequences: "sums.0" ..., (B, H, N, D) each, and "positions" (B,)."""
        state = SynapticState.concat(self._states)
        return {f"sums.{index}": sums for index, sums in enumerate(state.sums)} | {"positions": state.positions}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores the tensors of :meth:`tensors`, or the part of them that belongs to this process."""
        local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        sums = [local[f"sums.{index}"] for index in range(len(local) - 1)]
        whole = SynapticState(sums, local["positions"], 0)
        numbers = torch.arange(whole.batch_size).split(self._batch_size)
        self._states = [whole.filter(numbers_of_one) for numbers_of_one in numbers]
