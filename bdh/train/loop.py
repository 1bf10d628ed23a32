"""The training loop: step, evaluate, sample, save, stop."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from bdh.data.batches import Batch, DataStopped
from bdh.data.corpus import ValidationPart
from bdh.distributed.world import World
from bdh.evaluate.loss import Metrics, evaluate_parts
from bdh.evaluate.probes import measure_activity
from bdh.generate.params import SamplingParams
from bdh.generate.texts import generate_text
from bdh.memory import peak_bytes
from bdh.monitor import Monitor
from bdh.tokenizer.chat import question
from bdh.train.checkpoint import CheckpointError
from bdh.train.config import RunSettings, resume_command
from bdh.train.optim import StepResult
from bdh.train.runtime import matmul_peak, training_flops_per_token
from bdh.train.setup import Run

# Slurm can send SIGUSR1 before a job's time is over (`#SBATCH --signal=USR1@120`). 75 is EX_TEMPFAIL of sysexits.h: the
# job should be retried.
EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 75}
# These can arrive twice for one event: SIGUSR1 from Slurm and, passed on, from `torchrun`; SIGHUP from the kernel and
# from the shell when a terminal is closed.
_MAY_REPEAT = ("SIGUSR1", "SIGHUP")
# Several processes agree on a signal only after multiples of this many steps, so that all end after the same step.
_AGREED_EVERY_STEPS = 10
# float16's loss scale is halved after each overflow. More skipped steps in a row than this are no search for a scale.
_MAX_SKIPPED_STEPS = 25
# The number of windows in which firing neurons are counted at each evaluation, in a fraction of its time.
_ACTIVITY_WINDOWS = 16
# A run on a CPU with more time than this left after the second step (the first one compiles) prints an estimate.
LONG_RUN_HOURS = 12.0


class TrainingStopped(ValueError):
    """The loss or a gradient is not finite or a spike; the weights are those before that step."""


def fit(run: Run, monitor: Monitor) -> str:
    """Trains until the last step, an early stop or a signal, and saves a checkpoint.

    The loop synchronizes with a GPU only after steps that are logged, shown or saved. With ``train.carry_state`` and
    the block backend it synchronizes in each step, to build the table of the positions of the states.

    Returns:
        Why training ended: "finished", "stop_at_step", "patience", or the name of a signal.

    Raises:
        DataStopped: the text cannot be read any further. The training so far is saved.
        TrainingStopped: the loss or a gradient is not finite, and such steps must not be skipped or too many were.
        CheckpointError: the last checkpoint could not be written.
        InUseError: another process has taken the folder while this one was suspended. Nothing more is written then.
    """
    settings, progress, world = run.settings.train, run.progress, run.world
    step_model = torch.compile(run.parallel.step_model) if settings.compile else run.parallel.step_model
    validation = run.corpus.validation_parts(settings.eval_windows, run.document_end)
    last_step = min(settings.max_steps, settings.stop_at_step or settings.max_steps)
    num_tokens = run.sequences_per_step * settings.block_size
    flops_per_step = training_flops_per_token(run.model.config, settings.block_size) * num_tokens
    peak_flops = matmul_peak(run.runtime) * world.size
    clock, first = StepClock(), progress.step

    with deferred_signals(says=world.is_main) as received, run.batches.prepared_ahead():
        while progress.step < last_step:
            learning_rate = run.optimizers.set_learning_rate(progress.step)
            try:
                with clock.waiting_for_data():
                    batch, num_targets = run.batches.next()
            except DataStopped as stopped:
                raise _saved_before(stopped, run, monitor) from stopped
            skip = training_step(run, step_model, batch, num_targets)
            progress.step += 1
            progress.tokens_seen += num_tokens
            clock.count(num_tokens)
            step = progress.step

            due = due_after(step, last_step, run.settings)
            stopped_by = agreed_signal(received, world, step)
            reports = any(due) or stopped_by is not None
            # A CPU needs no synchronization, so that faults are reported and the progress bar is updated at once.
            shows = not run.guard.is_on_device and (bool(skip) or (world.size == 1 and clock.bar_is_due()))
            if not (reports or shows):
                continue

            result = read_results(run, monitor)
            clock.read()
            monitor.progress(step, loss=result.loss, tokens_per_second=clock.tokens_per_second)
            hours = clock.step_seconds * (last_step - step) / 3600
            if step == first + 2 and not run.guard.is_on_device and hours > LONG_RUN_HOURS:
                monitor.message(
                    f"a step takes {clock.step_seconds:.3g} s here, and the remaining {last_step - step:,} will take "
                    f"about {hours / 24:.1f} days: --config tiny is a small model"
                )
            if not reports:
                continue
            run.lock.check(seldom=True)
            if due.log or stopped_by is not None:
                means = clock.take_means()
                values = {
                    "loss": result.loss,
                    "learning_rate": learning_rate,
                    "grad_norm": result.grad_norm,
                    "tokens": progress.tokens_seen,
                    "skipped_steps": progress.skipped_steps,
                    "tokens_per_second": clock.tokens_per_second,
                    **means,
                    "mfu": flops_per_step / means["step_seconds"] / peak_flops,
                    **{f"grad_norm/{name}": norm for name, norm in result.grad_norms.items()},
                }
                if (memory := peak_bytes(run.runtime.device)) is not None:
                    values["peak_memory_bytes"] = memory
                monitor.log(step, {f"train/{name}": value for name, value in values.items()})
            is_best = False
            with clock.paused():
                if due.evaluation:
                    is_best = evaluate(run, monitor, validation)
                if due.samples:
                    sample(run, monitor)
                if stopped_by is None and (due.evaluation or due.samples):  # a signal may have arrived meanwhile
                    stopped_by = agreed_signal(received, world, step)
                patience = settings.patience if due.evaluation else None
                out_of_patience = patience is not None and progress.evaluations_without_gain >= patience
                ends = step == last_step or out_of_patience or stopped_by is not None
                if is_best or due.checkpoint or ends:
                    save(run, monitor, is_best=is_best, is_last=ends)
            if stopped_by is not None:
                return stopped_by
            if out_of_patience:
                return "patience"
    return "finished" if progress.step >= settings.max_steps else "stop_at_step"


@contextmanager
def deferred_signals(*, says: bool = False) -> Iterator[list[str]]:
    """A context that collects the names of received signals, so that the current step is completed before the run ends.

    A second signal has its usual effect at once, except for SIGUSR1 and SIGHUP, which can arrive twice. An ignored
    SIGHUP stays ignored, as under ``nohup``. Outside of the main thread, where Python delivers no signals, it collects
    nothing.

    Args:
        says: whether to acknowledge each signal with a line on stderr, since a step can take minutes.
    """
    received: list[str] = []
    before: dict[int, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if says and name not in received:
            again = "" if name in _MAY_REPEAT else f"; a second {name} ends the run at once, without saving"
            with suppress(OSError):  # stderr may be closed; print is not reentrant, so a handler must not call it
                os.write(2, f"\n{name}: finishing the step, then saving{again}\n".encode())
        received.append(name)
        if name not in _MAY_REPEAT:
            restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in EXIT_STATUS if hasattr(signal, name)):
            if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, remember)
    try:
        yield received
    finally:
        restore()


class Due(NamedTuple):
    """The actions that are due after a step."""

    log: bool
    evaluation: bool
    samples: bool
    checkpoint: bool


def due_after(step: int, last_step: int, settings: RunSettings) -> Due:
    """Returns the actions that are due after a step. ``last_step`` is the last one if the run ends before max_steps."""
    train, is_last = settings.train, step == settings.train.max_steps
    return Due(
        log=step % settings.monitor.log_every_steps == 0 or step == last_step,
        evaluation=step % train.eval_every_steps == 0 or is_last,
        samples=train.sample_every_steps > 0 and (step % train.sample_every_steps == 0 or is_last),
        checkpoint=step % settings.checkpoint.every_steps == 0 or step == last_step,
    )


def agreed_signal(received: list[str], world: World, step: int) -> str | None:
    """Returns a signal that any process received, the same in all; None between the steps at which they agree."""
    if world.size > 1:
        if step % _AGREED_EVERY_STEPS:
            return None
        flags = world.any([name in received for name in EXIT_STATUS])
        received = [name for name, flag in zip(EXIT_STATUS, flags, strict=True) if flag]
    return next((name for name in EXIT_STATUS if name in received), None)


class StepClock:
    """Measures the time of training steps, without evaluation, samples and checkpoints between them.

    On a GPU steps are launched asynchronously, so times are only known between two readings, which synchronize.
    """

    _BAR_SECONDS = 0.25

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        """The throughput over about the last twenty steps."""
        self.step_seconds = 0.0
        """The mean time of the steps between the last two readings."""
        self._start = self._moved = time.perf_counter()
        self._tokens = self._steps = self._read_steps = self._mean_steps = 0
        self._seconds = self._data_seconds = 0.0

    def count(self, num_tokens: int) -> None:
        """Counts a launched step."""
        self._tokens += num_tokens
        self._steps += 1

    def read(self) -> None:
        """Takes a reading. All launched steps must have completed."""
        now = time.perf_counter()
        seconds, steps = max(now - self._start, 1e-9), self._steps
        self.step_seconds = seconds / max(1, steps)
        # The first steps are slower, since they compile and warm up.
        kept = 0.95**steps if self._read_steps >= 5 else 0.0
        self.tokens_per_second = kept * self.tokens_per_second + (1 - kept) * self._tokens / seconds
        self._read_steps += steps
        self._mean_steps += steps
        self._seconds += seconds
        self._tokens = self._steps = 0
        self._start = self._moved = now

    def bar_is_due(self) -> bool:
        """Whether the progress bar has not been updated for a while."""
        return time.perf_counter() - self._moved > self._BAR_SECONDS

    def take_means(self) -> dict[str, float]:
        """Returns the mean seconds per step, and of waiting for its data, over the steps since the last call."""
        steps = max(1, self._mean_steps)
        means = {"step_seconds": self._seconds / steps, "data_seconds": self._data_seconds / steps}
        self._mean_steps, self._seconds, self._data_seconds = 0, 0.0, 0.0
        return means

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


def training_step(run: Run, step_model: Callable[..., Any], batch: Batch, num_targets: int) -> torch.Tensor:
    """Computes the forward and backward passes of a step, and updates the weights, without synchronizing with a GPU.

    With several processes, each computes its part of the sequences, and the gradients are those of all. The results
    are kept until :func:`read_results`. A step whose loss or gradient is not finite, or whose gradient is a spike, does
    not change the weights.

    Args:
        run: the run.
        step_model: the model to call, which may be compiled or wrapped.
        batch: this process's sequences.
        num_targets: the number of targets of all processes.

    Returns:
        Whether the update was skipped: bool (), on the device.
    """
    settings, world = run.settings.train, run.world
    run.model.train()
    run.optimizers.zero_grad()
    with run.rounded_weights():
        loss = _add_gradients(run, step_model, batch, num_targets)
    if run.guard.needs_loss_of_all:
        world.sum(loss)

    weights = {name: p for name, p in run.model.named_parameters() if p.grad is not None}
    gradients = [p.grad for p in weights.values() if p.grad is not None]
    if run.loss_scale.is_enabled:
        for gradient in gradients:
            gradient /= run.loss_scale.value
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    norms = norms.full_tensor() if isinstance(norms, DTensor) else norms
    norm = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(weights.values(), settings.grad_clip or math.inf, norm)
    skip = run.guard.judge(loss, norm, norms, tuple(weights))
    if run.settings.checkpoint.in_background:
        run.checkpointer.wait_until_copied()  # a checkpoint in the background may still be copying the weights
    run.optimizers.step(skip, on_device=run.guard.is_on_device)
    run.loss_scale.update(norm)
    if run.carried:
        # A non-finite loss makes the norm NaN in every process. In float16 an overflow does so as well.
        run.carried.forget(~loss.isfinite() if run.loss_scale.is_enabled else norm.isnan())
    if run.average is not None:
        run.average.update(run.model, run.progress.step + 1, unless=skip)
    return skip


def _add_gradients(run: Run, step_model: Callable[..., Any], batch: Batch, num_targets: int) -> torch.Tensor:
    """Computes the forward and backward passes of a step's micro-batches. Returns this process's part of the loss."""
    device, world = run.runtime.device, run.world
    loss = torch.zeros((), device=device, dtype=run.model.dtype)
    micro_batches = list(batch.split(run.settings.train.batch_size))
    for index, micro_batch in enumerate(micro_batches):
        micro_batch = micro_batch.to(device)
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else run.parallel.without_exchange():
            with run.autocast:
                output = step_model(
                    input_ids=micro_batch.input_ids,
                    shift_labels=micro_batch.targets,
                    document_starts=micro_batch.starts,
                    num_items_in_batch=max(1, num_targets),
                    cache=run.carried.before(index) if run.carried else None,
                    use_cache=run.carried is not None,
                )
            if run.carried:
                run.carried.keep(index, output.cache)
            # Gradients are averaged over processes, but the loss is a sum over them. A non-finite loss makes the
            # gradients of every process non-finite.
            its_loss = output.loss.detach()
            factor = (run.loss_scale.value * world.size).to(its_loss)
            output.loss.backward(torch.where(its_loss.isfinite(), factor, math.nan))
        loss += its_loss
    return loss


def read_results(run: Run, monitor: Monitor) -> StepResult:
    """Returns the result of the last step. Synchronizes with the device, and warns of steps that were skipped.

    Raises:
        TrainingStopped: a loss or gradient is not finite or is a spike, and ``train.on_nonfinite`` is "stop". The
            weights are those before that step, since no later step has changed them. Also if too many steps in a row
            were skipped.
    """
    progress = run.progress
    results = run.guard.read(progress.step)
    for result in results:
        if result.fault is not None and run.settings.train.on_nonfinite == "stop":
            raise TrainingStopped(
                f"step {result.step}: {result.fault}; the weights are those after step {result.step - 1}. A lower "
                "train.learning_rate or a longer train.warmup_steps may help; train.on_nonfinite=skip leaves such steps out"
            )
        progress.skipped_steps += not result.updated
        progress.skipped_in_a_row = 0 if result.updated else progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row > _MAX_SKIPPED_STEPS:
            raise TrainingStopped(
                f"step {result.step}: {progress.skipped_in_a_row} steps in a row were skipped because of their loss or "
                "gradient; the weights are those before them"
            )
        if result.fault is not None:
            monitor.warn(f"step {result.step}: {result.fault}: it did not change the weights")
    return results[-1]


def evaluate(run: Run, monitor: Monitor, validation: list[ValidationPart]) -> bool:
    """Evaluates the model on the validation sequences, over all processes. Returns whether it is the best so far."""
    progress, step, world = run.progress, run.progress.step, run.world

    def measure() -> tuple[Metrics, dict[str, Metrics]]:
        return evaluate_parts(
            run.model,
            validation,
            autocast=run.runtime.autocast,
            sequences=slice(world.rank, None, world.size),
            sum_over_processes=world.sum if world.size > 1 else None,
        )

    with run.measured_model():
        metrics, by_source = measure()
        values = metrics.as_dict("val/") | metrics.loss_at("val/")
        for name, of_source in by_source.items():
            values |= of_source.as_dict(f"val/{name}/")
        if world.is_main:
            windows = run.corpus.validation_windows(min(run.settings.train.eval_windows, _ACTIVITY_WINDOWS))
            activity = measure_activity(run.model, windows[:, :-1], autocast=run.runtime.autocast)
            values |= activity.as_dict("val/")
            for kind, layer_steps in activity.samples.items():
                for index, sampled in enumerate(layer_steps):
                    monitor.log_histogram(step, f"val/{kind}/{index}", sampled)
    with run.parallel.whole_model():
        for name, weight in run.model.named_parameters() if world.is_main else ():
            values[f"weights/norm/{name}"] = weight.detach().norm().item()
            monitor.log_histogram(step, f"weights/{name}", weight)
    progress.last_metrics = metrics.as_dict()
    num_windows = sum(len(part.batch.tokens) for part in validation)
    progress.last_evaluation = {"step": step, "windows": num_windows, "tokens": metrics.num_tokens}
    averaged = ""
    if run.average is not None:
        with run.average.in_place_of_weights(run.model), run.measured_model():
            of_average, _ = measure()
        progress.last_ema_metrics = of_average.as_dict()
        values |= of_average.as_dict("val_ema/")
        averaged = f"; moving average: loss {of_average.loss:.4f}"
    values = world.gather(values)[0]  # only rank 0 has counted the neurons
    monitor.log(step, values)
    is_best = _take_best(run, values)
    of_sources = "".join(f"; {name}: loss {each.loss:.4f}" for name, each in by_source.items())
    fired = [value for name, value in values.items() if name.startswith("val/density/x/")]
    monitor.message(
        f"step {step}: validation loss {metrics.loss:.4f} nats per token, perplexity {metrics.perplexity:.2f}, "
        f"{metrics.bits_per_byte:.3f} bits per byte, accuracy {metrics.accuracy:.1%}, "
        f"{sum(fired) / len(fired):.1%} of the neurons fire{of_sources}{averaged}{' (best)' if is_best else ''}"
    )
    return is_best


def _take_best(run: Run, values: dict[str, float]) -> bool:
    """Returns whether ``checkpoint.best_metric`` is better than in all earlier evaluations, and records it if so."""
    progress, name, mode = run.progress, run.settings.checkpoint.best_metric, run.settings.checkpoint.best_mode
    if name not in values:
        raise ValueError(f"checkpoint.best_metric is {name!r}, which was not measured: there are {', '.join(values)}")
    value, best = values[name], progress.best_value
    is_high = mode == "max" or (mode == "auto" and "accuracy" in name)
    is_best = math.isfinite(value) and (best is None or (value > best if is_high else value < best))
    progress.evaluations_without_gain += 1
    if is_best:
        progress.best_value, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
    return is_best


def sample(run: Run, monitor: Monitor) -> None:
    """Generates continuations of the fixed prompts with the run's seed, and appends them to ``samples.jsonl``."""
    settings, step = run.settings.train, run.progress.step
    if run.parallel.strategy != "fsdp" and not run.world.is_main:
        return
    with run.measured_model():
        for number, prompt in enumerate(settings.sample_prompts if run.world.is_main else []):
            length, seed = settings.sample_max_new_tokens, settings.seed + number
            params = SamplingParams(max_tokens=length, temperature=0.8, top_k=50, seed=seed)
            # A chat model gets the prompt as a user message.
            asked = question(run.tokenizer, prompt) if run.corpus.is_chat else prompt
            text = generate_text(run.model, run.tokenizer, asked, params)
            monitor.log_text(step, f"samples/{number}", prompt + text)
            monitor.message(f"step {step}: {prompt!r} continues: {json.dumps(text, ensure_ascii=False)}")
            line = json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False)
            try:
                with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                monitor.warn(f"the sample of step {step} could not be written: {error}")


def save(run: Run, monitor: Monitor, *, is_best: bool, is_last: bool, is_before_fault: bool = False) -> None:
    """Writes a checkpoint; arguments as for :meth:`Run.save`. If it fails, training continues, unless it has ended."""
    try:
        run.checkpointer.wait()  # for the previous checkpoint, if it is written in the background
    except CheckpointError as error:
        monitor.warn(f"{error}. The training continues")
    try:
        run.save(is_best=is_best, is_before_fault=is_before_fault)
        if is_last:
            run.checkpointer.wait()
    except CheckpointError as error:
        if is_last and run.checkpointer.steps():
            raise CheckpointError(f"{error}, and `{resume_command(run.folder)}` continues from it") from error
        if is_last:
            raise
        monitor.warn(f"{error}. The training continues")


def _saved_before(stopped: DataStopped, run: Run, monitor: Monitor) -> Exception:
    """Saves a checkpoint at the position from which the text cannot be read, and returns the exception to raise."""
    error = DataStopped(f"step {run.progress.step + 1}: {stopped}")
    if run.guard.has_unread:
        read_results(run, monitor)
    try:
        save(run, monitor, is_best=False, is_last=True, is_before_fault=True)
    except CheckpointError as failed:
        return CheckpointError(f"{error}; {failed}")
    error.add_note(
        f"everything up to step {run.progress.step} is saved: once the text is corrected, "
        f"`{resume_command(run.folder)}` continues from there"
    )
    return error
