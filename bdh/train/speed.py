"""How fast a run is, and what it takes of the machine: tokens per second, where the time goes, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bdh.model import BDHConfig
from bdh.train.runtime import Runtime

_MEASURING_SECONDS = 0.04
_LARGEST_SIZE = 8192


class StepClock:
    """Times the training steps, without the pauses between them for evaluation, samples and checkpoints."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._tokens = 0
        self._rate = 0.0
        self._steps = 0
        self._seconds = self._data_seconds = 0.0

    def count(self, num_tokens: int, data_seconds: float) -> None:
        """A step has ended, of which so much time went into waiting for data."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rate = num_tokens / seconds
        # The first steps compile and warm up; later ones count for about the last twenty.
        self._rate = rate if self._tokens < 5 * num_tokens else 0.95 * self._rate + 0.05 * rate
        self._tokens += num_tokens
        self._steps += 1
        self._seconds += seconds
        self._data_seconds += data_seconds
        self._start = now

    def tokens_per_second(self) -> float:
        """Over about the last twenty steps."""
        return self._rate

    def take_means(self) -> dict[str, float]:
        """Seconds of a step, and of waiting for its data, in the mean over the steps since the last call."""
        steps = max(1, self._steps)
        means = {"step_seconds": self._seconds / steps, "data_seconds": self._data_seconds / steps}
        self._steps, self._seconds, self._data_seconds = 0, 0.0, 0.0
        return means

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


def training_flops_per_token(config: BDHConfig, block_size: int) -> float:
    """Floating-point operations that a training step needs for a token, at the least.

    A multiplication and an addition count as two. Counted are the matrix products of the three linear layers of
    each pass, of the head, and of the attention in its cheaper form: the lower half of the T x T scores, or the
    reads and updates of the state. The backward pass takes twice the forward pass. Left out are element-wise
    work, recomputation, and what sparsity would save.
    """
    D, V, T = config.n_embd, config.vocab_size, block_size
    neurons = config.n_head * config.neurons_per_head
    linear = 3 * 2 * D * neurons
    attention = min(T * (neurons + config.n_head * D), 2 * 2 * D * neurons)
    return 3.0 * (config.n_layer * (linear + attention) + 2 * D * V)


def matmul_peak(runtime: Runtime) -> float:
    """Operations per second of a large square matrix product on this device in this dtype, measured in about 0.1 s."""
    size, best = 256, 0.0
    while True:
        factor = torch.ones(size, size, device=runtime.device, dtype=runtime.dtype)
        # The fastest of several: the first may load libraries, and any may be interrupted.
        times: list[float] = []
        while len(times) < 3 or sum(times) < _MEASURING_SECONDS / 4:
            started = time.perf_counter()
            factor @ factor
            wait_for_device(runtime.device)
            times.append(time.perf_counter() - started)
        best = max(best, 2 * size**3 / min(times))
        if min(times) > _MEASURING_SECONDS / 8 or size >= _LARGEST_SIZE:
            return best
        size *= 2


def wait_for_device(device: torch.device) -> None:
    """Waits until what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
