"""The story of a training run: step, evaluate, sample, save, stop."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from bdh.evaluate.loss import Metrics, evaluate_windows
from bdh.model.sampling import SamplingOptions
from bdh.monitor import Monitor
from bdh.train.checkpoint import CheckpointError
from bdh.train.run import Run

# The GradScaler halves its scale after each overflow: this many in a row are no longer its search for one.
_MAX_SKIPPED_STEPS = 25


class TrainingStopped(ValueError):
    """The loss or a gradient is not finite; the weights are as they were before that step."""


def fit(run: Run, monitor: Monitor) -> str:
    """Trains until the end, an early stop or a signal, and saves.

    Returns:
        Why it ended: "finished", "stop_at_step", "patience", "SIGINT" or "SIGTERM".

    Raises:
        TrainingStopped: the loss or a gradient is not finite.
        CheckpointError: the last checkpoint could not be written.
    """
    settings, progress = run.settings.train, run.progress
    step_model = torch.compile(run.model) if settings.compile else run.model
    validation = run.corpus.validation_windows(settings.eval_windows)
    last_step = min(settings.max_steps, settings.stop_at_step or settings.max_steps)
    speed = _Speed()
    skipped = 0

    with _deferred_signals() as received:
        while progress.step < last_step:
            learning_rate = run.optimizers.set_learning_rate(progress.step)
            loss, grad_norm, updated = training_step(run, step_model)
            skipped = 0 if updated else skipped + 1
            if skipped > _MAX_SKIPPED_STEPS:
                raise TrainingStopped(f"step {progress.step + 1}: {skipped} steps in a row overflowed float16")
            progress.step += 1
            step = progress.step
            num_tokens = settings.batch_size * settings.gradient_accumulation_steps * settings.block_size
            progress.tokens_seen += num_tokens
            speed.count(num_tokens)

            ends = step == last_step or bool(received)
            if step % run.settings.monitor.log_every_steps == 0 or ends:
                monitor.log(
                    step,
                    {
                        "train/loss": loss,
                        "train/learning_rate": learning_rate,
                        "train/grad_norm": grad_norm,
                        "train/tokens": progress.tokens_seen,
                        "train/tokens_per_second": speed.tokens_per_second(),
                    },
                )
            monitor.progress(step, loss=loss, tokens_per_second=speed.tokens_per_second())

            is_best = False
            if step % settings.eval_every_steps == 0 or step == settings.max_steps:
                with speed.paused():
                    is_best = evaluate(run, monitor, validation)
            if settings.sample_every_steps and (step % settings.sample_every_steps == 0 or step == settings.max_steps):
                with speed.paused():
                    sample(run, monitor)
            out_of_patience = settings.patience is not None and progress.evaluations_without_gain >= settings.patience
            ends = ends or out_of_patience
            if is_best or ends or step % run.settings.checkpoint.every_steps == 0:
                with speed.paused():
                    save(run, monitor, is_best=is_best, is_last=ends)
            if received:
                return received[0]
            if out_of_patience:
                return "patience"
    return "finished" if progress.step >= settings.max_steps else "stop_at_step"


def training_step(run: Run, step_model: Callable[..., Any]) -> tuple[float, float, bool]:
    """One optimizer step.

    Returns:
        The loss in nats per token, the gradient's norm before clipping, and whether the weights were updated
        (float16 skips a step whose scaled gradients overflow, and lowers the scale).

    Raises:
        TrainingStopped: the loss or the gradient is not finite. The weights have not been changed.
    """
    settings, device = run.settings.train, run.runtime.device
    run.model.train()
    run.optimizers.zero_grad()
    total = torch.zeros((), device=device)
    rows = run.loader.next()  # (batch_size * accumulation, T + 1)
    for windows in rows.split(settings.batch_size):
        windows = windows.to(device, non_blocking=True)
        with run.runtime.autocast():
            loss = step_model(input_ids=windows[:, :-1], shift_labels=windows[:, 1:], use_cache=False).loss
        loss = loss / settings.gradient_accumulation_steps
        run.scaler.scale(loss).backward()
        total += loss.detach()

    for optimizer in run.optimizers.all:
        run.scaler.unscale_(optimizer)
    limit = settings.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit)
    loss_value, norm_value = torch.stack([total, norm]).tolist()  # the step's one wait for the device
    step = run.progress.step + 1
    if not math.isfinite(loss_value):
        raise TrainingStopped(
            f"step {step}: the loss is {loss_value}; the weights are those after step {step - 1}. "
            "A lower train.learning_rate or a longer train.warmup_steps may help"
        )
    overflowed = not math.isfinite(norm_value)
    if overflowed and not run.scaler.is_enabled():
        raise TrainingStopped(
            f"step {step}: the gradient's norm is {norm_value}; the weights are those after step {step - 1}. "
            "A lower train.learning_rate or a longer train.warmup_steps may help"
        )
    if not overflowed:
        for optimizer in run.optimizers.all:
            run.scaler.step(optimizer)
    run.scaler.update()
    return loss_value, norm_value, not overflowed


def evaluate(run: Run, monitor: Monitor, validation: torch.Tensor) -> bool:
    """Measures the validation windows, and tells whether the loss is the best so far."""
    progress = run.progress
    metrics: Metrics = evaluate_windows(
        run.model,
        validation,
        bytes_per_token=run.corpus.val_bytes_per_token,
        autocast=run.runtime.autocast,
    )
    progress.last_metrics = metrics.as_dict()
    monitor.log(progress.step, metrics.as_dict("val/"))
    is_best = progress.best_loss is None or metrics.loss < progress.best_loss
    if is_best:
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = metrics.loss, progress.step, 0
    else:
        progress.evaluations_without_gain += 1
    monitor.message(
        f"step {progress.step}: validation loss {metrics.loss:.4f} nats per token, perplexity {metrics.perplexity:.2f}, "
        f"{metrics.bits_per_byte:.3f} bits per byte, accuracy {metrics.accuracy:.1%}{' (best)' if is_best else ''}"
    )
    return is_best


def sample(run: Run, monitor: Monitor) -> None:
    """Continues the fixed prompts, from the run's seed, and writes the texts to ``samples.jsonl``."""
    settings, step = run.settings.train, run.progress.step
    run.model.eval()
    for number, prompt in enumerate(settings.sample_prompts):
        options = SamplingOptions(
            max_new_tokens=settings.sample_max_new_tokens, temperature=0.8, top_k=50, seed=settings.seed + number
        )
        text = run.model.generate_text(run.tokenizer, prompt, options)
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


class _Speed:
    """Tokens per second of the training steps, without the pauses between them."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._tokens = 0
        self._rate = 0.0

    def count(self, num_tokens: int) -> None:
        now = time.perf_counter()
        rate = num_tokens / max(now - self._start, 1e-9)
        # The first steps compile and warm up; later ones count for about the last twenty.
        self._rate = rate if self._tokens < 5 * num_tokens else 0.95 * self._rate + 0.05 * rate
        self._tokens += num_tokens
        self._start = now

    def tokens_per_second(self) -> float:
        return self._rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


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
