"""``bdh train --dry_run``: estimates the memory and time of a run, and suggests changes if it does not fit.

It measures real training steps with a growing number of sequences, as far as memory and a few seconds allow, and
extrapolates memory and time linearly to the whole step. The memory that other settings would need is calculated from
the settings alone.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from bdh.data.batches import Batch
from bdh.distributed.config import local_world_size
from bdh.distributed.world import World, choose_strategy
from bdh.memory import available_bytes, give_back_free_memory, peak_bytes, reset_peak, used_bytes
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.config_fields import ConfigFields
from bdh.model.modeling import MAX_LOGITS_IN_ONE_PIECE
from bdh.ops.attention import sum_dtype
from bdh.ops.blocks.plan import LayerPlan
from bdh.train.adapters import add_adapters
from bdh.train.carried import CarriedState
from bdh.train.config import RunSettings, TrainSettings
from bdh.train.loop import training_step
from bdh.train.runtime import Runtime, plan_training
from bdh.train.setup import Run
from bdh.words import counted, gigabytes, is_out_of_memory

_logger = logging.getLogger(__name__)

MARGIN = 0.95
"""The fraction of the available memory that a run may use."""
_MEASURING_SECONDS = 20.0  # a step that is expected to take longer is not measured
_LOADED_BYTES = 2 * 10**8  # what the first step on a CPU loads: compiled kernels and libraries
_TRUSTED_BYTES = 2**26  # less growth than this is not trusted: allocation sizes are as large
_DOUBT_OF_EAGER = 1.6  # on the plain path, estimates were up to this many times what runs took
_LEAST_SAVING = 0.01  # changes that save a smaller fraction are not suggested
_LEAST_SIZE = 16  # the smallest suggested block size and width


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that one process of a run needs, calculated from the settings without creating any weights."""

    settings: RunSettings
    config: BDHConfig
    runtime: Runtime
    world: World

    def changed(self, section: str = "train", **fields: Any) -> "MemoryEstimate":
        """Returns the estimate for other settings in a section. Raises ``ValueError`` if model settings conflict."""
        settings = replace(self.settings, **{section: replace(getattr(self.settings, section), **fields)})
        config = self.config
        if section == "model":
            config = BDHConfig(**{name: getattr(config, name) for name in ConfigFields.__annotations__} | fields)
        return replace(self, settings=settings, config=config)

    def of_step(self, number: int) -> "MemoryEstimate":
        """Returns the estimate for a measured step of ``number`` sequences, without the copy for a checkpoint.

        Its micro-batches and blocks have at most ``number`` sequences.
        """
        size = min(number, self.settings.train.batch_size)
        step = self.changed(**_micro_batches(self.settings.train, size, number))
        return step.changed("checkpoint", in_background=False)

    @cached_property
    def plan(self) -> LayerPlan:
        """The plan for the layer. Raises ``ValueError`` if the settings require something that is not available."""
        return plan_training(self.settings.train, self.config, self.runtime, self.settings.distributed)

    @cached_property
    def parts(self) -> dict[str, int]:
        """The number of bytes for each purpose. Raises as :attr:`plan`."""
        train, config, plan = self.settings.train, self.config, self.plan
        strategy = choose_strategy(self.settings.distributed, self.world)
        itemsize = 8 if self.runtime.dtype == torch.float64 else 4

        def own(number: int) -> int:
            """Returns the bytes of this process's part of ``number`` values that belong to the weights."""
            return -(-number // self.world.size) * itemsize if strategy == "fsdp" else number * itemsize

        with torch.device("meta"):
            model = BDHForCausalLM(config)
            if train.lora.r:
                add_adapters(model, train.lora)
        weights = sum(p.numel() for p in model.parameters())
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        number = sum(trained.values())
        embeddings = sum(each for name, each in trained.items() if name.startswith(("embed.", "lm_head.")))
        tokens = train.batch_size * train.block_size
        # For each layer step: its input, the inputs of two norms, and the sum to which it is added. Then the logits,
        # with gradient and softmax.
        logits = 3 * min(tokens * config.vocab_size, MAX_LOGITS_IN_ONE_PIECE)
        narrow = 4 * (4 * (config.n_layer + 1) * tokens * config.n_embd + logits)
        found = {
            "weights": own(weights),
            "gradients": own(number) * (2 if strategy == "ddp" else 1),  # DDP exchanges copies
            "optimizer": own(2 * number if train.optimizer == "adamw" else number + embeddings),
            "wide activations of a block": plan.working_bytes(config.n_layer),
            "wide activations that are kept": plan.kept_bytes,
            "narrow activations": narrow + 8 * tokens * train.gradient_accumulation_steps,
        }
        if strategy == "fsdp":
            gathered = getattr(torch, self.settings.distributed.param_dtype).itemsize
            found["weights and gradients, gathered"] = (weights + number) * gathered
        if train.quantize is not None:  # the layer's weights, which each process has completely
            found["rounded weights"] = 3 * config.n_embd * config.n_head * config.neurons_per_head * itemsize
        copied = found["weights"] + found["optimizer"]
        if train.ema_decay is not None:
            found["moving average"] = own(number)
            copied += own(number)
        if train.carry_state:  # the state before a micro-batch is kept beside that after it
            numbers = config.n_layer * config.n_head * config.neurons_per_head * config.n_embd
            state = numbers * sum_dtype(self.runtime.dtype).itemsize
            found["carried state"] = state * (train.sequences_per_process + train.batch_size)
            copied += state * train.sequences_per_process
        is_copied = self.settings.checkpoint.in_background
        if is_copied and self.runtime.device.type != "cuda":  # for a GPU, the copy is in the memory of the machine
            found["copy for the checkpoint"] = copied
        return found

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fixed(self) -> int:
        """The number of bytes that are needed before anything is computed."""
        return sum(size for name, size in self.parts.items() if "activations" not in name and "copy" not in name)


def changes(now: MemoryEstimate) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields other settings that may need less memory.

    For each kind of change, these are the section and the values to set, each of which needs less than the one before.
    """
    settings, train, config, plan = now.settings, now.settings.train, now.config, now.plan
    sizes = [size for size in range(train.batch_size // 2, 0, -1) if train.batch_size % size == 0]
    if train.layer_path == "plain":
        yield "train", [{"layer_path": "auto"}]
    yield "train", [_micro_batches(train, size, train.sequences_per_process) for size in sizes]
    yield "checkpoint", [{"in_background": False}]
    yield "train", [{"recompute": "pass"}]
    if plan.backend != "eager":
        yield "train", [{"rows_per_block": size} for size in _halved(plan.sizes.sequences)]
        yield "train", [{"tokens_per_block": size} for size in _halved(plan.sizes.tokens)]
    if now.world.size > 1:
        yield "distributed", [{"strategy": "fsdp"}]
    if not settings.resume:
        shorter, columns = _halved(train.block_size, _LEAST_SIZE), train.tokens_per_block
        yield "train", [{"block_size": size, "tokens_per_block": columns and min(columns, size)} for size in shorter]
        if train.init_from is None:
            yield "model", [{"mlp_internal_dim_multiplier": n} for n in _halved(config.mlp_internal_dim_multiplier)]
            yield "model", [{"n_embd": size} for size in _halved(config.n_embd, _LEAST_SIZE)]


@dataclass
class Forecast:
    """The expected memory and time of a run, for one process, and suggestions if it does not fit."""

    estimate: MemoryEstimate
    base: int
    """The bytes that the process uses in addition to the estimate, for the program itself."""
    available: int
    """The bytes that are available to each process, including those that it already uses."""
    steps: int = 0
    """The number of steps to do. ``evaluated_sequences`` is the number of sequences that this process evaluates
    meanwhile."""
    evaluated_sequences: int = 0
    points: list[tuple[int, float, int | None]] = field(default_factory=list)
    """The measured steps: the number of sequences, the seconds, and the peak memory in bytes if the system records it.
    With several processes, seconds and bytes are the maximum over all of them."""
    obstacle: str = ""
    """Why nothing, or no more, was measured, if the reason was a lack of memory."""
    ran_out_at: int | None = None
    """The number of sequences in a step that ran out of memory, whatever the system reported as available."""

    def peak_with(self, estimate: MemoryEstimate) -> float:
        """Returns the expected peak memory in bytes with the settings of an estimate.

        It is the peak of the measured step whose estimate is most similar, plus the difference between the two
        estimates. If the measurements show how peaks grow with their estimates, the difference is scaled by this ratio,
        but never so that the result becomes more optimistic. Without measurements, the result is the estimate.
        """
        known = [(self.estimate.of_step(number).total, peak) for number, _, peak in self.points if peak is not None]
        if not known:
            return self.program + estimate.total
        nearest, peak = min(known, key=lambda point: abs(estimate.total - point[0]))
        (first, first_peak), (last, last_peak) = known[0], known[-1]
        ratio = (last_peak - first_peak) / (last - first) if last - first >= _TRUSTED_BYTES else 1.0
        # If the ratio shows that estimates are wrong, only the more pessimistic correction is applied.
        difference = estimate.total - nearest
        found = peak + difference * (max(1.0, ratio) if difference > 0 else min(1.0, max(0.0, ratio)))
        # Another path can need so much less memory that a small error in the estimate of this one would exceed it.
        is_same_path = estimate.plan.backend == self.estimate.plan.backend
        return found if is_same_path else max(found, float(self.base + estimate.total))

    @property
    def program(self) -> int:
        """The bytes that no setting determines: what the process already uses, and what its first step loads."""
        return self.base + (0 if self.estimate.runtime.device.type == "cuda" else _LOADED_BYTES)

    @property
    def peak(self) -> float:
        return self.peak_with(self.estimate)

    @property
    def limit(self) -> float:
        """The maximum number of bytes that the peak may have."""
        return MARGIN * self.available

    @property
    def fits(self) -> bool:
        return bool(self.points) and self.ran_out_at is None and self.peak <= self.limit

    @property
    def seconds(self) -> tuple[float, float]:
        """The time of a step and of each of its sequences, extrapolated linearly from the last two measured steps.

        If the time decreases with the number of sequences, due to noise, it is assumed to be constant. With a single
        measured step, it is assumed to be proportional to the number of sequences.
        """
        (x, before, _), (y, last, _) = [(0, 0.0, None), *self.points][-2:]
        each = max(0.0, (last - before) / (y - x))
        return last + each * (self.estimate.settings.train.sequences_per_process - y), each

    def lines(self) -> list[str]:
        """Returns the lines of a readable report."""
        train, size = self.estimate.settings.train, self.estimate.world.size
        parts = self.estimate.parts | {"the program itself": self.program}
        parts["sum of these counts"] = sum(parts.values())
        width = max(map(len, parts))
        found = [f"  {name:<{width}}  {gigabytes(num_bytes):>10}" for name, num_bytes in parts.items()]
        available = f"{gigabytes(self.available)} that are available{' per process' * (size > 1)}"
        measured = max((count for count, _, peak in self.points if peak is not None), default=0)
        whole = min(train.sequences_per_process, 2 * train.batch_size)  # further micro-batches need no more memory
        if measured == 0:
            how = "that sum, not measured"
        elif measured < whole:
            how = f"extrapolated from {measured} of {counted(whole, 'sequence')}"
        else:
            how = "measured"
        found.append(f"peak memory   {gigabytes(self.peak)} of the {available} ({how})")
        if self.points:
            seconds, each = self.seconds
            tokens = train.sequences_per_process * train.block_size * size
            # A forward pass is about a third of one with its backward pass.
            run_seconds = self.steps * seconds + self.evaluated_sequences * each / 3
            counts = " and ".join(", ".join(str(count) for count, _, _ in self.points).rsplit(", ", 1))
            also = f"; {self.obstacle}" * bool(self.obstacle)
            found += [
                f"step          {seconds:,.2f} s: {tokens / seconds:,.0f} tokens/s",
                f"run           {_duration(run_seconds)} for {counted(self.steps, 'step')} and their evaluations",
                f"measured      steps of {counts} {'sequence' if counts == '1' else 'sequences'}{also}",
            ]
        else:
            found.append(f"not measured: {self.obstacle}")
        if not self.fits:
            advice = self.advice()
            found.append("it does not fit; what would help, the mildest first:" if advice else "it does not fit")
            found += [f"  {line}" for line in advice]
        return found

    def advice(self) -> list[str]:
        """Returns suggested changes, starting with the mildest.

        Settings that do not affect the result come first, and then those that train another model. For each kind of
        change, it is the smallest one that fits on its own, or else the one that needs the least memory, if that is
        less than now.
        """
        estimate, now, limit = self.estimate, self.peak, self.limit
        if self.ran_out_at is not None:
            limit = min(limit, self.peak_with(estimate.of_step(self.ran_out_at)) - 1)
        never_fits = self.base + estimate.fixed > limit
        lines, is_enough = [], False
        for section, options in changes(estimate):
            before, less = getattr(estimate.settings, section), []
            for fields in options:
                try:
                    changed = estimate.changed(section, **fields)
                    peak = self.peak_with(changed)
                except ValueError:  # it conflicts with other settings, such as a memory budget or the heads
                    continue
                helps = changed.fixed < estimate.fixed or not never_fits
                if helps and (peak < (1 - _LEAST_SAVING) * now or peak <= min(limit, now - 1)):
                    less.append((peak, fields))
                    if peak <= limit:
                        break
            if less:
                peak, fields = min(less, key=lambda each: each[0])
                is_enough |= peak <= limit
                other = {name: str(value).lower() for name, value in fields.items() if value != getattr(before, name)}
                flags = " ".join(f"--{section}.{name} {value}" for name, value in other.items())
                if section == "distributed":
                    flags += ", which shares weights, gradients and optimizer among the processes"
                lines.append(f"{flags}: {gigabytes(peak)}" + ", which alone does not fit either" * (peak > limit))
        if lines and not is_enough:
            lines.append("none of these is enough alone: combine them, or train where there is more memory")
        return lines


class NoRoomError(Exception):
    """The weights, and the data that belong to each of them, need more memory than there is."""

    def __init__(self, forecast: Forecast):
        self.forecast = forecast


def check_room(settings: RunSettings, config: BDHConfig, runtime: Runtime, world: World, passing: int) -> None:
    """Compares the memory that a run needs with what is available, before the model is created.

    All processes must call it together. A run that probably needs more memory only causes a warning, since the need is
    estimated, and systems react differently to a lack of memory.

    Args:
        settings: the settings of the run.
        config: the configuration of the model.
        runtime: where and how the run computes.
        world: its processes.
        passing: bytes in use now that will be free before the first step.

    Raises:
        NoRoomError: in a dry run, in all processes: there is no memory for the model and its optimizer.
    """
    estimate = MemoryEstimate(settings, config, runtime, world)
    found = _before_steps(estimate, passing=passing)
    doubt = _DOUBT_OF_EAGER if estimate.plan.backend == "eager" else 1.0
    if not settings.dry_run and found.peak > doubt * found.available:
        need = f"this run probably needs {gigabytes(found.peak)}"
        each = " in each process" * (world.size > 1)
        advice = "to measure it, and see what would help, run the same command with --dry_run"
        _logger.warning("%s%s, and %s are available: %s", need, each, gigabytes(found.available), advice)
    if settings.dry_run and found.base + estimate.fixed > found.available:
        world.leave()
        found.obstacle = "the weights and what belongs to them do not fit"
        raise NoRoomError(found)


class _OutOfMemoryError(Exception):
    """A step ran out of memory, in this process or in another one."""


def forecast(run: Run, *, say: Callable[[str], None] = lambda line: None) -> Forecast:
    """Measures a run of ``settings.dry_run``. This trains the model, so the run cannot be used afterwards.

    All processes of the run must call this together, and get the same result.

    Args:
        run: the run.
        say: called with a line of text before each measured step.
    """
    world, train, plan = run.world, run.settings.train, run.plan
    estimate = MemoryEstimate(run.settings, run.model.config, run.runtime, world)
    found = _before_steps(estimate, "weights", "moving average", *["optimizer"] * (run.progress.step > 0))
    found.steps, found.evaluated_sequences = _work_left(run)

    def has_room(count: int) -> bool:
        return found.peak_with(estimate.of_step(count)) <= found.limit

    counts = [1 if plan.backend == "eager" else min(plan.sizes.sequences, train.batch_size)]
    while counts[0] > 1 and not has_room(counts[0]):
        counts[0] //= 2
    if not has_room(count := counts[0]):
        found.obstacle = "a step of a single sequence does not fit"
        return found
    while counts[-1] < train.batch_size:
        counts.append(min(2 * counts[-1], train.batch_size))
    if train.gradient_accumulation_steps > 1:  # a second micro-batch shows what a step does once
        counts.append(2 * train.batch_size)
    loader = run.corpus.train_loader(
        count * world.size, train.seed, world.rank, world.size, carry_state=train.carry_state
    )
    sequences = loader.next()
    step_model = torch.compile(run.parallel.step_model) if train.compile else run.parallel.step_model
    say("a first step, which compiles and fills the optimizer ...")
    try:
        _measured_step(run, step_model, sequences, count)
        for count in counts:
            if found.points:
                before, its_seconds, _ = found.points[-1]
                if its_seconds * count / before > _MEASURING_SECONDS or not has_room(count):
                    break
            say(f"a step of {count} of {train.sequences_per_process} sequences ...")
            found.points.append((count, *_measured_step(run, step_model, sequences, count)))
    except _OutOfMemoryError:
        found.ran_out_at, found.obstacle = count, f"there was no memory for a step of {count}"
    return found


def _measured_step(run: Run, step_model: Callable[..., Any], sequences: Batch, count: int) -> tuple[float, int | None]:
    """Returns the time in seconds and the peak memory of a training step, each the maximum over all processes.

    Raises ``_OutOfMemoryError`` in all processes.
    """
    settings, device, world = run.settings, run.runtime.device, run.world
    size = min(count, settings.train.batch_size)
    # The most expensive steps of the run are those that round.
    run.settings = replace(settings, train=replace(settings.train, batch_size=size, quantize_from_step=0))
    batch = Batch.stack([sequences] * math.ceil(count / len(sequences.tokens)))[:count]
    if run.carried is not None:
        run.carried = CarriedState(run.model, -(-count // size), size)
    give_back_free_memory()
    reset_peak(device)
    num_targets = sum(world.gather(batch.num_targets))
    failed, start = False, time.perf_counter()
    try:
        training_step(run, step_model, batch, num_targets)
        run.guard.read(run.progress.step)  # waits for the device
    except (RuntimeError, MemoryError) as error:
        failed = is_out_of_memory(error)
        if not failed:
            raise
    finally:
        run.settings = settings
    seconds = time.perf_counter() - start
    if any(world.any([failed])):
        raise _OutOfMemoryError
    measured = world.gather((seconds, peak_bytes(device)))
    peaks = [peak for _, peak in measured if peak is not None]
    return max(each for each, _ in measured), max(peaks, default=None)


def _work_left(run: Run) -> tuple[int, int]:
    """Returns the number of steps to do, and the maximum number of sequences that a process evaluates meanwhile."""
    train, most = run.settings.train, run.settings.train.max_steps
    steps = range(run.progress.step + 1, min(most, train.stop_at_step or most) + 1)
    evaluations = sum(step % train.eval_every_steps == 0 or step == most for step in steps)
    parts = run.corpus.validation_parts(train.eval_windows, run.document_end) if evaluations else []
    sequences = sum(-(-len(part.batch.tokens) // run.world.size) for part in parts)
    return len(steps), evaluations * sequences * (1 if run.average is None else 2)


def _before_steps(estimate: MemoryEstimate, *there: str, passing: int = 0) -> Forecast:
    """Returns a forecast with the memory that is available now, the same in all processes.

    Args:
        estimate: the estimate.
        there: the names of the parts that already exist.
        passing: bytes in use now that will be free before the first step.
    """
    give_back_free_memory()
    device, world = estimate.runtime.device, estimate.world
    used = used_bytes(device)
    base = max(0, used - passing - sum(estimate.parts.get(name, 0) for name in there))
    found = world.gather((base, used + available_bytes(device, local_world_size())))
    return Forecast(estimate, max(base for base, _ in found), min(available for _, available in found))


def _micro_batches(train: TrainSettings, size: int, number: int) -> dict[str, Any]:
    """Returns settings for a step of ``number`` sequences in micro-batches of ``size`` sequences."""
    rows = train.rows_per_block and min(train.rows_per_block, size)
    return {"batch_size": size, "gradient_accumulation_steps": number // size, "rows_per_block": rows}


def _halved(number: int, least: int = 1) -> list[int]:
    return [size for halvings in range(1, number.bit_length()) if (size := number >> halvings) >= least]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
