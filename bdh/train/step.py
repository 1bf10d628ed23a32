"""One optimizer step."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from bdh.data.corpus import Batch, join_states
from bdh.train.run import Run
from bdh.train.spikes import NormStatistics


class TrainingStopped(ValueError):
    """The loss or a gradient is not to be trusted; the weights are as they were before that step."""


class DataStopped(ValueError):
    """The sequences of the next step cannot be read, on this process or on another; the step has not begun."""

    def __init__(self, message: str, loader_state: dict[str, Any]):
        """
        Args:
            loader_state: from where they can be read, once the text is mended.
        """
        super().__init__(message)
        self.loader_state = loader_state


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to, over all processes."""

    loss: float
    """Nats per token, the mean over all tokens that count."""
    grad_norm: float
    """Of all gradients together, before clipping."""
    grad_norms: dict[str, float]
    """Of each weight's gradient, before clipping."""
    updated: bool
    """Whether the weights were: float16 skips a step whose scaled gradients overflow, and lowers the scale."""
    fault: str | None
    """What was not finite, or a spike, with ``train.on_nonfinite`` "skip"."""
    data_seconds: float
    """Spent waiting for the data."""


def training_step(run: Run, step_model: Callable[..., Any]) -> StepResult:
    """Forward and backward passes over the step's sequences, and the update.

    With several processes, each takes its share of the sequences; the gradients and the result are those of all.

    Raises:
        DataStopped: the sequences cannot be read.
        TrainingStopped: the loss or the gradient is not finite, or a spike, and ``train.on_nonfinite`` is "stop". The
            weights have not been changed.
    """
    settings, device, world = run.settings.train, run.runtime.device, run.world
    run.model.train()
    run.optimizers.zero_grad()
    before_data = time.perf_counter()
    batch = _next_batch(run)  # of all forward passes of the step
    data_seconds = time.perf_counter() - before_data
    num_targets: torch.Tensor | int = max(1, batch.num_targets)
    if world.size > 1:
        num_targets = world.sum(torch.tensor(batch.num_targets, device=device)).clamp_min(1)

    total = torch.zeros((), device=device, dtype=run.model.dtype)
    parts = list(batch.split(settings.batch_size))
    for index, part in enumerate(parts):
        part = part.to(device)
        with run.parallel.accumulating(is_last=index == len(parts) - 1):
            with run.runtime.autocast():
                output = step_model(
                    input_ids=part.input_ids,
                    shift_labels=part.targets,
                    document_starts=part.starts,
                    num_items_in_batch=num_targets,
                    past_key_values=run.carried.before(index) if run.carried else None,
                    use_cache=run.carried is not None,
                )
            if run.carried:
                run.carried.keep(index, output.past_key_values)
            # The processes' gradients are averaged, but the loss is a sum over them.
            run.scaler.scale(output.loss * world.size).backward()
        total += output.loss.detach()
    world.sum(total)

    for optimizer in run.optimizers.all:
        run.scaler.unscale_(optimizer)
    weights = {name: p for name, p in run.model.named_parameters() if p.grad is not None}
    norms = _whole(torch.stack([torch.linalg.vector_norm(p.grad) for p in weights.values()]))
    norm = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(weights.values(), settings.grad_clip or math.inf, norm)
    loss_value, norm_value, *norm_values = torch.stack([total, norm, *norms]).tolist()  # the step's one wait
    fault = _fault(run, loss_value, norm_value)
    if run.carried and not math.isfinite(loss_value):
        run.carried.forget()
    if fault is not None and settings.on_nonfinite == "stop":
        step = run.progress.step
        raise TrainingStopped(
            f"step {step + 1}: {fault}; the weights are those after step {step}. A lower train.learning_rate or a "
            "longer train.warmup_steps may help; train.on_nonfinite=skip leaves such steps out"
        )
    updated = fault is None and math.isfinite(norm_value)
    run.checkpointer.wait_until_copied()  # a checkpoint in the background may still be reading the weights
    if updated:
        for optimizer in run.optimizers.all:
            run.scaler.step(optimizer)
    if math.isfinite(norm_value) or not run.scaler.is_enabled():
        run.scaler.update()
    else:  # on every process alike, while the overflow may have been in the part of one
        run.scaler.update(run.scaler.get_scale() * run.scaler.get_backoff_factor())
    return StepResult(
        loss=loss_value,
        grad_norm=norm_value,
        grad_norms=dict(zip(weights, norm_values, strict=True)),
        updated=updated,
        fault=fault,
        data_seconds=data_seconds,
    )


def _next_batch(run: Run) -> Batch:
    """The process's sequences; where any process cannot read its own, all raise."""
    if not run.corpus.facts["streaming"]:
        return run.loader.next()
    world = run.world
    cause: Exception | None = None
    try:
        run.loader.prepare()
    except (ValueError, OSError) as error:
        cause = error
    if not any(world.any([cause is not None])):
        return run.loader.next()
    reasons = world.gather(None if cause is None else _reason(cause))
    first = next(rank for rank, reason in enumerate(reasons) if reason is not None)
    state = join_states(world.gather(run.loader.state_dict()))
    raise DataStopped(f"step {run.progress.step + 1}: {reasons[first]}", state) from cause


def _reason(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def _fault(run: Run, loss: float, norm: float) -> str | None:
    """What is wrong with a step, if anything. Keeps the statistics of the norms."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        # float16's scaler looks for its scale by such overflows
        return None if run.scaler.is_enabled() else f"the gradient's norm is {norm}"
    threshold = run.settings.train.spike_threshold
    if threshold is None:
        return None
    statistics = NormStatistics(**run.progress.norm_statistics)
    z = statistics.z_score(norm)
    mean = statistics.mean
    statistics.take_in(norm, threshold)
    run.progress.norm_statistics = asdict(statistics)
    if z <= threshold:
        return None
    return f"the gradient's norm is {norm:.4g}, {z:.1f} standard deviations above its mean of {mean:.4g}"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
