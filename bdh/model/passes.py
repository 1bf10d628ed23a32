"""The passes of one forward, computed in blocks by :mod:`bdh.ops.blocks`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from bdh.model.configuration import BDHConfig
from bdh.model.linear import layer_modules, product_obstacle, product_weight
from bdh.ops.attention import DecayMask, sum_dtype
from bdh.ops.blocks.dropout import make_dropout
from bdh.ops.blocks.function import PassSpec, wide_pass
from bdh.ops.blocks.neurons import LayerWeights
from bdh.ops.blocks.plan import LayerOptions, LayerPlan, LayerShape, plan_layer
from bdh.ops.blocks.rotation import make_rotation
from bdh.ops.eager import layer_norm

if TYPE_CHECKING:
    from bdh.model.backbone import BDHPreTrainedModel

_ALL_PLAIN = LayerOptions(path="plain")


class Passes(Protocol):
    """What takes v through the layer."""

    def run(self, index: int, v: torch.Tensor, sums: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pass number ``index``: (B, T, D) to (B, T, D), and the new sums (B, H, N, D) where they are kept."""


def plan_for(model: "BDHPreTrainedModel", B: int, T: int, form: str, *, for_loss: bool = True) -> LayerPlan | None:
    """How ``model`` computes its passes over (B, T) tokens, under the autocast of this moment.

    None for the plain forms with nothing to decide. They read prompts, which are neither trained nor evaluated.

    Raises:
        LayerOptionError: ``model.layer_options`` ask for what is not there.
    """
    # Here, where torch.compile still follows: the plain forms are compiled as one graph.
    if not (for_loss or torch.is_grad_enabled()):
        return None
    options = model.layer_options
    if options == _ALL_PLAIN and not model.gradient_checkpointing:
        return None
    return _plan(model, B, T, form)


@torch.compiler.disable
def _plan(model: "BDHPreTrainedModel", B: int, T: int, form: str) -> LayerPlan:
    config, options = model.config, model.layer_options
    shape = layer_shape(config, B, T, _dtype(model), model.embed.weight.device)
    shape = shape._replace(
        has_dropout=model.training and shape.has_dropout,
        for_training=torch.is_grad_enabled(),
    )
    if model.gradient_checkpointing and model.training and options.recompute == "auto":
        options = replace(options, recompute="pass")
    obstacle = _obstacle(model)
    # What is evaluated may be fewer and shorter rows than those of a training step, and so may be the last of an epoch.
    rows, tokens = options.rows_per_block, options.tokens_per_block
    options = replace(options, rows_per_block=rows and min(rows, B), tokens_per_block=tokens and min(tokens, T))
    if obstacle is not None and not torch.is_grad_enabled():  # who measures has put hooks on the modules
        options = replace(options, path="auto")
    return plan_layer(shape, options, form=form, chunk_size=config.chunk_size, obstacle=obstacle)


def layer_shape(config: BDHConfig, B: int, T: int, dtype: torch.dtype, device: torch.device) -> LayerShape:
    """What a training step over (B, T) tokens has to compute, with matrix products in ``dtype``."""
    return LayerShape(
        B=B,
        T=T,
        D=config.n_embd,
        H=config.n_head,
        N=config.neurons_per_head,
        L=config.n_layer,
        dtype=dtype,
        device=device,
        has_dropout=config.dropout > 0,
    )


@dataclass(frozen=True)
class BlockPasses:
    """What all passes of a forward share."""

    eps: float
    dtype: torch.dtype
    weights: LayerWeights
    spec: PassSpec
    mask: torch.Tensor | None
    dropout: float
    seeds: torch.Tensor  # int64 (L,)
    kept_passes: int

    @classmethod
    @torch.compiler.disable
    def of(
        cls,
        model: "BDHPreTrainedModel",
        plan: LayerPlan,
        positions: torch.Tensor,
        shape: tuple[int, int],
        *,
        mask: torch.Tensor | None,
        decay_mask: DecayMask | None,
        keep_state: bool,
    ) -> "BlockPasses":
        """
        Args:
            positions: int64 (1 or B, T).
            shape: B and T.
            mask: bool (B, T): False is padding.
        """
        config, dtype = model.config, _dtype(model)
        device = positions.device
        encoder, *encoder_v, decoder = (product_weight(module).to(dtype) for module in layer_modules(model))
        rotation = make_rotation(positions, config.neurons_per_head, config.rope_theta, dtype)
        rate = config.dropout if model.training else 0.0
        seeds = torch.zeros(config.n_layer, dtype=torch.int64, device=device)
        if rate > 0:
            seeds = draw_seeds(config.n_layer, device)
        return cls(
            eps=config.layer_norm_eps,
            dtype=dtype,
            weights=LayerWeights(encoder, tuple(encoder_v), decoder.t().contiguous()),
            spec=PassSpec(
                eps=config.layer_norm_eps,
                rotation=rotation,
                sizes=plan.sizes,
                path=plan.path,
                decay_mask=decay_mask,
                keep_state=keep_state,
                keep_scores=plan.keeps_scores,
            ),
            mask=mask,
            dropout=rate,
            seeds=seeds,
            kept_passes=plan.kept_passes if torch.is_grad_enabled() else 0,
        )

    @torch.compiler.disable
    def run(self, index: int, v: torch.Tensor, sums: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pass number ``index``: (B, T, D) to (B, T, D), and the new sums (B, H, N, D) where they are kept."""
        values = v.to(self.dtype)
        if self.mask is not None:  # a row of zeros fires nothing
            values = values * self.mask.to(self.dtype)[..., None]
        B, T, _ = v.shape
        dropout = None
        if self.dropout > 0:
            dropout = make_dropout(self.dropout, self.seeds[index], len(self.weights.encoder), B, T)
        spec = replace(self.spec, dropout=dropout, keep_wide=index < self.kept_passes)
        with torch.autocast(v.device.type, enabled=False):
            out, sums = wide_pass(values.contiguous(), self.weights, spec, sums)
        return layer_norm(v + layer_norm(out, self.eps), self.eps), sums


def draw_seeds(num_passes: int, device: torch.device) -> torch.Tensor:
    """Those of the passes' dropout, int64 (L,), from the device's generator."""
    return torch.randint(2**62, (num_passes,), device=device)


def _dtype(model: "BDHPreTrainedModel") -> torch.dtype:
    """In which the matrix products are computed."""
    device, dtype = model.embed.weight.device.type, model.embed.weight.dtype
    if (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and sum_dtype(dtype) != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return dtype


def _obstacle(model: "BDHPreTrainedModel") -> str | None:
    """What keeps the layer from being computed by matrices alone: the modules are then called, as they are."""
    if model.training and not 0 <= model.config.dropout < 1:
        return f"dropout is {model.config.dropout}"
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if torch._C._are_functorch_transforms_active():  # there is no public name for it
        return "a transform of torch.func is active"
    return product_obstacle(layer_modules(model))
