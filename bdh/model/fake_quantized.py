"""A module whose weight is rounded in its products, and trained."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from bdh.ops import QuantizedFormat
from bdh.ops.formats import rounded_with, scales_of

# Weights rounded together: as many as a CPU's cache holds with what is computed of them, and as keep a GPU busy.
_AT_ONCE = {"cpu": 2**18}
_AT_ONCE_ELSEWHERE = 2**24


class FakeQuantizedLinear(nn.Linear):
    """A ``Linear`` without a bias that computes with the weight that a :class:`QuantizedLinear` of it would have.

    It is what a format is trained with: the gradient of the rounded weight is taken for that of the weight itself (the
    straight-through estimator, arXiv 1308.3432), so that an optimizer moves numbers that are not rounded.

    Scales are those that the export finds for the weights of the moment, so there is nothing beside the weights to keep.
    docs/training.md has the losses with scales that are kept for a while, about the same, or learned, higher.

    Args:
        weight: (out_features, in_features).
        by_input: as of :class:`QuantizedLinear`.
    """

    def __init__(self, weight: nn.Parameter, weight_format: QuantizedFormat, *, by_input: bool = False):
        nn.Module.__init__(self)  # that of Linear would make a weight
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)
        self.weight_format: QuantizedFormat = weight_format
        self.by_input = by_input
        self.kept: torch.Tensor | None = None
        """The rounded weight, for as long as somebody promises that the weight does not change."""
        self.is_rounded = True
        """Whether it computes with the rounded weight; else it is any ``Linear``."""

    @torch.no_grad()
    def rounded(self) -> torch.Tensor:
        """The weight as its format stores it, in the weight's dtype, computed anew. What is not finite is not noticed."""
        rows = self.weight.t() if self.by_input else self.weight
        found = torch.empty(rows.shape, dtype=self.weight.dtype, device=self.weight.device)
        count = max(1, _AT_ONCE.get(found.device.type, _AT_ONCE_ELSEWHERE) // rows.shape[1])
        for some, target in zip(rows.split(count), found.split(count), strict=True):
            some = some.float()
            target.copy_(rounded_with(some, scales_of(some, self.weight_format), self.weight_format).dequantized())
        return found.t() if self.by_input else found

    def product_weight(self) -> torch.Tensor:
        """The matrix (out_features, in_features) that inputs are multiplied with; gradients flow to the weight."""
        if not self.is_rounded:
            return self.weight
        found: torch.Tensor = _StraightThrough.apply(self.weight, self.rounded() if self.kept is None else self.kept)
        return found

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.product_weight())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weight_format} in products"


class _StraightThrough(torch.autograd.Function):
    """The second matrix, whose gradient goes to the first."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
