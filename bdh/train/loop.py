"""The story of a training run: step, evaluate, sample, save, stop."""

import json
import math
from typing import Any

import torch

from bdh.data.corpus import ValidationPart
from bdh.evaluate.activity import measure_activity
from bdh.evaluate.loss import Metrics
from bdh.evaluate.parts import evaluate_parts
from bdh.generate.params import SamplingParams
from bdh.generate.texts import generate_text
from bdh.memory import peak_bytes
from bdh.monitor import Monitor
from bdh.tokenizer.chat import question
from bdh.train.checkpoint import CheckpointError
from bdh.train.run import Run
from bdh.train.signals import deferred_signals
from bdh.train.speed import StepClock, matmul_peak, training_flops_per_token
from bdh.train.step import DataStopped, TrainingStopped, training_step
from bdh.train.stored import resume_command

# The GradScaler halves its scale after each overflow: this many in a row are no longer its search for one.
_MAX_SKIPPED_STEPS = 25
# Whose neurons are counted at each evaluation: enough tokens for shares, a fraction of the evaluation's time.
_ACTIVITY_WINDOWS = 16


def fit(run: Run, monitor: Monitor) -> str:
    """Trains until the end, an early stop or a signal, and saves.

    Returns:
        Why it ended: "finished", "stop_at_step", "patience", or the name of a signal.

    Raises:
        DataStopped: the text cannot be read any further; what was trained until then is saved.
        TrainingStopped: the loss or a gradient is not finite, and such steps are not to be skipped, or too many were.
        CheckpointError: the last checkpoint could not be written.
        InUseError: another process has taken the folder, as this one was stopped for too long; nothing is written then.
    """
    settings, progress = run.settings.train, run.progress
    step_model = torch.compile(run.parallel.step_model) if settings.compile else run.parallel.step_model
    validation = run.corpus.validation_parts(settings.eval_windows, run.document_end)
    last_step = min(settings.max_steps, settings.stop_at_step or settings.max_steps)
    peak = matmul_peak(run.runtime) * run.world.size
    flops_per_token = training_flops_per_token(run.model.config, settings.block_size)
    clock = StepClock()
    skipped = 0

    with deferred_signals() as received:
        while progress.step < last_step:
            learning_rate = run.optimizers.set_learning_rate(progress.step)
            try:
                result = training_step(run, step_model)
            except DataStopped as stopped:
                _save_before(stopped, run, monitor)
                raise
            skipped = 0 if result.updated else skipped + 1
            if skipped > _MAX_SKIPPED_STEPS:
                raise TrainingStopped(
                    f"step {progress.step + 1}: {skipped} steps in a row had a loss or gradient not to be trusted; the "
                    "weights are those before them"
                )
            run.lock.check(seldom=True)
            progress.step += 1
            step = progress.step
            progress.skipped_steps += not result.updated
            if result.fault is not None:
                monitor.warn(f"step {step}: {result.fault}: it did not change the weights")
            if run.average is not None and result.updated:
                run.average.update(run.model, step)
            num_tokens = run.rows_per_step * settings.block_size
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
                if (memory := peak_bytes(run.runtime.device)) is not None:
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
            stopped_by = received.agreed(run.world)  # asked once: another may come while this step is saved
            ends = step == last_step or out_of_patience or stopped_by is not None
            if is_best or ends or step % run.settings.checkpoint.every_steps == 0:
                with clock.paused():
                    save(run, monitor, is_best=is_best, is_last=ends)
            if stopped_by is not None:
                return stopped_by
            if out_of_patience:
                return "patience"
    return "finished" if progress.step >= settings.max_steps else "stop_at_step"


def evaluate(run: Run, monitor: Monitor, validation: list[ValidationPart]) -> bool:
    """Measures the validation rows, which the processes share, and tells whether the model is the best so far."""
    progress, world = run.progress, run.world

    def measure() -> tuple[Metrics, dict[str, Metrics]]:
        return evaluate_parts(
            run.model,
            validation,
            autocast=run.runtime.autocast,
            rows=slice(world.rank, None, world.size),
            sum_over_processes=world.sum if world.size > 1 else None,
        )

    with run.parallel.whole_model():
        metrics, by_source = measure()
        values = metrics.as_dict("val/") | metrics.loss_at("val/")
        for name, of_source in by_source.items():
            values |= of_source.as_dict(f"val/{name}/")
        if world.is_main:
            windows = run.corpus.validation_windows(min(run.settings.train.eval_windows, _ACTIVITY_WINDOWS))
            activity = measure_activity(run.model, windows[:, :-1], autocast=run.runtime.autocast)
            values |= activity.as_dict("val/") | weight_norms(run.model)
            for name, weight in run.model.named_parameters():
                monitor.log_histogram(progress.step, f"weights/{name}", weight)
            for kind, passes in activity.samples.items():
                for index, sampled in enumerate(passes):
                    monitor.log_histogram(progress.step, f"val/{kind}/{index}", sampled)
    progress.last_metrics = metrics.as_dict()
    num_windows = sum(len(part.batch.tokens) for part in validation)
    progress.last_evaluation = {"step": progress.step, "windows": num_windows, "tokens": metrics.num_tokens}
    averaged = ""
    if run.average is not None:
        run.average.swap(run.model)
        try:
            with run.parallel.whole_model():
                of_average, _ = measure()
        finally:
            run.average.swap(run.model)
        progress.last_ema_metrics = of_average.as_dict()
        values |= of_average.as_dict("val_ema/")
        averaged = f"; moving average: loss {of_average.loss:.4f}"
    values = world.gather(values)[0]  # rank 0 has counted the neurons
    monitor.log(progress.step, values)
    is_best = take_best(run, values)
    of_sources = "".join(f"; {name}: loss {each.loss:.4f}" for name, each in by_source.items())
    fired = [value for name, value in values.items() if name.startswith("val/density/x/")]
    monitor.message(
        f"step {progress.step}: validation loss {metrics.loss:.4f} nats per token, perplexity {metrics.perplexity:.2f}, "
        f"{metrics.bits_per_byte:.3f} bits per byte, accuracy {metrics.accuracy:.1%}, "
        f"{sum(fired) / len(fired):.1%} of the neurons fire{of_sources}{averaged}{' (best)' if is_best else ''}"
    )
    return is_best


def take_best(run: Run, values: dict[str, float]) -> bool:
    """Tells whether ``checkpoint.best_metric`` is better than at all evaluations before, and remembers it."""
    progress, settings = run.progress, run.settings.checkpoint
    if settings.best_metric not in values:
        raise ValueError(
            f"checkpoint.best_metric is {settings.best_metric!r}, which was not measured: there are {', '.join(values)}"
        )
    value = values[settings.best_metric]
    is_high = settings.best_mode == "max" or (settings.best_mode == "auto" and "accuracy" in settings.best_metric)
    sign = -1 if is_high else 1
    is_best = math.isfinite(value) and (progress.best_value is None or sign * value < sign * progress.best_value)
    if is_best:
        progress.best_value, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
    else:
        progress.evaluations_without_gain += 1
    return is_best


def weight_norms(model: torch.nn.Module) -> dict[str, float]:
    """The L2 norm of each weight."""
    return {f"weights/norm/{name}": weight.detach().norm().item() for name, weight in model.named_parameters()}


def sample(run: Run, monitor: Monitor) -> None:
    """Continues the fixed prompts, from the run's seed, and writes the texts to ``samples.jsonl``."""
    settings = run.settings.train
    if run.parallel.strategy != "fsdp" and not run.world.is_main:
        return
    with run.parallel.whole_model():
        if not run.world.is_main:
            return
        for number, prompt in enumerate(settings.sample_prompts):
            params = SamplingParams(
                max_tokens=settings.sample_max_new_tokens, temperature=0.8, top_k=50, seed=settings.seed + number
            )
            # A model that learns to answer is asked.
            asked = question(run.tokenizer, prompt) if run.corpus.is_chat else prompt
            _record_sample(run, monitor, number, prompt, generate_text(run.model, run.tokenizer, asked, params))


def _record_sample(run: Run, monitor: Monitor, number: int, prompt: str, text: str) -> None:
    step = run.progress.step
    monitor.log_text(step, f"samples/{number}", prompt + text)
    monitor.message(f"step {step}: {prompt!r} goes on: {json.dumps(text, ensure_ascii=False)}")
    line = json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False)
    try:
        with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        monitor.warn(f"the sample of step {step} could not be written: {error}")


def _save_before(stopped: DataStopped, run: Run, monitor: Monitor) -> None:
    """Saves at the place from which the text cannot be read, and says so in the error."""
    try:
        save(run, monitor, is_best=False, is_last=True, loader_state=stopped.loader_state)
    except CheckpointError as error:
        raise CheckpointError(f"{stopped}; {error}") from stopped
    stopped.add_note(
        f"everything up to step {run.progress.step} is saved: when the text is mended, "
        f"`{resume_command(run.folder)}` goes on from there"
    )


def save(
    run: Run, monitor: Monitor, *, is_best: bool, is_last: bool, loader_state: dict[str, Any] | None = None
) -> None:
    """Writes a checkpoint. Where the disk refuses, the training goes on, but cannot end well.

    Args:
        loader_state: instead of the loader's own, where it stopped at text that cannot be read.
    """
    try:
        run.checkpointer.wait()  # for the one before, if it is written in the background
    except CheckpointError as error:
        monitor.warn(f"{error}. The training goes on")
    try:
        run.save(is_best=is_best, loader_state=loader_state)
        if is_last:
            run.checkpointer.wait()
    except CheckpointError as error:
        if is_last and run.checkpointer.steps():
            raise CheckpointError(f"{error}, and `{resume_command(run.folder)}` goes on from it") from error
        if is_last:
            raise
        monitor.warn(f"{error}. The training goes on")
