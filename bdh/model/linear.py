"""When a linear module is its weight alone, and when it is that with the adapters of ``peft`` added to it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from bdh.model.backbone import BDHPreTrainedModel


def layer_modules(model: "BDHPreTrainedModel") -> list[nn.Module]:
    """The modules of the layer."""
    return [model.encoder, *model.encoder_v, model.decoder]


def weights_obstacle(modules: list[nn.Module]) -> str | None:
    """What keeps the modules from being computed by their weights alone; None where they are plain ``nn.Linear``."""
    for module in modules:
        if type(module) is not nn.Linear or nn.utils.parametrize.is_parametrized(module):
            return f"a layer is {type(module).__module__}.{type(module).__name__}, not a plain nn.Linear"
        if module.bias is not None:
            return "a layer has a bias"
        if has_hooks(module):
            return "a layer has hooks"
        if "forward" in module.__dict__:  # as accelerate does it
            return "the forward of a layer has been replaced"
        if type(module.weight) is not nn.Parameter:
            return f"a weight is {type(module.weight).__name__}, not a plain nn.Parameter"
        if type(module.weight.data) is not torch.Tensor:
            return f"a weight is {type(module.weight.data).__name__}, not a plain tensor"
        if module.weight.device.type == "meta":
            return "a weight is on meta"
    return None


def product_obstacle(modules: list[nn.Module]) -> str | None:
    """What keeps the modules from being products with the matrices of :func:`product_weight`; None where nothing does."""
    for module in modules:
        obstacle = _adapters_obstacle(module) if _has_adapters(module) else weights_obstacle([module])
        if obstacle is not None:
            return obstacle
    return None


def product_weight(module: Any) -> torch.Tensor:
    """The matrix (out, in) that a module multiplies with: its weight, plus the product of each adapter's factors.

    Gradients flow to what it is made of. Only where :func:`product_obstacle` has found none.
    """
    if not _has_adapters(module):
        return module.weight
    weight: torch.Tensor = module.base_layer.weight
    for name in _active(module):
        # As the merged weights of an export are; peft's own order of the products keeps one of (tokens, r) instead.
        weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight


def adapters_in_effect(model: nn.Module) -> tuple[object, ...]:
    """Which adapters of ``peft`` add to which layers now, and how much: equal while that stays the same."""
    return tuple(
        (name, tuple(_active(module)), tuple(module.merged_adapters), tuple(sorted(module.scaling.items())))
        for name, module in model.named_modules()
        if _has_adapters(module)
    )


def has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


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
