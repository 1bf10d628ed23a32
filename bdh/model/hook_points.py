"""The points of a layer step where PyTorch's forward hooks can read or replace intermediate values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bdh.ops.eager import HOOK_POINTS


class HookPoints(nn.Module):
    """Identity modules to which forward hooks can be attached, one for each of :data:`bdh.ops.eager.HOOK_POINTS`.

    A hook receives the value that is computed at its point, and can replace it by returning another one. When hooks are
    attached, the eager backend computes the layer and calls the module once for each of the L layer steps of a forward
    pass. A module without hooks is not called and costs nothing. The modules have no parameters.

    ========  ==================  ==========================================================
    module    shape               value
    ========  ==================  ==========================================================
    x         (B, T, H * N)       the neurons' activations on the residual stream
    q         (B, H, T, N)        x with rotary positions: the queries and the keys
    a         (B, H, T, D)        the output of attention, before its layer norm
    y         (B, T, H * N)       the neurons' activations on the normalized attention output
    z         (B, T, H * N)       x * y, before dropout
    v         (B, T, D)           the residual stream after the layer step
    ========  ==================  ==========================================================

    The engine reads tokens of several sequences together: there, (B, T) is (R,), the tokens of all sequences.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in HOOK_POINTS:
            self.add_module(name, nn.Identity())


@contextmanager
def watching(model: Any, functions: Mapping[str, Callable[[torch.Tensor], object]]) -> Iterator[None]:
    """A context in which functions are called with the values of a model's hook points.

    Args:
        model: a model with ``hook_points``.
        functions: by the name of the hook point; what a function returns is ignored.
    """
    with ExitStack() as hooks:
        for name, function in functions.items():

            def hook(point: nn.Module, inputs: Any, value: torch.Tensor, function: Any = function) -> None:
                function(value)

            hooks.callback(getattr(model.hook_points, name).register_forward_hook(hook).remove)
        yield
