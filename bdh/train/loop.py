"""The story of a training run: step, evaluate, sample, save, stop."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from bdh.data.batch import ValidationPart
from bdh.evaluate.activity import measure_activity
from bdh.evaluate.loss import Metrics
from bdh.evaluate.parts import evaluate_parts
from bdh.model.sampling import SamplingOptions
from bdh.monitor import Monitor
from bdh.tokenizer.chat import question
from bdh.train.checkpoint import CheckpointError
from bdh.train.run import Run
from bdh.train.speed import StepClock, matmul_peak, peak_memory_bytes, training_flops_per_token

# The GradScaler halves its scale after each overflow: this many in a row are no longer its search for one.
_MAX_SKIPPED_STEPS = 25
# Whose neurons are counted at each evaluation: enough tokens for shares, a fraction of the evaluation's time.
_ACTIVITY_WINDOWS = 16


class TrainingStopped(ValueError):
    """The loss or a gradient is not finite; the weights are as they were before that step."""


def fit(run: Run, monitor: Monitor) -> str:
    """Trains until the end, an early stop or a signal, and saves.

    Returns:
        Why it ended: "finished", "stop_at_step", "patience", "SIGINT" or "SIGTERM".

    Raises:
        TrainingStopped: the loss or a gradient is not finite, and such steps are not to be skipped, or too many were.
        CheckpointError: the last checkpoint could not be written.
    """
    settings, progress = run.settings.train, run.progress
    step_model = torch.compile(run.model) if settings.compile else run.model
    validation = run.corpus.validation_parts(settings.eval_windows)
    last_step = min(settings.max_steps, settings.stop_at_step or settings.max_steps)
    peak = matmul_peak(run.runtime)
    flops_per_token = training_flops_per_token(run.model.config, settings.block_size)
    clock = StepClock()
    skipped = 0

    with _deferred_signals() as received:
        while progress.step < last_step:
            learning_rate = run.optimizers.set_learning_rate(progress.step)
            result = training_step(run, step_model)
            skipped = 0 if result.updated else skipped + 1
            if skipped > _MAX_SKIPPED_STEPS:
                raise TrainingStopped(
                    f"step {progress.step + 1}: {skipped} steps in a row had no finite loss and gradient; the weights "
                    "are those before them"
                )
            progress.step += 1
            step = progress.step
            progress.skipped_steps += not result.updated
            if result.fault is not None:
                monitor.warn(f"step {step}: {result.fault}: it did not change the weights")
            if run.average is not None and result.updated:
                run.average.update(run.model, step)
            num_tokens = settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
            progress.tokens_seen += num_tokens
            clock.count(num_tokens, result.data_seconds)

            is_evaluated = False
            if step % run.settings.monitor.log_every_steps == 0 or step == last_step or received:
                times = clock.take_means()
                values = {
                    "train/loss": result.loss,
                    "train/learning_rate": learning_rate,
                    "train/grad_norm": result.grad_norm,
                    "train/tokens": progress.tokens_seen,
                    "train/skipped_steps": progress.skipped_steps,
                    "train/tokens_per_second": clock.tokens_per_second(),
                    **{f"train/{name}": seconds for name, seconds in times.items()},
                    "train/mfu": flops_per_token * num_tokens / times["step_seconds"] / peak,
                    **{f"train/grad_norm/{name}": norm for name, norm in result.grad_norms.items()},
                }
                if (memory := peak_memory_bytes(run.runtime.device)) is not None:
                    values["train/peak_memory_bytes"] = memory
                monitor.log(step, values)
            monitor.progress(step, loss=result.loss, tokens_per_second=clock.tokens_per_second())

            is_best = False
            if step % settings.eval_every_steps == 0 or step == settings.max_steps:
                with clock.paused():
                    is_best, is_evaluated = evaluate(run, monitor, validation), True
            if settings.sample_every_steps and (step % settings.sample_every_steps == 0 or step == settings.max_steps):
                with clock.paused():
                    sample(run, monitor)
            out_of_patience = (
                is_evaluated
                and settings.patience is not None
                and progress.evaluations_without_gain >= settings.patience
            )
            stopped_by = received[0] if received else None  # read once: another may come while this step is saved
            ends = step == last_step or out_of_patience or stopped_by is not None
            if is_best or ends or step % run.settings.checkpoint.every_steps == 0:
                with clock.paused():
                    save(run, monitor, is_best=is_best, is_last=ends)
            if stopped_by is not None:
                return stopped_by
            if out_of_patience:
                return "patience"
    return "finished" if progress.step >= settings.max_steps else "stop_at_step"


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """Of all gradients together, before clipping."""
    grad_norms: dict[str, float]
    """Of each weight's gradient, before clipping."""
    updated: bool
    """Whether the weights were: float16 skips a step whose scaled gradients overflow, and lowers the scale."""
    fault: str | None
    """What was not finite, with ``train.on_nonfinite`` "skip"."""
    data_seconds: float
    """Spent waiting for the data."""


def training_step(run: Run, step_model: Callable[..., Any]) -> StepResult:
    """One optimizer step.

    Raises:
        TrainingStopped: the loss or the gradient is not finite, and ``train.on_nonfinite`` is "stop". The weights
            have not been changed.
    """
    settings, device = run.settings.train, run.runtime.device
    run.model.train()
    run.optimizers.zero_grad()
    total = torch.zeros((), device=device)
    before_data = time.perf_counter()
    batch = run.loader.next()  # of all forward passes of the step
    data_seconds = time.perf_counter() - before_data
    num_targets = max(1, batch.num_targets)  # a step in which nothing counts has a loss of 0
    for part in batch.split(settings.batch_size):
        part = part.to(device)
        with run.runtime.autocast():
            loss = step_model(
                input_ids=part.input_ids, shift_labels=part.targets, num_items_in_batch=num_targets, use_cache=False
            ).loss
        run.scaler.scale(loss).backward()
        total += loss.detach()

    for optimizer in run.optimizers.all:
        run.scaler.unscale_(optimizer)
    weights = dict(run.model.named_parameters())
    norms = torch.stack([torch.linalg.vector_norm(p.grad) for p in weights.values() if p.grad is not None])
    norm = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(weights.values(), settings.grad_clip or math.inf, norm)
    loss_value, norm_value, *norm_values = torch.stack([total, norm, *norms]).tolist()  # the step's one wait
    fault = None
    if not math.isfinite(loss_value):
        fault = f"the loss is {loss_value}"
    elif not math.isfinite(norm_value) and not run.scaler.is_enabled():  # else the scaler is looking for its scale
        fault = f"the gradient's norm is {norm_value}"
    if fault is not None and settings.on_nonfinite == "stop":
        step = run.progress.step
        raise TrainingStopped(
            f"step {step + 1}: {fault}; the weights are those after step {step}. A lower train.learning_rate or a "
            "longer train.warmup_steps may help; train.on_nonfinite=skip leaves such steps out"
        )
    updated = fault is None and math.isfinite(norm_value)
    if updated:
        for optimizer in run.optimizers.all:
            run.scaler.step(optimizer)
    run.scaler.update()
    named = (name for name, p in weights.items() if p.grad is not None)
    return StepResult(
        loss=loss_value,
        grad_norm=norm_value,
        grad_norms=dict(zip(named, norm_values, strict=True)),
        updated=updated,
        fault=fault,
        data_seconds=data_seconds,
    )


def evaluate(run: Run, monitor: Monitor, validation: list[ValidationPart]) -> bool:
    """Measures the validation windows, and tells whether the loss is the best so far."""
    progress = run.progress

    def measure() -> tuple[Metrics, dict[str, Metrics]]:
        return evaluate_parts(run.model, validation, autocast=run.runtime.autocast)

    metrics, by_source = measure()
    windows = run.corpus.validation_windows(min(run.settings.train.eval_windows, _ACTIVITY_WINDOWS))
    activity = measure_activity(run.model, windows[:, :-1], autocast=run.runtime.autocast)
    progress.last_metrics = metrics.as_dict()
    values = metrics.as_dict("val/") | metrics.loss_at("val/") | activity.as_dict("val/")
    for name, of_source in by_source.items():
        values |= of_source.as_dict(f"val/{name}/")
    averaged = ""
    if run.average is not None:
        run.average.swap(run.model)
        try:
            of_average, _ = measure()
        finally:
            run.average.swap(run.model)
        progress.last_ema_metrics = of_average.as_dict()
        values |= of_average.as_dict("val_ema/")
        averaged = f"; moving average: loss {of_average.loss:.4f}"
    of_sources = "".join(f"; {name}: loss {each.loss:.4f}" for name, each in by_source.items())
    for name, weight in run.model.named_parameters():
        monitor.log_histogram(progress.step, f"weights/{name}", weight)
    for kind, passes in activity.samples.items():
        for index, fired in enumerate(passes):
            monitor.log_histogram(progress.step, f"val/{kind}/{index}", fired)
    monitor.log(progress.step, values | weight_norms(run.model))
    is_best = math.isfinite(metrics.loss) and (progress.best_loss is None or metrics.loss < progress.best_loss)
    if is_best:
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = metrics.loss, progress.step, 0
    else:
        progress.evaluations_without_gain += 1
    monitor.message(
        f"step {progress.step}: validation loss {metrics.loss:.4f} nats per token, perplexity {metrics.perplexity:.2f}, "
        f"{metrics.bits_per_byte:.3f} bits per byte, accuracy {metrics.accuracy:.1%}, "
        f"{_mean(activity.density['x']):.1%} of the neurons fire{of_sources}{averaged}{' (best)' if is_best else ''}"
    )
    return is_best


def weight_norms(model: torch.nn.Module) -> dict[str, float]:
    """The L2 norm of each weight."""
    return {f"weights/norm/{name}": weight.detach().norm().item() for name, weight in model.named_parameters()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sample(run: Run, monitor: Monitor) -> None:
    """Continues the fixed prompts, from the run's seed, and writes the texts to ``samples.jsonl``."""
    settings, step = run.settings.train, run.progress.step
    run.model.eval()
    for number, prompt in enumerate(settings.sample_prompts):
        options = SamplingOptions(
            max_new_tokens=settings.sample_max_new_tokens, temperature=0.8, top_k=50, seed=settings.seed + number
        )
        # A model that learns to answer is asked.
        asked = question(run.tokenizer, prompt) if run.corpus.is_chat else prompt
        text = run.model.generate_text(run.tokenizer, asked, options)
        monitor.log_text(step, f"samples/{number}", prompt + text)
        monitor.message(f"step {step}: {prompt!r} goes on: {json.dumps(text, ensure_ascii=False)}")
        line = json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False)
        try:
            with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            monitor.warn(f"the sample of step {step} could not be written: {error}")


def save(run: Run, monitor: Monitor, *, is_best: bool, is_last: bool) -> None:
    """Writes a checkpoint. Where the disk refuses, the training goes on, but cannot end well."""
    try:
        run.save(is_best=is_best)
    except CheckpointError as error:
        if is_last and run.checkpointer.steps():
            raise CheckpointError(
                f"{error}, and `bdh train --run_dir {run.folder} --resume` goes on from it"
            ) from error
        if is_last:
            raise
        monitor.warn(f"{error}. The training goes on")


@contextmanager
def _deferred_signals() -> Iterator[list[str]]:
    """Collects the names of SIGINT and SIGTERM, so that a step ends before the run does.

    A second one acts at once, as it does without this.
    """
    received: list[str] = []
    before: dict[int, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        restore()

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, remember)
    try:
        yield received
    finally:
        restore()
