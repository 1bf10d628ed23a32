"""The matrices that E, Ev and Dec multiply with: the weights of plain linear modules, with the adapters of ``peft`` added."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bdh.model.private_api import has_hooks
from bdh.ops.backends import LayerWeights


def layer_modules(model: Any) -> list[nn.Module]:
    """E, the heads of Ev, and Dec."""
    return [model.encoder, *model.encoder_v, model.decoder]


def layer_weights(model: Any, dtype: torch.dtype) -> LayerWeights:
    """The matrices of the layer, with adapters folded in; gradients flow to what they are made of.

    Only where :func:`product_obstacle` has found none.
    """
    encoder, *encoder_v, decoder = (_product_weight(module).to(dtype) for module in layer_modules(model))
    return LayerWeights(encoder, tuple(encoder_v), decoder.t().contiguous())


def weights_obstacle(modules: Sequence[nn.Module]) -> str | None:
    """Why the modules cannot be computed by their weights alone; None where they are plain ``nn.Linear``."""
    for module in modules:
        if type(module) is not nn.Linear:  # one with a parametrization has a class of its own
            return f"a layer is {type(module).__module__}.{type(module).__name__}, not a plain nn.Linear"
        if module.bias is not None:
            return "a layer has a bias"
        if has_hooks(module):
            return "a layer has hooks"
        if "forward" in module.__dict__:  # as accelerate does it
            return "the forward of a layer has been replaced"
        weight = module.weight
        if type(weight) is not nn.Parameter:
            return f"a weight is {type(weight).__name__}, not a plain nn.Parameter"
        if type(weight.data) is not torch.Tensor:
            return f"a weight is {type(weight.data).__name__}, not a plain tensor"
        if weight.is_meta:
            return "a weight is on meta"
    return None


def product_obstacle(modules: Sequence[nn.Module]) -> str | None:
    """Why the modules are no products with the matrices of :func:`layer_weights`; None where they are."""
    for module in modules:
        obstacle = _adapters_obstacle(module) if _has_adapters(module) else weights_obstacle([module])
        if obstacle is not None:
            return obstacle
    return None


def adapters_in_effect(model: nn.Module) -> tuple[object, ...]:
    """Which adapters of ``peft`` add to which layers now, and how much: equal while that stays the same."""
    return tuple(
        (name, tuple(_active(module)), tuple(module.merged_adapters), tuple(sorted(module.scaling.items())))
        for name, module in model.named_modules()
        if _has_adapters(module)
    )


def _product_weight(module: Any) -> torch.Tensor:
    """The matrix (out, in) that a module multiplies with: its weight, plus the product of each adapter's factors."""
    if not _has_adapters(module):
        return module.weight
    weight: torch.Tensor = module.base_layer.weight
    for name in _active(module):
        # As the merged weights of an export are; peft's own order of the products keeps one of (tokens, r) instead.
        weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight


def _has_adapters(module: Any) -> bool:
    """Whether it is a linear layer with LoRA of ``peft``, which need not be installed."""
    return type(module).__name__ == "Linear" and type(module).__module__ == "peft.tuners.lora.layer"


def _adapters_obstacle(module: Any) -> str | None:
    if has_hooks(module) or "forward" in module.__dict__:
        return "a layer with adapters has hooks"
    if module.merged and module.disable_adapters:
        return "adapters are merged, and disabled"
    for name in _active(module):
        factors = [module.lora_A[name], module.lora_B[name]]
        if name in module.lora_variant:
            return "adapters are of another kind than LoRA"
        if module.training and getattr(module.lora_dropout[name], "p", 0) > 0:
            return "adapters have dropout"
        if (obstacle := weights_obstacle(factors)) is not None:
            return f"an adapter is not two plain products: {obstacle}"
    return weights_obstacle([module.base_layer])


def _active(module: Any) -> list[str]:
    """The adapters that add to the weight now."""
    if module.merged or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]
