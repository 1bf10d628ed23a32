"""The registry of backends that compute the layer: what each requires, and how one is chosen, with the reason.

A backend offers one or both of two operations:

    train      reads (B, T, D) tokens of a batch; differentiable
    advance    reads tokens of many sequences and writes their states in place; no gradients

An ``advance`` allocates all memory that it needs before it writes the first byte of a state, so that an earlier error
leaves the states unchanged. The caller marks states as torn just before they are written. An ``advance`` returns v (R,
D) after the last layer step, and calls ``on_layer_step`` with x (R, H*N) of each layer step. The method of
:class:`bdh.generate.advance.Advancer` that calls it commits each input without an error, with float32 logits on the
CPU.

Settings and banners have their own names for the backends, one set for each operation (``words``).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from bdh.ops import LAYER_PATHS, STATE_FORMATS, STEP_PATHS, WEIGHT_FORMATS, StateFormat, WeightFormat
from bdh.ops.cpu.runtime import unavailable_reason

Operation = Literal["train", "advance"]
BackendName = Literal["cpu", "blocks", "eager"]
STATE_DTYPES: dict[StateFormat, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int16": torch.int16,
}


class LayerWeights(NamedTuple):
    """E, Ev and Dec as matrices with one row for each neuron, in the dtype of the computation."""

    encoder: torch.Tensor  # (H * N, D)
    encoder_v: tuple[torch.Tensor, ...]  # H of (N, D)
    decoder: torch.Tensor  # (H * N, D): the transpose of the module's weight


class Work(NamedTuple):
    """A description of what a backend is to compute."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    """The dtype of the matrix products in ``train``, and of the weights in ``advance``."""
    obstacle: str | None = None
    """Why E, Ev and Dec cannot be used as plain matrices (hooks, quantized weights, a transform of torch.func); None if
    they can. With an obstacle, only a backend that calls them as modules can be used."""
    attention_form: str = "auto"
    at_once: int | None = None
    """The elements (B, T, N) of a training step if the eager backend may compute it at once; None if memory does
    not suffice, or if blocks are required."""


@dataclass(frozen=True)
class Backend:
    """The capabilities and requirements of one backend."""

    name: BackendName
    words: Mapping[Operation, str]
    """The operations that it offers, each with the backend's name in the settings of that operation."""
    calls_modules: bool = False
    """Whether it calls E, Ev and Dec as modules of any kind, rather than multiplying with their weights."""
    device: str | None = None
    """The only type of device that it runs on; None for any."""
    dtypes: Mapping[Operation, frozenset[torch.dtype]] = field(default_factory=dict)
    """The dtypes that an operation supports; one that is not listed supports all."""
    needs_numba: bool = False
    weights: frozenset[WeightFormat] = frozenset({"float32"})
    """The weight formats that ``advance`` supports."""
    states: frozenset[StateFormat] = frozenset({"float32"})
    """The state formats that ``advance`` supports. A window is always in float32."""

    def obstacle(self, operation: Operation, work: Work) -> str | None:
        """Returns why the backend cannot do this work on this machine; None if it can."""
        if self.calls_modules:
            return None
        if work.obstacle is not None:
            return work.obstacle
        if operation == "train" and work.attention_form == "recurrent":
            return "attention_form is recurrent"
        if self.device is not None and work.device.type != self.device:
            return f"the model is on {work.device}, the {self.words[operation]} run on the {self.device}"
        dtypes = self.dtypes.get(operation)
        if dtypes is not None and work.dtype not in dtypes:
            return f"they compute in {_names(dtypes)}, not in {_names(frozenset({work.dtype}))}"
        return unavailable_reason() if self.needs_numba else None


@cache
def _names(dtypes: frozenset[torch.dtype], between: str = " and ") -> str:
    return between.join(sorted((str(dtype).removeprefix("torch.") for dtype in dtypes), reverse=True))


EAGER = Backend("eager", words={"train": "plain", "advance": "torch"}, calls_modules=True)
BLOCKS = Backend("blocks", words={"train": "torch"})
CPU = Backend(
    "cpu",
    words={"train": "kernels", "advance": "kernels"},
    device="cpu",
    dtypes={
        "train": frozenset({torch.float32}),
        "advance": frozenset({torch.float32, torch.bfloat16}),
    },
    needs_numba=True,
    weights=frozenset(WEIGHT_FORMATS),
    states=frozenset(STATE_FORMATS),
)
BACKENDS = (CPU, BLOCKS, EAGER)
"""The backends that can be chosen, in order of preference. ``bdh/ops/naive.py`` is only for tests and benchmarks.

On a CPU the kernels are faster than PyTorch's dense operations for any number of sequences and at any density: they
sweep once over the state of each sequence, where PyTorch does so three times, and they multiply E with all tokens of a
step in tiles. Measured at the least favourable density, 50 % (untrained weights), in ms per token, kernels / dense, on
2 CPU cores:

==========================  ===========  ===========  ===========  ===========
model                       1 sequence   8            32           128
==========================  ===========  ===========  ===========  ===========
D 256, H 4, N 8192, L 6     14.9 / 36.2  9.5 / 22.5   -            -
D 128, H 4, N 1024, L 4     0.65 / 1.79  0.31 / 0.72  0.45 / 0.72  0.43 / 0.67
D 64,  H 4, N 512,  L 4     0.26 / 0.94  0.12 / 0.34  0.11 / 0.27  0.14 / 0.25
D 16,  H 2, N 64,   L 2     0.11 / 0.34  0.03 / 0.09  0.01 / 0.06  0.01 / 0.05
==========================  ===========  ===========  ===========  ===========
"""


# On a GPU the eager backend is faster up to this many elements (B, T, N), since the blocks start their kernels head by
# head, and launching them then takes longer than running them. On an H200, D 128, N 1,024, L 4 with 2,048 tokens (2^21
# elements) takes 13 ms, and 52 ms in blocks; with 2^27 elements (D 256, N 8,192, L 6) the blocks are far ahead.
_SMALL_ON_GPU = 2**24


class Choice(NamedTuple):
    """The chosen backend, and the reason."""

    backend: Backend
    reason: str


class BackendError(ValueError):
    """The requested backend does not exist, or cannot do the work on this machine."""

    def __init__(self, fault: str):
        super().__init__(f"path {fault}")
        self.fault = fault


def choose_backend(operation: Operation, requested: str, work: Work) -> Choice:
    """Chooses the backend for some work.

    Args:
        operation: "train" or "advance".
        requested: one of :data:`LAYER_PATHS` or :data:`STEP_PATHS`; "auto" chooses the first of :data:`BACKENDS` that
            can do the work.
        work: what is to be computed.

    Raises:
        BackendError: ``requested`` is unknown, or cannot do this work; the message states why.
    """
    offered = [backend for backend in BACKENDS if operation in backend.words]
    allowed = LAYER_PATHS if operation == "train" else STEP_PATHS
    if requested not in allowed:
        raise BackendError(f"is {requested!r}: must be one of {', '.join(allowed)}")
    if requested == "auto":
        able = next(each for each in offered if each.obstacle(operation, work) is None)
        if able is BLOCKS and work.device.type == "cuda" and (work.at_once or math.inf) <= _SMALL_ON_GPU:
            return Choice(EAGER, f"on {work.device}, for which a step is small")
        return Choice(able, _reason(operation, work, able, offered[0]))
    backend = next(each for each in offered if each.words[operation] == requested)
    if (obstacle := backend.obstacle(operation, work)) is not None:
        # The alternatives are never empty: the last backend, eager, runs everywhere.
        *others, last = [each.words[operation] for each in offered[offered.index(backend) + 1 :]]
        raise BackendError(
            f"is {requested!r}, which cannot run here: {obstacle}; must be {', '.join(['auto', *others])} or {last}"
        )
    return Choice(backend, "asked for")


def _reason(operation: Operation, work: Work, chosen: Backend, preferred: Backend) -> str:
    """Returns why "auto" chose this backend: what it is good for, or why the preferred one was not possible."""
    if chosen is preferred:
        dtypes = chosen.dtypes.get(operation, frozenset({work.dtype}))
        return f"{_names(dtypes, ' or ')} on the {work.device.type}"
    if chosen.calls_modules:
        return preferred.obstacle(operation, work) or "asked for"
    if chosen is BLOCKS and work.device.type == "cuda":
        parts = "compiled" if compiles_parts(work.device) else "not compiled, as Triton is missing"
        return f"on {work.device}, element-wise parts {parts}"
    return f"no {preferred.words[operation]}: {preferred.obstacle(operation, work)}"


def compiles_parts(device: torch.device) -> bool:
    """Whether the element-wise parts of blocks are compiled on a device: on a GPU, if PyTorch has Triton."""
    return device.type == "cuda" and find_spec("triton") is not None
