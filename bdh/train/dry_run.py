"""``bdh train --dry_run``: what a run will take of this machine, and what to change where that is too much.

Real training steps of a growing number of sequences are measured, as far as memory and a few seconds allow; time and memory of
the whole batch are on the line through them. What other settings would take is counted from the settings alone.
"""

import ctypes
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from bdh.data.batches import Batch
from bdh.distributed.config import local_world_size
from bdh.distributed.world import World
from bdh.memory import available_bytes, peak_bytes, reset_peak, used_bytes
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.config_fields import ConfigFields
from bdh.model.modeling import MAX_LOGITS_IN_ONE_PIECE
from bdh.model.weights import layer_modules, product_obstacle
from bdh.ops.attention import sum_dtype
from bdh.ops.blocks.plan import LayerPlan
from bdh.train.adapters import add_adapters
from bdh.train.carried import CarriedState
from bdh.train.config import RunSettings
from bdh.train.loop import training_step
from bdh.train.runtime import Runtime, plan_settings
from bdh.train.setup import Run

MARGIN = 0.95
"""Of the available memory: more than that is not counted on."""
MEASURING_SECONDS = 20.0
"""A step that is expected to take longer is not measured."""
_LOADED_BYTES = 2 * 10**8  # what the first step on a CPU loads: compiled kernels and libraries
_TRUSTED_BYTES = 2**26  # of growth: below that, an allocator's steps are larger than what is measured
_LEAST_SAVING = 0.01  # a share: what saves less is not worth a line
_LEAST_SIZE = 16  # of a training sequence, and of the model's width, that is proposed


@dataclass(frozen=True)
class MemoryEstimate:
    """What one process of a run needs, counted from its settings: no weight has to be there for it."""

    settings: RunSettings
    config: BDHConfig
    runtime: Runtime
    strategy: str = "none"
    processes: int = 1

    def changed(self, section: str = "train", **fields: Any) -> "MemoryEstimate":
        """With other settings of a section. Raises ``ValueError`` where those of the model do not go together."""
        settings = replace(self.settings, **{section: replace(getattr(self.settings, section), **fields)})
        config = self.config
        if section == "model":
            config = BDHConfig(**{name: getattr(config, name) for name in ConfigFields.__annotations__} | fields)
        return replace(self, settings=settings, config=config)

    def of_sequences(self, number: int) -> "MemoryEstimate":
        """With so many sequences in a micro-batch, and blocks of at most as many."""
        return self.changed(batch_size=number, rows_per_block=_at_most(self.settings.train.rows_per_block, number))

    @cached_property
    def plan(self) -> LayerPlan:
        """Raises ``ValueError`` where the settings ask for what is not there."""
        train, obstacle = self.settings.train, None
        if train.lora.r:  # a model of the least size has the same obstacle; one on meta has another
            heads = self.config.n_head
            least = BDHConfig(n_embd=2, mlp_internal_dim_multiplier=heads, n_head=heads, n_layer=1, vocab_size=2)
            model = BDHForCausalLM(least)
            add_adapters(model, train.lora)
            obstacle = product_obstacle(layer_modules(model.train()))
        return plan_settings(train, self.config, self.runtime, self.settings.distributed, obstacle=obstacle)

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes, by what they are for."""
        train, plan, config = self.settings.train, self.plan, self.config
        weights, trained, optimizer = self._numbers
        block = plan.block_bytes
        if plan.backend == "eager":  # what is computed again has its gradients beside it; what is kept is all there is
            block = 2 * plan.block_bytes if plan.kept_layer_steps < config.n_layer else 0
        tokens = train.batch_size * train.block_size
        # Of each layer step its input, two norms' inputs and the sum that it adds to; and the logits with gradient and softmax.
        logits = 3 * min(tokens * config.vocab_size, MAX_LOGITS_IN_ONE_PIECE)
        narrow = 4 * (4 * (config.n_layer + 1) * tokens * config.n_embd + logits)
        found = {
            "weights": self._own(weights),
            "gradients": self._own(trained) * (2 if self.strategy == "ddp" else 1),  # DDP copies them to exchange them
            "optimizer": self._own(optimizer),
            "wide activations of a block": block,
            "wide activations that are kept": plan.kept_bytes,
            "narrow activations": narrow + 8 * tokens * train.gradient_accumulation_steps,
        }
        if self.strategy == "fsdp":
            gathered = getattr(torch, self.settings.distributed.param_dtype).itemsize
            found["weights and gradients, gathered"] = (weights + trained) * gathered
        if train.ema_decay is not None:
            found["moving average"] = self._own(trained)
        if train.carry_state:  # what a micro-batch begins with is kept beside what it leaves
            found["carried state"] = self._state_bytes * (train.sequences_per_process + train.batch_size)
        if copied := self._copied_bytes:
            found["copy for the checkpoint"] = copied
        return found

    @property
    def counted(self) -> int:
        """At the peak of a step that is measured."""
        return sum(self.parts.values()) - self.unmeasured

    @property
    def fixed(self) -> int:
        """What has to be there before anything is computed, whatever the sequences of a micro-batch."""
        return sum(size for name, size in self.parts.items() if "activations" not in name) - self._copied_bytes

    @property
    def unmeasured(self) -> int:
        """What a measured step does not show: the copy for a checkpoint, and the states of other micro-batches."""
        train = self.settings.train
        others = (train.sequences_per_process - train.batch_size) * train.carry_state
        return self._copied_bytes + self._state_bytes * others

    @cached_property
    def _numbers(self) -> tuple[int, int, int]:
        """Of weights, of trained ones, and of what the optimizer keeps."""
        with torch.device("meta"):
            model = BDHForCausalLM(self.config)
            if self.settings.train.lora.r:
                add_adapters(model, self.settings.train.lora)
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        embeddings = sum(number for name, number in trained.items() if name.startswith(("embed.", "lm_head.")))
        number = sum(trained.values())
        each = 2 if self.settings.train.optimizer == "adamw" else 1
        return sum(p.numel() for p in model.parameters()), number, 2 * embeddings + each * (number - embeddings)

    def _own(self, number: int) -> int:
        """Bytes of this process's share of so many numbers that belong to the weights."""
        itemsize = 8 if self.runtime.dtype == torch.float64 else 4
        return -(-number // self.processes) * itemsize if self.strategy == "fsdp" else number * itemsize

    @property
    def _state_bytes(self) -> int:
        """Of one sequence."""
        config = self.config
        numbers = config.n_layer * config.n_head * config.neurons_per_head * config.n_embd
        return numbers * sum_dtype(self.runtime.dtype).itemsize

    @property
    def _copied_bytes(self) -> int:
        """What a checkpoint in the background copies; a GPU's go to the memory of the machine."""
        train, (weights, trained, optimizer) = self.settings.train, self._numbers
        if not self.settings.checkpoint.in_background or self.runtime.device.type == "cuda":
            return 0
        states = self._state_bytes * train.sequences_per_process * train.carry_state
        return self._own(weights + optimizer + trained * (train.ema_decay is not None)) + states


def changes(now: MemoryEstimate) -> Iterator[Iterator[tuple[str, MemoryEstimate]]]:
    """Other settings that may need less, kind by kind and within a kind ever less, with their flags."""
    settings, train, config = now.settings, now.settings.train, now.config
    rows, columns, number = train.rows_per_block, train.tokens_per_block, train.batch_size

    def of(section: str, options: Iterable[dict[str, Any]]) -> Iterator[tuple[str, MemoryEstimate]]:
        before = getattr(settings, section)
        for fields in options:
            other = {name: str(value).lower() for name, value in fields.items() if value != getattr(before, name)}
            flags = " ".join(f"--{section}.{name} {value}" for name, value in other.items())
            with suppress(ValueError):  # neurons that cannot be shared evenly by the heads
                yield flags, now.changed(section, **fields)

    def smaller(section: str, name: str, size: int, least: int = 1) -> Iterator[tuple[str, MemoryEstimate]]:
        return of(section, ({name: number} for number in _halved(size, least)))

    def micro_batches_of(size: int) -> dict[str, Any]:
        times = train.sequences_per_process // size
        return {"batch_size": size, "gradient_accumulation_steps": times, "rows_per_block": _at_most(rows, size)}

    yield of("train", (micro_batches_of(size) for size in range(number // 2, 0, -1) if number % size == 0))
    if settings.checkpoint.in_background:
        yield of("checkpoint", [{"in_background": False}])
    if train.layer_path == "plain":
        yield of("train", [{"layer_path": "auto"}])
    if train.recompute != "pass":
        yield of("train", [{"recompute": "pass"}])
    if now.plan.backend != "eager":
        yield smaller("train", "rows_per_block", now.plan.sizes.rows)
        yield smaller("train", "tokens_per_block", now.plan.sizes.columns)
    if now.processes > 1 and now.strategy != "fsdp":
        flags = "--distributed.strategy fsdp, which shares weights, gradients and optimizer among the processes"
        yield iter([(flags, replace(now, strategy="fsdp"))])
    if not settings.resume:
        shorter = _halved(train.block_size, _LEAST_SIZE)
        yield of("train", ({"block_size": each, "tokens_per_block": _at_most(columns, each)} for each in shorter))
        if train.init_from is None:
            yield smaller("model", "mlp_internal_dim_multiplier", config.mlp_internal_dim_multiplier)
            yield smaller("model", "n_embd", config.n_embd, _LEAST_SIZE)


@dataclass
class Forecast:
    """What a run will take of one process, and what to change where it is too much."""

    estimate: MemoryEstimate
    base: int
    """Bytes that the process has beside what is counted: the program itself."""
    available: int
    """To each process, including what it has already."""
    steps: int = 0
    """To do, and sequences of this process that are evaluated meanwhile."""
    evaluated_sequences: int = 0
    points: list[tuple[int, float, int | None]] = field(default_factory=list)
    """Measured steps: sequences, seconds, and bytes at the peak; of several processes, of the one that took most."""
    update_seconds: float = 0.0
    """Of a step, for what it does once, whatever its micro-batches."""
    obstacle: str = ""
    """Why nothing, or no more, was measured, where that was for lack of memory."""
    ran_out_at: int | None = None
    """Sequences of a step that found no memory, whatever the system says of it."""

    @property
    def measured_peaks(self) -> list[tuple[int, int]]:
        """Of each measured step, what was counted for it and its peak, in bytes; empty where the system records no peaks."""
        return [(self.estimate.of_sequences(n).counted, peak) for n, _, peak in self.points if peak is not None]

    def peak_with(self, estimate: MemoryEstimate) -> float:
        """Bytes at the peak of a measured step with these settings: of the measured step that is most like it, and what is
        counted for the difference, in the proportion that measured peaks have to their counts where they show one."""
        counted, known = estimate.counted, self.measured_peaks
        if not known:
            return self.base + counted + (0 if estimate.runtime.device.type == "cuda" else _LOADED_BYTES)
        nearest, peak = min(known, key=lambda point: abs(counted - point[0]))
        (first, first_peak), (last, last_peak) = known[0], known[-1]
        ratio = (last_peak - first_peak) / (last - first) if last - first >= _TRUSTED_BYTES else 1.0
        # Where the counts prove wrong, in the direction that promises less.
        difference = counted - nearest
        found = peak + difference * (max(1.0, ratio) if difference > 0 else min(1.0, max(0.0, ratio)))
        # What another path keeps is so much less that a small fault in the count of what it replaces would be all of it.
        is_same_path = estimate.plan.backend == self.estimate.plan.backend
        return found if is_same_path else max(found, float(self.base + counted))

    def peak_of(self, number: int) -> float:
        """The same of micro-batches of so many sequences."""
        return self.peak_with(self.estimate.of_sequences(number))

    @property
    def peak(self) -> float:
        return self.peak_with(self.estimate) + self.estimate.unmeasured

    @property
    def limit(self) -> float:
        """Bytes that the peak may have."""
        return MARGIN * self.available

    @property
    def fits(self) -> bool:
        return bool(self.points) and self.ran_out_at is None and self.peak <= self.limit

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of the forward and backward pass of a micro-batch: fixed, and for each of its sequences.

        Through the first and the last measured step; what noise makes shrink is taken to stay.
        """
        (x, first, _), (y, last, _) = self.points[0], self.points[-1]
        first, last = max(0.0, first - self.update_seconds), last - self.update_seconds
        each = max(0.0, (last - first) / (y - x)) if y > x else first / x
        return max(0.0, first - each * x), each

    @property
    def step_seconds(self) -> float:
        train, (fixed, each) = self.estimate.settings.train, self.line
        return train.gradient_accumulation_steps * (fixed + each * train.batch_size) + self.update_seconds

    @property
    def run_seconds(self) -> float:
        """With the evaluations: a forward pass is about a third of one with its backward pass."""
        return self.steps * self.step_seconds + self.line[1] * self.evaluated_sequences / 3

    def lines(self) -> list[str]:
        """For people."""
        estimate, train = self.estimate, self.estimate.settings.train
        width = max(map(len, estimate.parts))
        found = [f"  {name:<{width}}  {_gigabytes(size):>10}" for name, size in estimate.parts.items()]
        each = " per process" if estimate.processes > 1 else ""
        counted = "" if self.measured_peaks else " (counted, not measured)"
        available = f"{_gigabytes(self.available)} that are available{each}"
        found.append(f"peak memory   {_gigabytes(self.peak)} of the {available}{counted}")
        if self.points:
            speed = train.sequences_per_process * train.block_size * estimate.processes / self.step_seconds
            *fewer, most = (str(count) for count, _, _ in self.points)
            counts = f"{', '.join(fewer)} and {most}" if fewer else most
            also = f"; {self.obstacle}" if self.obstacle else ""
            found += [
                f"step          {self.step_seconds:,.2f} s: {speed:,.0f} tokens/s",
                f"run           {_duration(self.run_seconds)} for {self.steps:,} steps and their evaluations",
                f"measured      steps of {counts} sequence{'s' * (counts != '1')}{also}",
            ]
        else:
            found.append(f"not measured: {self.obstacle}")
        if not self.fits:
            advice = self.advice()
            found.append("it does not fit; what would help, the mildest first:" if advice else "it does not fit")
            found += [f"  {line}" for line in advice]
        return found

    def advice(self) -> list[str]:
        """What to change, the mildest first: settings that change no result, then those that train another model.

        Of each kind the least change that fits alone, or else the one that needs least, if it is less than now.
        """
        now, limit = self.peak, self.limit
        if self.ran_out_at is not None:
            limit = min(limit, self.peak_of(self.ran_out_at) - 1)
        never_fits = self.base + self.estimate.fixed > limit
        lines, is_enough = [], False
        for kind in changes(self.estimate):
            less = []
            for flags, changed in kind:
                try:
                    peak = self.peak_with(changed) + changed.unmeasured
                except ValueError:  # it does not go with the other settings, such as a memory budget
                    continue
                saves = peak < (1 - _LEAST_SAVING) * now
                if peak <= limit and peak < now:
                    less.append((peak, flags))
                    break
                if saves and (changed.fixed < self.estimate.fixed or not never_fits):
                    less.append((peak, flags))
            if less:
                peak, flags = min(less, key=lambda each: each[0])
                is_enough |= peak <= limit
                lines.append(f"{flags}: {_gigabytes(peak)}" + ", which alone does not fit either" * (peak > limit))
        if lines and not is_enough:
            lines.append("none of these is enough alone: combine them, or train where there is more memory")
        return lines


class NoRoomError(Exception):
    """The weights, and what belongs to each of them, need more memory than there is."""

    def __init__(self, forecast: Forecast):
        self.forecast = forecast


def check_room(settings: RunSettings, config: BDHConfig, runtime: Runtime, strategy: str, world: World) -> None:
    """Raises ``NoRoomError``, on all processes together, where the model cannot even be made and given an optimizer."""
    estimate = MemoryEstimate(settings, config, runtime, strategy, world.size)
    available, base = _available_to_each(runtime, world), max(world.gather(used_bytes(runtime.device)))
    if base + estimate.fixed > available:
        world.leave()
        obstacle = "the weights and what belongs to them do not fit"
        raise NoRoomError(Forecast(estimate, base, available, obstacle=obstacle))


def forecast(run: Run, *, say: Callable[[str], None] = lambda line: None) -> Forecast:
    """Measures, and thereby trains, a run of ``settings.dry_run``: it is of no use afterwards.

    All processes of the run call it together, and get the same.
    """
    settings, device, world, train = run.settings, run.runtime.device, run.world, run.settings.train
    estimate = MemoryEstimate(settings, run.model.config, run.runtime, run.parallel.strategy, world.size)
    give_back_free_memory()
    there = ("weights", "moving average", *(("optimizer",) if run.progress.step else ()))
    base = max(0, used_bytes(device) - sum(estimate.parts.get(name, 0) for name in there))
    found = Forecast(estimate, max(world.gather(base)), _available_to_each(run.runtime, world), *_work_left(run))

    first = 1 if estimate.plan.backend == "eager" else min(estimate.plan.sizes.rows, train.batch_size)
    while first > 1 and found.peak_of(first) > found.limit:
        first //= 2
    if found.peak_of(first) > found.limit:
        found.obstacle = "a step of a single sequence does not fit"
        return found
    loader = run.corpus.train_loader(
        first * world.size, train.seed, world.rank, world.size, carry_state=train.carry_state
    )
    sequences = loader.next()
    step_model = torch.compile(run.parallel.step_model) if train.compile else run.parallel.step_model
    say("a first step, which compiles and fills the optimizer ...")
    seconds, count = _timed_step(run, step_model, sequences, first), first
    counts = sorted(
        {min(first << doublings, train.batch_size) for doublings in range(train.batch_size.bit_length() + 1)}
    )
    for count in counts if seconds is not None else ():
        if found.points:
            before, its_seconds, _ = found.points[-1]
            if its_seconds * count / before > MEASURING_SECONDS or found.peak_of(count) > found.limit:
                break
        say(f"a step of {count} of {train.batch_size} sequences ...")
        give_back_free_memory()
        reset_peak(device)
        seconds = _timed_step(run, step_model, sequences, count)
        if seconds is None:
            break
        measured = world.gather((seconds, peak_bytes(device)))
        peaks = [peak for _, peak in measured if peak is not None]
        found.points.append((count, max(each for each, _ in measured), max(peaks, default=None)))
    if seconds is None:
        found.ran_out_at, found.obstacle = count, f"there was no memory for a step of {count}"
    elif train.gradient_accumulation_steps > 1:
        # A second micro-batch shows what a step does once.
        both = _timed_step(run, step_model, sequences, found.points[-1][0], num_micro_batches=2)
        if both is not None:
            once = 2 * found.points[-1][1] - max(world.gather(both))
            found.update_seconds = min(max(0.0, once), found.points[0][1])
    return found


def _timed_step(
    run: Run, step_model: Callable[..., Any], sequences: Batch, count: int, num_micro_batches: int = 1
) -> float | None:
    """Seconds of a training step with micro-batches of ``count`` sequences; None where some process runs out of memory."""
    settings, total = run.settings, count * num_micro_batches
    batch = Batch.stack([sequences] * math.ceil(total / len(sequences.tokens)))[:total]
    failed = False
    run.settings = replace(settings, train=replace(settings.train, batch_size=count))
    if run.carried is not None:
        run.carried = CarriedState(run.model, num_micro_batches, count)
    start = time.perf_counter()
    try:
        training_step(run, step_model, batch)
        run.guard.read(run.progress.step)  # waits for the device
    except (RuntimeError, MemoryError) as error:
        # PyTorch has no class for a CPU's lack of memory, as under ulimit.
        failed = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
        if not failed:
            raise
    finally:
        run.settings = settings
    seconds = time.perf_counter() - start
    if not any(run.world.any([failed])):
        return seconds
    run.optimizers.zero_grad()
    if run.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _work_left(run: Run) -> tuple[int, int]:
    """Steps to do, and sequences evaluated meanwhile by the process that has most of them."""
    train, most = run.settings.train, run.settings.train.max_steps
    steps = range(run.progress.step + 1, min(most, train.stop_at_step or most) + 1)
    evaluations = sum(step % train.eval_every_steps == 0 or step == most for step in steps)
    parts = run.corpus.validation_parts(train.eval_windows, run.document_end) if evaluations else []
    sequences = sum(-(-len(part.batch.tokens) // run.world.size) for part in parts)
    return len(steps), evaluations * sequences * (1 if run.average is None else 2)


def _available_to_each(runtime: Runtime, world: World) -> int:
    """Bytes that every process can have, including what it has already: the same number on all of them."""
    give_back_free_memory()
    return min(world.gather(available_bytes(runtime.device, local_world_size()) + used_bytes(runtime.device)))


def give_back_free_memory() -> None:
    """What the C library has kept of smaller steps would count for a larger one, which would not have had them before."""
    with suppress(OSError, AttributeError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _at_most(size: int | None, largest: int) -> int | None:
    return size and min(size, largest)


def _halved(number: int, least: int) -> Iterator[int]:
    while (number := number // 2) >= least:
        yield number


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.3f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
