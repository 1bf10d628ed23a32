"""What the settings say of how the layer is computed, and the plan that comes of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from bdh.distributed.config import DistributedConfig
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.forward import layer_shape, plan_for
from bdh.ops.blocks.plan import LayerOptionError, LayerOptions, LayerPlan, LayerShape, plan_layer
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
        with _arithmetic(runtime, distributed), torch.enable_grad(), _faults_of_settings():
            plan = plan_for(model, rows, tokens, model.config.attention_form)
            # None is the plain forms with nothing to decide.
            return plan or plan_layer(_shape(model.config, rows, tokens, runtime, distributed), model.layer_options)
    finally:
        model.train(was_training)


def plan_settings(
    settings: TrainSettings,
    config: BDHConfig,
    runtime: Runtime,
    distributed: DistributedConfig,
    *,
    obstacle: str | None = None,
) -> LayerPlan:
    """The same, of a model that need not be there.

    Args:
        obstacle: what about it keeps the blocks from computing it, as for :func:`bdh.ops.blocks.plan.plan_layer`.

    Raises:
        ValueError: as of :func:`plan_training`.
    """
    with _faults_of_settings():
        return plan_layer(
            _shape(config, settings.batch_size, settings.block_size, runtime, distributed),
            layer_options(settings),
            form=config.attention_form,
            chunk_size=config.chunk_size,
            obstacle=obstacle,
        )


def _shape(config: BDHConfig, rows: int, tokens: int, runtime: Runtime, distributed: DistributedConfig) -> LayerShape:
    return layer_shape(config, rows, tokens, _dtype(runtime, distributed), runtime.device)


@contextmanager
def _faults_of_settings() -> Iterator[None]:
    """Within it, what is wrong with an option is said of the setting that it comes from."""
    try:
        yield
    except LayerOptionError as error:
        raise ValueError(f"train.{_SETTINGS.get(error.option, error.option)} {error.fault}") from error


def _arithmetic(runtime: Runtime, distributed: DistributedConfig) -> AbstractContextManager:
    """That of a step."""
    dtype = _dtype(runtime, distributed)
    return runtime.autocast() if dtype == runtime.dtype else torch.autocast(runtime.device.type, dtype=dtype)


def _dtype(runtime: Runtime, distributed: DistributedConfig) -> torch.dtype:
    """Of the matrix products. FSDP casts the weights only when it gathers them, so until then it has to be said."""
    gathered = getattr(torch, distributed.param_dtype)
    return gathered if runtime.dtype == torch.float32 and gathered != torch.float32 else runtime.dtype
