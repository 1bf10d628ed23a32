"""The forward pass, independent of transformers: chooses the backend for the layer steps, and loops over them."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from bdh.model.arguments import Inputs, checkpointing_of, token_positions
from bdh.model.state import Columns, SynapticState
from bdh.model.weights import (
    hook_points_obstacle,
    kernel_obstacle,
    layer_functions,
    layer_modules,
    layer_weights,
    product_obstacle,
    recheck_weights,
    recurrence_of,
    torch_func_is_active,
)
from bdh.ops import eager
from bdh.ops.attention import DecayMask, make_rotation, rotation_table, sum_dtype
from bdh.ops.backends import CPU, Work
from bdh.ops.blocks import train as blocks
from bdh.ops.blocks.block import make_dropout
from bdh.ops.blocks.plan import LayerOptions, LayerPlan, LayerShape, plan_layer

_ALL_EAGER = LayerOptions(path="plain")
# Maps the index of the layer step, v (B, T, D) and the sums (B, H, N, D) before the step to v and the sums after it.
LayerStep = Callable[[int, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]


class Hidden(NamedTuple):
    """The result of :func:`run_layer`."""

    v: torch.Tensor
    """(B, T, D) after the last layer step, in the dtype of the model."""
    state: SynapticState | None
    every_v: tuple[torch.Tensor, ...] | None
    """v before the first and after each layer step, if requested."""


def run_layer(
    model: Any,
    inputs: Inputs,
    *,
    use_cache: bool,
    form: str | None = None,
    keep_hidden_states: bool | None = None,
    for_loss: bool = False,
) -> Hidden:
    """Runs all layer steps over the tokens of a batch.

    Args:
        model: has the modules of :class:`bdh.model.network.ModelParts`, ``layer_options`` and
            ``gradient_checkpointing``.
        inputs: from :func:`bdh.model.arguments.read_inputs`.
        use_cache: whether to return the state. A given state is advanced in place.
        form: the attention form; None for that of the configuration.
        keep_hidden_states: whether to return v of every layer step; None for ``config.output_hidden_states``.
        for_loss: whether a loss will be computed from the result.
    """
    config, v, given = model.config, inputs.v, inputs.state
    B, T, _ = v.shape
    state = given
    if use_cache:
        if given is not None:
            given.remember(inputs, partial(read_columns, model))
        else:  # the layer steps append their sums
            shape = (B, config.n_head, config.neurons_per_head, config.n_embd)
            state = SynapticState.zeros(shape, 0, device=v.device)
        if not torch.compiler.is_compiling():
            recheck_weights(model)  # after this prompt, the kernels may read the following tokens with their copies
    before = given.positions if given is not None else None
    positions, following = token_positions(T, before=before, mask=inputs.mask, starts=inputs.starts, device=v.device)
    step = _choose_step(model, inputs, positions, form or config.attention_form, use_cache, for_loss)
    if keep_hidden_states is None:
        keep_hidden_states = bool(config.output_hidden_states)
    hidden_states = [v]
    for index in range(config.n_layer):
        v, sums = step(index, v, given.sums[index] if given is not None else None)
        if use_cache and state is not None and sums is not None:
            state.sums[index : index + 1] = [sums]
        if keep_hidden_states:
            hidden_states.append(v)
    if use_cache and state is not None:
        state.positions = following.expand(B).clone()
        state.num_columns += T
    return Hidden(
        v.to(model.dtype),
        state if use_cache else None,
        tuple(hidden_states) if keep_hidden_states else None,
    )


@torch.no_grad()
def read_columns(model: Any, state: SynapticState, columns: Columns) -> None:
    """Advances a state by columns, without gradients."""
    run_layer(model, Inputs(columns.v, columns.mask, columns.starts, state), use_cache=True, keep_hidden_states=False)


def plan_for(model: Any, B: int, T: int, form: str, *, for_loss: bool = True) -> LayerPlan | None:
    """Returns the plan by which ``model`` computes its layer steps over (B, T) tokens, under the current autocast.

    Returns None if the eager backend is used without a choice: for prompts, and if ``model.layer_options`` demand it.

    Raises:
        LayerOptionError: ``model.layer_options`` require something that is not available.
    """
    # Decided here, outside of `_plan`, which torch.compile cannot trace: so the eager backend compiles to one graph.
    if not (for_loss or torch.is_grad_enabled()):
        return None
    if model.layer_options == _ALL_EAGER and not model.gradient_checkpointing:
        return None
    return _plan(model, B, T, form)


@torch.compiler.disable
def _plan(model: Any, B: int, T: int, form: str) -> LayerPlan:
    config, options = model.config, model.layer_options
    shape = layer_shape(config, B, T, _product_dtype(model), model.device)
    shape = shape._replace(
        has_dropout=model.training and shape.has_dropout,
        for_training=torch.is_grad_enabled(),
    )
    if model.gradient_checkpointing and model.training and options.recompute == "auto":
        options = replace(options, recompute="pass")
    obstacle = _obstacle(model)
    # An evaluation batch, or the last batch of an epoch, can have fewer or shorter sequences than the options expect.
    rows, tokens = options.rows_per_block, options.tokens_per_block
    options = replace(options, rows_per_block=rows and min(rows, B), tokens_per_block=tokens and min(tokens, T))
    if obstacle is not None and not torch.is_grad_enabled():  # such as a measurement with hooks
        options = replace(options, path="auto")
    how = {"form": form, "chunk_size": config.chunk_size, "obstacle": obstacle}
    return _plan_once(os.getpid(), torch.get_num_threads(), shape, options, **how)


@lru_cache(maxsize=64)
def _plan_once(process: int, num_threads: int, *arguments: Any, **others: Any) -> LayerPlan:
    """Caches plans by everything that they depend on.

    These include the process, because other backends can be available in a forked one, and the number of threads, each
    of which needs memory.
    """
    return plan_layer(*arguments, **others)


def layer_shape(config: Any, B: int, T: int, dtype: torch.dtype, device: torch.device) -> LayerShape:
    """Returns the sizes of a training step over (B, T) tokens, with matrix products in ``dtype``."""
    D, H, N, L = config.n_embd, config.n_head, config.neurons_per_head, config.n_layer
    return LayerShape(B, T, D, H, N, L, dtype, device, has_dropout=config.dropout > 0)


def _choose_step(
    model: Any, inputs: Inputs, positions: torch.Tensor, form: str, keep_state: bool, for_loss: bool
) -> LayerStep:
    """Returns the function that computes a layer step by the chosen backend; ``positions`` are int64 (1 or B, T)."""
    config, dtype = model.config, model.dtype
    B, T, _ = inputs.v.shape
    decay_mask = _decay_mask(model, inputs.starts, inputs.mask)
    is_step = T == 1 and inputs.state is not None
    # The block backend breaks the graph of torch.compile. In training, the saved memory is worth it.
    is_one_graph = torch.compiler.is_exporting() or (torch.compiler.is_compiling() and not (for_loss or model.training))
    # A forward pass that keeps no state is not a prompt but an evaluation of logits.
    plan = None
    if not (is_step or is_one_graph):
        plan = plan_for(model, B, T, form, for_loss=for_loss or not keep_state)
    if plan is not None and plan.backend != "eager":
        return _block_step(model, plan, inputs, positions, decay_mask, keep_state)
    spec = eager.EagerSpec(
        table=rotation_table(positions, config.neurons_per_head, config.rope_theta, dtype)[:, None],
        eps=config.layer_norm_eps,
        dtype=dtype,
        form=form,
        chunk_size=config.chunk_size,
        decay_mask=decay_mask,
        mask=inputs.mask,
        dropout=config.dropout if model.training else 0.0,
        keep_state=keep_state,
    )
    layer = layer_functions(model, dtype)
    num_kept = config.n_layer if plan is None else plan.kept_layer_steps

    def step(index: int, v: torch.Tensor, sums: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if index < num_kept:
            return eager.train(v, layer, spec, sums)
        return checkpointing_of(model)(eager.train, v, layer, spec, sums)

    return step


@torch.compiler.disable
def _block_step(
    model: Any,
    plan: LayerPlan,
    inputs: Inputs,
    positions: torch.Tensor,
    decay_mask: DecayMask | None,
    keep_state: bool,
) -> LayerStep:
    config, dtype, (B, T, _) = model.config, _product_dtype(model), inputs.v.shape
    weights = layer_weights(model, dtype)
    rate = config.dropout if model.training else 0.0
    seeds = draw_seeds(config.n_layer, positions.device) if rate > 0 else None
    num_kept = plan.kept_layer_steps if torch.is_grad_enabled() else 0
    bound = None if inputs.state is not None else T
    common = blocks.BlockSpec(
        eps=config.layer_norm_eps,
        rotation=make_rotation(positions, config.neurons_per_head, config.rope_theta, dtype, bound=bound),
        sizes=plan.sizes,
        backend=plan.backend,
        mask=inputs.mask,
        decay_mask=decay_mask,
        keep_state=keep_state,
        keep_scores=plan.keeps_scores,
    )

    def step(index: int, v: torch.Tensor, sums: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        dropout = None if seeds is None else make_dropout(rate, seeds[index], len(weights.encoder), B, T)
        return blocks.train(v, weights, replace(common, dropout=dropout, keep_wide=index < num_kept), sums)

    return partial(_outside_of_graphs, step)


@torch.compiler.disable  # applied once: wrapping a new function in each forward pass is slower than a tiny layer step
def _outside_of_graphs(
    step: LayerStep, index: int, v: torch.Tensor, sums: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return step(index, v, sums)


def draw_seeds(num_layer_steps: int, device: torch.device) -> torch.Tensor:
    """Draws a dropout seed for each layer step, int64 (L,), from the device's generator."""
    return torch.randint(2**62, (num_layer_steps,), device=device)


def _decay_mask(model: Any, starts: torch.Tensor | None, mask: torch.Tensor | None) -> DecayMask | None:
    """Returns the weights of earlier tokens by decay and document; None if all earlier tokens count alike."""
    half_lives = model.config.half_lives
    if half_lives is None:
        return None if starts is None else DecayMask(starts)
    dtype, device = sum_dtype(model.dtype), model.device
    if torch.compiler.is_compiling():  # a traced tensor must not be kept
        return DecayMask(starts, torch.tensor(half_lives, dtype=dtype, device=device), mask)
    return DecayMask(starts, _half_lives(tuple(half_lives), dtype, device), mask)


@lru_cache(maxsize=16)  # copying them to a GPU in each forward pass would synchronize with it
@torch.inference_mode(False)  # a cached inference tensor could not be used in training
def _half_lives(half_lives: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(half_lives, dtype=dtype, device=device)


def _product_dtype(model: Any) -> torch.dtype:
    """Returns the dtype of the matrix products: that of autocast if it is enabled, except for float64 models."""
    device, dtype = model.device.type, model.dtype
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_autocast and dtype != torch.float64 else dtype


def _obstacle(model: Any) -> str | None:
    """Returns why the layer's modules must be called, instead of multiplying with their weights; None if not."""
    if model.training and not 0 <= model.config.dropout < 1:
        return f"dropout is {model.config.dropout}"
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if torch_func_is_active():
        return "a transform of torch.func is active"
    return hook_points_obstacle(model) or product_obstacle(layer_modules(model))


def step_by_kernels(model: Any, input_ids: torch.Tensor, inputs: Inputs, form: str | None) -> torch.Tensor | None:
    """Reads one token for each sequence with the sparse CPU kernels, advancing the state.

    Returns:
        The logits (B, 1, V), or None, with the state unchanged, if the kernels cannot compute this step.
    """
    config, state = model.config, inputs.state
    if state is None or not inputs.is_single or (form or config.attention_form) != "auto":
        return None
    if torch.is_grad_enabled() or model.training or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled(model.device.type) or config.half_lives is not None:
        return None
    if any(sums.requires_grad for sums in state.sums):
        return None
    if CPU.obstacle("advance", Work(model.device, model.dtype, kernel_obstacle(model))) is not None:
        return None
    state.remember(inputs, partial(read_columns, model))
    from bdh.ops.cpu.recurrence import TokenRows

    recurrence = recurrence_of(model, is_prompt=state.num_columns == 0)
    state.sums = [sums.contiguous() for sums in state.sums]
    following = state.positions + 1

    def before_writing() -> None:
        state.is_torn = True

    tokens = np.ascontiguousarray(input_ids[:, 0], np.int64)
    v = recurrence.advance(
        TokenRows(tokens, state.positions.contiguous().numpy(), np.arange(len(tokens) + 1)),
        [{"sums": of_sequence} for of_sequence in zip(*(sums.unbind(0) for sums in state.sums), strict=True)],
        before_writing=before_writing,
    )
    # The kernels write without PyTorch's knowledge: a backward pass that saved the sums must notice the change.
    torch.autograd.graph.increment_version(state.sums)
    state.positions, state.num_columns, state.is_torn = following, state.num_columns + 1, False
    return recurrence.logits(v)[:, None]
