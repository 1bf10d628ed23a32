"""Where the time of a training step goes, by wrapping what computes its parts, for some steps."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bdh.ops.blocks import train

_METHODS = {
    "fire": "x = relu(E v), and its rotation",
    "rotated": "the rotation of a kept x",
    "gated_mlp": "y = relu(Ev a), dropout(x * y) and the decoder",
    "gated_mlp_backward": "the same backwards",
    "fire_backward": "x backwards: gradients of E and v",
}
_FUNCTIONS = {
    "read_block": "attention: scores, what they and the state give",
    "learn_block": "attention: the state behind a block",
    "read_block_backward": "attention backwards",
}


REST = "the rest: embedding, norms, head, loss"


class ClockedStep(NamedTuple):
    """A step with clocks in it."""

    seconds: float
    parts: dict[str, float]
    """Seconds of each part, and of the rest: together those of the step."""


def median_step(step: Callable[[], object], device: str, rounds: int) -> ClockedStep:
    """The step of median length among so many: one step, so that its parts add up to it."""
    found = []
    for _ in range(rounds):
        with timed_parts(device) as parts:
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            seconds = time.perf_counter() - start
        found.append(ClockedStep(seconds, {**parts, REST: seconds - sum(parts.values())}))
    return sorted(found, key=lambda each: each.seconds)[(rounds - 1) // 2]


@contextmanager
def timed_parts(device: str) -> Iterator[dict[str, float]]:
    """Seconds of each part, from now on until the end of the block."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*arguments: Any, **others: Any) -> Any:
            _wait(device)
            start = time.perf_counter()
            try:
                return call(*arguments, **others)
            finally:
                _wait(device)
                seconds[part] += time.perf_counter() - start

        return run

    original = train.make_neurons

    def neurons(*arguments: Any, **others: Any) -> Any:
        made = original(*arguments, **others)
        for name, part in _METHODS.items():
            setattr(made, name, timed(getattr(made, name), part))
        return made

    originals = {name: getattr(train, name) for name in (*_FUNCTIONS, "make_neurons")}
    try:
        train.make_neurons = neurons
        for name, part in _FUNCTIONS.items():
            setattr(train, name, timed(originals[name], part))
        yield seconds
    finally:
        for name, original in originals.items():
            setattr(train, name, original)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
