"""A model's weights as the sparse kernels want them, made when they are first needed and again when they change."""

import weakref
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from bdh.model.linear import has_hooks, layer_modules, weights_obstacle

if TYPE_CHECKING:
    from bdh.model.modeling import BDHForCausalLM
    from bdh.ops.cpu.recurrence import Recurrence, Storage

_made: "weakref.WeakKeyDictionary[BDHForCausalLM, dict[Storage, tuple[tuple, Recurrence]]]"
_made = weakref.WeakKeyDictionary()


def kernel_obstacle(model: "BDHForCausalLM") -> str | None:
    """What keeps the kernels from running this model, whatever the machine; None where nothing does."""
    if (obstacle := weights_obstacle([*layer_modules(model), model.lm_head])) is not None:
        return obstacle
    if type(model.embed) is not nn.Embedding:
        return f"the embedding is {type(model.embed).__name__}, the kernels take plain nn.Embedding"
    if has_hooks(model.embed):
        return "the embedding has hooks"
    for module in [*layer_modules(model), model.lm_head, model.embed]:
        if module.weight.dtype not in (torch.float32, torch.bfloat16):
            return f"the weights are {module.weight.dtype}, the kernels take float32 and bfloat16"
    return None


def recurrence_of(model: "BDHForCausalLM", storage: "Storage" = "float32") -> "Recurrence":
    """The kernels over this model's weights, stored as ``storage``. Kept until the weights change."""
    from bdh.ops.cpu.recurrence import KernelWeights, Recurrence

    # Tensors made in inference mode have no version: of those only another memory is noticed.
    version = tuple((w.data_ptr(), -1 if w.is_inference() else w._version) for w in model.parameters())
    kept = _made.setdefault(model, {})
    if storage not in kept or kept[storage][0] != version:
        config = model.config
        weights = KernelWeights.of(
            embed=model.embed.weight,
            encoder=model.encoder.weight,
            encoder_v=[cast(nn.Linear, head).weight for head in model.encoder_v],
            decoder=model.decoder.weight,
            lm_head=model.lm_head.weight,
            rope_theta=config.rope_theta,
            eps=config.layer_norm_eps,
            num_passes=config.n_layer,
            storage=storage,
        )
        kept[storage] = (version, Recurrence(weights))
    return kept[storage][1]


def forget_kernels(model: nn.Module) -> None:
    """For whoever changes weights in memory that they keep, which :func:`recurrence_of` cannot see."""
    _made.pop(cast("BDHForCausalLM", model), None)
