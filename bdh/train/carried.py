"""The states of the sequences, carried from one step to the next."""

import torch
from torch.distributed.tensor import DTensor

from bdh.model import BDHForCausalLM, SynapticState


class CarriedState:
    """The states of this process's sequences between two steps, one for each micro-batch.

    A step continues from them; gradients end at its first token (truncated backpropagation through time, a block long).
    """

    def __init__(self, model: BDHForCausalLM, num_micro_batches: int, batch_size: int):
        self._model = model
        self._batch_size = batch_size
        self._states = [model.new_state(batch_size) for _ in range(num_micro_batches)]

    def before(self, index: int) -> SynapticState:
        """What micro-batch ``index`` of a step continues from. ``forward`` leaves it alone until :meth:`keep`."""
        state = self._states[index]
        return SynapticState(list(state.sums), state.positions, state.num_columns)

    def keep(self, index: int, state: SynapticState) -> None:
        """Takes over the state after micro-batch ``index``, without its graph."""
        self._states[index] = state.detach()

    def forget(self, when: torch.Tensor) -> None:
        """Starts all sequences afresh if ``when``, bool (): the state after a loss that is not finite would spoil all steps."""
        if when.device.type == "cpu":
            if when:
                self._states = [self._model.new_state(self._batch_size) for _ in self._states]
            return
        for state in self._states:
            for tensor in (*state.sums, state.positions):
                tensor.masked_fill_(when, 0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all sequences in one: "sums.0" ..., (B, H, N, D) of each layer step, and "positions" (B,)."""
        state = SynapticState.concat(self._states)
        return {f"sums.{index}": sums for index, sums in enumerate(state.sums)} | {"positions": state.positions}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what :meth:`tensors` gave, or the share of it that belongs to this process."""
        local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        sums = [local[f"sums.{index}"] for index in range(len(local) - 1)]
        whole = SynapticState(sums, local["positions"], 0)
        numbers = torch.arange(whole.batch_size).split(self._batch_size)
        self._states = [whole.filter(numbers_of_one) for numbers_of_one in numbers]
