"""Places in a layer step at which PyTorch's forward hooks see values, and may replace them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bdh.ops.eager import HOOK_POINTS


class HookPoints(nn.Module):
    """A module for each of :data:`bdh.ops.eager.HOOK_POINTS`, which returns what it is given unless a hook replaces it.

    Where hooks are attached, the eager backend computes the layer and calls the module L times in a forward pass, once for each
    layer step. A module without hooks is not called, and costs nothing. None has parameters.

    ========  ==================  ==========================================================
    module    shape               value
    ========  ==================  ==========================================================
    x         (B, T, H * N)       which neurons fire on the residual stream
    q         (B, H, T, N)        x, rotated: queries and keys
    a         (B, H, T, D)        what attention reads, before its layer norm
    y         (B, T, H * N)       which neurons fire on what attention reads
    z         (B, T, H * N)       x * y, before dropout
    v         (B, T, D)           the residual stream after the layer step
    ========  ==================  ==========================================================

    In the engine, which reads tokens of any sequences together, (B, T) are (R,): the tokens of all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in HOOK_POINTS:
            self.add_module(name, nn.Identity())


@contextmanager
def watching(model: Any, functions: Mapping[str, Callable[[torch.Tensor], object]]) -> Iterator[None]:
    """Within it, functions are called with what a model computes at the hook points of their names."""
    with ExitStack() as hooks:
        for name, function in functions.items():

            def hook(point: nn.Module, inputs: Any, value: torch.Tensor, function: Any = function) -> None:
                function(value)

            hooks.callback(getattr(model.hook_points, name).register_forward_hook(hook).remove)
        yield
