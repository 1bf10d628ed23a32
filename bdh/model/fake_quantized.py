"""A linear module for quantization-aware training: it computes with the rounded weight and trains the exact one."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from bdh.ops import QuantizedFormat
from bdh.ops.formats import rounded_with, scales_of

# How many weights to round at once: on the CPU so many that the intermediate values stay in the cache, elsewhere
# enough to keep a GPU busy.
_AT_ONCE = {"cpu": 2**18}
_AT_ONCE_ELSEWHERE = 2**24


class FakeQuantizedLinear(nn.Linear):
    """A ``Linear`` without bias that multiplies with the weight as a :class:`QuantizedLinear` would round it.

    It is used for quantization-aware training. The gradient of the rounded weight is applied to the weight itself (the
    straight-through estimator, arXiv 1308.3432), so that the optimizer updates an unrounded weight.

    The scales are computed from the current weights, as an export would, so there is nothing to store beside the
    weights. docs/training.md compares the losses: they are about the same with scales that are kept for some steps, and
    higher with learned scales.

    Args:
        weight: (out_features, in_features).
        weight_format: the format to round to.
        by_input: as for :class:`QuantizedLinear`.
    """

    def __init__(self, weight: nn.Parameter, weight_format: QuantizedFormat, *, by_input: bool = False):
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)
        self.weight_format: QuantizedFormat = weight_format
        self.by_input = by_input
        self.kept: torch.Tensor | None = None
        """A cached rounded weight, set by the caller while the weight does not change; None to round in each call."""
        self.is_rounded = True
        """Whether to compute with the rounded weight. If False, the module is an ordinary ``Linear``."""

    @torch.no_grad()
    def rounded(self) -> torch.Tensor:
        """Returns the current weight rounded to the format, in its own dtype. Does not check for non-finite values."""
        rows = self.weight.t() if self.by_input else self.weight
        found = torch.empty(rows.shape, dtype=self.weight.dtype, device=self.weight.device)
        count = max(1, _AT_ONCE.get(found.device.type, _AT_ONCE_ELSEWHERE) // rows.shape[1])
        for some, target in zip(rows.split(count), found.split(count), strict=True):
            some = some.float()
            target.copy_(rounded_with(some, scales_of(some, self.weight_format), self.weight_format).dequantized())
        return found.t() if self.by_input else found

    def product_weight(self) -> torch.Tensor:
        """Returns the matrix (out_features, in_features) to multiply with. Gradients flow to the weight."""
        if not self.is_rounded:
            return self.weight
        found: torch.Tensor = _StraightThrough.apply(self.weight, self.rounded() if self.kept is None else self.kept)
        return found

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.product_weight())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weight_format} in products"


class _StraightThrough(torch.autograd.Function):
    """Returns the second matrix in the forward pass, and passes its gradient to the first in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
