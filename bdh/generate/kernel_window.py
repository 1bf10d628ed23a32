"""Steps with a window by the sparse kernels; apart from those by torch, which need no numba."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from bdh.generate.kernel_stepper import KernelStepper
from bdh.generate.stepper import SequenceState, Storage
from bdh.generate.window import check_window, new_state, state_bytes
from bdh.model.kernels import recurrence_of
from bdh.model.modeling import BDHForCausalLM
from bdh.ops.cpu.recurrence import Recurrence, Watch
from bdh.ops.cpu.window import WindowedRecurrence
from bdh.ops.window import Ring


class WindowKernelStepper(KernelStepper):
    """The kernels of :mod:`bdh.ops.cpu.window`: the same bits however tokens are fed.

    Args:
        window: W: a prediction attends from the last W tokens, of which each sees the W - 1 before it.

    Raises:
        ValueError: the window is no whole number of at least 1.
    """

    def __init__(self, model: BDHForCausalLM, window: int, *, weights: Storage = "float32", reason: str = "asked for"):
        super().__init__(model, weights=weights, reason=reason)
        self.window = check_window(window)
        self._half_lives = self._settling_tokens = None  # rings need no factors: what fades is a score, not a sum
        self._made: WindowedRecurrence | None = None

    @property
    def path(self) -> str:
        return (
            f"sparse kernels on the cpu, {torch.get_num_threads()} threads, weights {self._weights}, "
            f"a window of {self.window} tokens ({self._reason})"
        )

    def new_state(self) -> SequenceState:
        return new_state(self.model, self.window)

    @property
    def state_bytes(self) -> int:
        return state_bytes(self.model, self.window)

    def _recurrence(self, *, is_prompt: bool) -> WindowedRecurrence:
        # Other ones where the model's have changed.
        weights = recurrence_of(self.model, self._weights, is_prompt=is_prompt).weights
        if self._made is None or self._made.weights is not weights:
            self._made = WindowedRecurrence(weights, self.window, half_lives=self.model.config.half_lives)
        return self._made

    def _advance(
        self,
        recurrence: Recurrence,
        states: Sequence[SequenceState],
        tokens: np.ndarray,
        positions: np.ndarray,
        starts: np.ndarray,
        before_writing: Callable[[], None],
        watch: Watch | None,
    ) -> np.ndarray:
        assert isinstance(recurrence, WindowedRecurrence)
        return recurrence.read_window(
            tokens, positions, starts, [Ring(**state.tensors) for state in states], watch, before_writing
        )
