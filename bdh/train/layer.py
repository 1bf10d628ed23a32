"""What the settings say of how the layer is computed, and the plan that comes of it."""

from contextlib import AbstractContextManager

import torch

from bdh.distributed.config import DistributedConfig
from bdh.model import BDHForCausalLM
from bdh.model.passes import plan_for
from bdh.ops.layer.plan import LayerOptionError, LayerOptions, LayerPlan
from bdh.train.config import TrainSettings
from bdh.train.runtime import Runtime

_SETTINGS = {"path": "layer_path", "memory_budget": "memory_budget_gb"}  # where they are not called as the options are


def layer_options(settings: TrainSettings) -> LayerOptions:
    budget = settings.memory_budget_gb
    return LayerOptions(
        path=settings.layer_path,
        recompute=settings.recompute,
        memory_budget=None if budget is None else round(budget * 1e9),
        rows_per_block=settings.rows_per_block,
        tokens_per_block=settings.tokens_per_block,
    )


def plan_training(
    model: BDHForCausalLM, rows: int, tokens: int, runtime: Runtime, distributed: DistributedConfig
) -> LayerPlan:
    """How the model, with its ``layer_options``, will compute a training step's forward pass of so many sequences.

    Raises:
        ValueError: the options ask for what is not there; it names the setting.
    """
    was_training = model.training
    model.train()
    try:
        with _arithmetic(runtime, distributed), torch.enable_grad():
            plan = plan_for(model, rows, tokens, model.config.attention_form)
    except LayerOptionError as error:
        raise ValueError(f"train.{_SETTINGS.get(error.option, error.option)} {error.fault}") from error
    finally:
        model.train(was_training)
    assert plan is not None  # as it is for training
    return plan


def _arithmetic(runtime: Runtime, distributed: DistributedConfig) -> AbstractContextManager:
    """That of a step. FSDP casts the weights only when it gathers them, so until then it has to be said."""
    gathered = getattr(torch, distributed.param_dtype)
    if runtime.dtype == torch.float32 and gathered != torch.float32:
        return torch.autocast(runtime.device.type, dtype=gathered)
    return runtime.autocast()
