"""Reads texts on, block by block and several side by side, for the logits of every token."""

from typing import Protocol

import torch

from bdh.generate.advance import Advancer, StepInput
from bdh.model import BDHForCausalLM


class Reader(Protocol):
    """Reads rows on from where the last call ended."""

    path: str
    """Which code runs: a line for people."""

    def begin(self, num_rows: int) -> None:
        """The rows of the next call start from nothing."""

    def read(self, tokens: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, T, V) of tokens (B, T); ``starts`` is bool (B, T), where documents start, or None."""


class ForwardReader:
    """Through ``model.forward``: on every device, in every precision and under autocast."""

    def __init__(self, model: BDHForCausalLM):
        self.path = f"forward on {model.device}"
        self._model = model
        self._state = model.new_state()

    def begin(self, num_rows: int) -> None:
        self._state = self._model.new_state(num_rows)

    def read(self, tokens: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        device = self._model.device
        starts = None if starts is None else starts.to(device)
        return self._model(tokens.to(device), document_starts=starts, past_key_values=self._state).logits


class StepReader:
    """Through an Advancer. A sequence whose document ends begins anew from an empty state."""

    def __init__(self, advancer: Advancer):
        self.path = advancer.description
        self._advancer = advancer
        self._states = [advancer.new_state()]

    def begin(self, num_rows: int) -> None:
        self._states += [self._advancer.new_state() for _ in range(num_rows - len(self._states))]
        self._states = self._states[:num_rows]
        for state in self._states:
            state.clear()

    def read(self, tokens: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        rows = tokens.tolist()
        cuts = [[0] if starts is None else [0, *starts[b].nonzero()[:, 0].tolist()] for b in range(len(rows))]
        pieces = [
            [(row[start:end], index > 0) for index, (start, end) in enumerate(zip(at, [*at[1:], None], strict=True))]
            for row, at in zip(rows, cuts, strict=True)
        ]
        found: list[list[torch.Tensor]] = [[] for _ in rows]
        while any(pieces):
            inputs, of_rows = [], []
            for index, queue in enumerate(pieces):
                if queue:
                    piece, is_new = queue.pop(0)
                    if is_new:
                        self._states[index].clear()
                    if piece:
                        inputs.append(StepInput(self._states[index], piece, "all"))
                        of_rows.append(index)
            for index, logits in zip(of_rows, self._advancer.advance(inputs), strict=True):
                assert logits is not None
                found[index].append(logits)
        return torch.stack([torch.cat(parts) for parts in found])


def reader_of(model: BDHForCausalLM, window: int | None = None) -> Reader:
    """The fastest reader for a model; only an Advancer attends within a window.

    Raises:
        ValueError: ``window`` is no whole number of at least 1.
    """
    uses_kernels = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    if window is None and not uses_kernels:
        return ForwardReader(model)
    advancer = Advancer(model, window=window, path="auto" if uses_kernels else "torch")
    if window is None and advancer.backend == "eager":
        return ForwardReader(model)  # it reads rows side by side too
    return StepReader(advancer)
