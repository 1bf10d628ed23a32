"""Quantization-aware training: models that compute with rounded weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bdh.model.fake_quantized import FakeQuantizedLinear
from bdh.model.network import linear_of
from bdh.model.quantization import Quantization, QuantizedWeights
from bdh.model.weights import forget_kernels


def fake_rounding(model: Any, weights: QuantizedWeights) -> None:
    """Makes a model, in place, compute its layer with weights rounded to a format. The weights do not change."""
    for name, weight_format in Quantization(weights).formats(model.config.n_head).items():
        weight = model.get_submodule(name).weight
        model.set_submodule(name, FakeQuantizedLinear(weight, weight_format, by_input=name == "decoder"))


@contextmanager
def rounded_once(model: Any, *, rounds: bool = True) -> Iterator[None]:
    """A context in which weights are rounded once, rather than in each forward pass. They must not change within it.

    Args:
        model: the model.
        rounds: whether the layer computes with rounded weights at all.
    """
    modules = [module for module in model.modules() if isinstance(module, FakeQuantizedLinear)]
    try:
        for module in modules:
            module.is_rounded, module.kept = rounds, module.rounded() if rounds else None
        yield
    finally:
        for module in modules:
            module.is_rounded, module.kept = True, None


@contextmanager
def rounded_in_place(model: Any) -> Iterator[None]:
    """A context in which the model has the rounded weights as plain weights, which must not be trained."""
    parents = (model, model.encoder_v)
    found = [(parent, *child) for parent in parents for child in parent.named_children()]
    rounded = [(parent, name, module) for parent, name, module in found if isinstance(module, FakeQuantizedLinear)]
    try:
        for parent, name, module in rounded:
            setattr(parent, name, linear_of(module.rounded()))
        yield
    finally:
        for parent, name, module in rounded:
            setattr(parent, name, module)
        if rounded:
            forget_kernels(model)  # these weights no longer exist
