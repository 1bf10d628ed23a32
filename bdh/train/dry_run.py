"""``bdh train --dry_run``: what a run will take of this machine, and what to change where that is too much.

Real training steps of a growing number of sequences are measured, as far as memory and a few seconds allow; time and memory of
the whole batch are on the line through them. What other settings would take is counted from the settings alone.
"""

import ctypes
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bdh.data.corpus import Batch
from bdh.distributed.config import local_world_size
from bdh.distributed.world import World
from bdh.memory import available_bytes, peak_bytes, reset_peak, used_bytes
from bdh.model import BDHConfig
from bdh.train.batches import CarriedState
from bdh.train.config import RunSettings
from bdh.train.loop import training_step
from bdh.train.memory_estimate import MemoryEstimate, changes
from bdh.train.runtime import Runtime
from bdh.train.setup import Run

MARGIN = 0.95
"""Of the available memory: more than that is not counted on."""
MEASURING_SECONDS = 20.0
"""A step that is expected to take longer is not measured."""
_LOADED_BYTES = 2 * 10**8  # what the first step on a CPU loads: compiled kernels and libraries
_TELLING_BYTES = 2**26  # of growth: below that, an allocator's steps are larger than what is measured
_TELLING_SHARE = 0.01  # what saves less is not worth a line


class NoRoomError(Exception):
    """The weights, and what belongs to each of them, need more memory than there is."""

    def __init__(self, estimate: MemoryEstimate, base: int, available: int):
        super().__init__("there is no room for the weights and what belongs to them")
        self.estimate, self.base, self.available = estimate, base, available


@dataclass(frozen=True)
class Line:
    """A quantity that grows evenly with the sequences of a micro-batch."""

    fixed: float
    each: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Line":
        """Through two measurements, (sequences, quantity); what noise makes shrink is taken to stay."""
        (x, y), (other_x, other_y) = sorted((first, second))
        each = max(0.0, (other_y - y) / (other_x - x)) if other_x > x else y / x
        return cls(max(0.0, y - each * x), each)

    def at(self, number: float) -> float:
        return self.fixed + self.each * number


@dataclass
class Forecast:
    """What a run will take of one process, and what to change where it is too much."""

    estimate: MemoryEstimate
    base: int
    """Bytes that the process has beside what is counted: the program itself."""
    available: int
    """To each process, what it has already among it."""
    steps: int = 0
    """To go, and sequences of this process that are evaluated meanwhile."""
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
    def is_counted(self) -> bool:
        """Whether the peak is the sum of the parts, as none was measured."""
        return not any(peak is not None for _, _, peak in self.points)

    def peak_with(self, estimate: MemoryEstimate) -> float:
        """Bytes at the peak of a measured step with these settings: of the measured step that is most like it, and what is
        counted for the difference, in the proportion that measured peaks have to their counts where they tell it."""
        counted = estimate.total - estimate.unmeasured
        known = []
        for number, _, peak in self.points:
            if peak is not None:
                then = self.estimate.of_sequences(number)
                known.append((then.total - then.unmeasured, peak))
        if not known:
            return self.base + counted + (0 if estimate.runtime.device.type == "cuda" else _LOADED_BYTES)
        nearest, peak = min(known, key=lambda point: abs(counted - point[0]))
        (first, first_peak), (last, last_peak) = known[0], known[-1]
        told = (last_peak - first_peak) / (last - first) if last - first >= _TELLING_BYTES else 1.0
        # Where the counts prove wrong, in the direction that promises less.
        difference = counted - nearest
        found = peak + difference * (max(1.0, told) if difference > 0 else min(1.0, max(0.0, told)))
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
    def room(self) -> float:
        return MARGIN * self.available

    @property
    def fits(self) -> bool:
        return bool(self.points) and self.ran_out_at is None and self.peak <= self.room

    @property
    def seconds(self) -> Line:
        """Of the forward and backward pass of a micro-batch, by its sequences."""
        (first, first_seconds, _), (last, last_seconds, _) = self.points[0], self.points[-1]
        return Line.through(
            (first, max(0.0, first_seconds - self.update_seconds)), (last, last_seconds - self.update_seconds)
        )

    @property
    def step_seconds(self) -> float:
        train = self.estimate.settings.train
        return train.gradient_accumulation_steps * self.seconds.at(train.batch_size) + self.update_seconds

    @property
    def run_seconds(self) -> float:
        """With the evaluations: a forward pass is about a third of one with its backward pass."""
        return self.steps * self.step_seconds + self.seconds.each * self.evaluated_sequences / 3

    def lines(self) -> list[str]:
        """For people."""
        estimate, train = self.estimate, self.estimate.settings.train
        width = max(map(len, estimate.parts))
        found = [f"  {name:<{width}}  {gigabytes(size):>10}" for name, size in estimate.parts.items()]
        each = " per process" if estimate.processes > 1 else ""
        counted = " (counted, not measured)" if self.is_counted else ""
        found.append(
            f"peak memory   {gigabytes(self.peak)} of the {gigabytes(self.available)} that are available{each}{counted}"
        )
        if self.points:
            num_tokens = (
                train.batch_size * train.gradient_accumulation_steps * train.block_size * self.estimate.processes
            )
            also = f"; {self.obstacle}" if self.obstacle else ""
            found += [
                f"step          {self.step_seconds:,.2f} s: {num_tokens / self.step_seconds:,.0f} tokens/s",
                f"run           {duration(self.run_seconds)} for {self.steps:,} steps and their evaluations",
                f"measured      steps of {_listed([count for count, _, _ in self.points])}{also}",
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

        Of each kind the least change that fits alone, or else the one that needs least; none that needs no less than the
        settings as they are.
        """
        now, room = self.peak, self.room
        if self.ran_out_at is not None:
            room = min(room, self.peak_of(self.ran_out_at) - 1)
        no_room_at_all = self.base + self.estimate.fixed > room
        lines, is_enough = [], False
        for kind in changes(self.estimate):
            less = []
            for flags, changed in kind:
                try:
                    peak = self.peak_with(changed) + changed.unmeasured
                except ValueError:  # it does not go with the other settings, such as a memory budget
                    continue
                saves = peak < (1 - _TELLING_SHARE) * now
                if peak <= room and peak < now:
                    less.append((flags, peak))
                    break
                if saves and (changed.fixed < self.estimate.fixed or not no_room_at_all):
                    less.append((flags, peak))
            if less:
                flags, peak = min(less, key=lambda each: each[1])
                fits = peak <= room
                is_enough = is_enough or fits
                lines.append(f"{flags}: {gigabytes(peak)}" + ("" if fits else ", which alone does not fit either"))
        if lines and not is_enough:
            lines.append("none of these is enough alone: combine them, or train where there is more memory")
        return lines


def forecast(run: Run, *, say: Callable[[str], None] = lambda line: None) -> Forecast:
    """Measures, and thereby trains, a run of ``settings.dry_run``: it is of no use afterwards.

    All processes of the run call it together, and get the same.
    """
    estimate = MemoryEstimate(
        run.settings, run.model.config, run.runtime, run.parallel.strategy, processes=run.world.size
    )
    device, world, train = run.runtime.device, run.world, run.settings.train
    give_back_free_memory()
    there = ("weights", "moving average", *(("optimizer",) if run.progress.step else ()))
    base = max(0, used_bytes(device) - sum(estimate.parts.get(name, 0) for name in there))
    found = Forecast(estimate, max(world.gather(base)), available_to_each(run.runtime, world))
    found.steps, found.evaluated_sequences = _to_go(run)

    first = 1 if estimate.plan.backend == "eager" else min(estimate.plan.sizes.rows, train.batch_size)
    while first > 1 and found.peak_of(first) > found.room:
        first //= 2
    if found.peak_of(first) > found.room:
        found.obstacle = "there is no room for a step of a single sequence"
        return found
    loader = run.corpus.train_loader(
        first * world.size, train.seed, world.rank, world.size, carry_state=train.carry_state
    )
    sequences = loader.next()
    step_model = torch.compile(run.parallel.step_model) if train.compile else run.parallel.step_model
    say("a first step, which compiles and fills the optimizer ...")
    seconds, count = _timed_step(run, step_model, sequences, first), first
    for count in _doubled(first, train.batch_size) if seconds is not None else ():
        if found.points and (
            found.points[-1][1] * count / found.points[-1][0] > MEASURING_SECONDS or found.peak_of(count) > found.room
        ):
            break
        say(f"a step of {count} of {train.batch_size} sequences ...")
        give_back_free_memory()
        reset_peak(device)
        seconds = _timed_step(run, step_model, sequences, count)
        if seconds is None:
            break
        told = world.gather((seconds, peak_bytes(device)))
        peaks = [peak for _, peak in told if peak is not None]
        found.points.append((count, max(each for each, _ in told), max(peaks, default=None)))
    if seconds is None:
        found.ran_out_at, found.obstacle = count, f"there was no memory for a step of {count}"
    elif train.gradient_accumulation_steps > 1:
        # A second micro-batch shows what a step does once.
        both = _timed_step(run, step_model, sequences, found.points[-1][0], num_micro_batches=2)
        if both is not None:
            once = 2 * found.points[-1][1] - max(world.gather(both))
            found.update_seconds = min(max(0.0, once), found.points[0][1])
    return found


def forecast_without_room(error: NoRoomError) -> Forecast:
    """Of a run whose model was not even made."""
    return Forecast(error.estimate, error.base, error.available, obstacle=str(error))


def check_room(settings: RunSettings, config: BDHConfig, runtime: Runtime, strategy: str, world: World) -> None:
    """Raises ``NoRoomError``, on all processes together, where the model cannot even be made and given an optimizer."""
    estimate = MemoryEstimate(settings, config, runtime, strategy, world.size)
    available, base = available_to_each(runtime, world), max(world.gather(used_bytes(runtime.device)))
    if base + estimate.fixed > available:
        world.leave()
        raise NoRoomError(estimate, base, available)


def available_to_each(runtime: Runtime, world: World) -> int:
    """Bytes that every process can have, what it has already among them: the same number on all of them."""
    device = runtime.device
    give_back_free_memory()
    return min(world.gather(available_bytes(device, local_world_size()) + used_bytes(device)))


def give_back_free_memory() -> None:
    """What the C library has kept of smaller steps would count for a larger one, which would not have had them before."""
    with suppress(OSError, AttributeError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


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
    try:
        start = time.perf_counter()
        training_step(run, step_model, batch)
        run.guard.read(run.progress.step)  # waits for the device
        seconds = time.perf_counter() - start
    except (torch.OutOfMemoryError, MemoryError):
        failed = True
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what PyTorch says on a CPU, as under ulimit
            raise
        failed = True
    finally:
        run.settings = settings
    if any(run.world.any([failed])):
        run.optimizers.zero_grad()
        if run.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        return None
    return seconds


def _to_go(run: Run) -> tuple[int, int]:
    """Steps to go, and sequences evaluated meanwhile by the process that has most of them."""
    settings, first = run.settings.train, run.progress.step
    last = min(settings.max_steps, settings.stop_at_step or settings.max_steps)
    every = settings.eval_every_steps
    number = max(0, last // every - first // every)
    if last == settings.max_steps and last % every and last > first:
        number += 1
    parts = run.corpus.validation_parts(settings.eval_windows, run.document_end) if number else []
    sequences = sum(-(-len(part.batch.tokens) // run.world.size) for part in parts)
    return max(0, last - first), number * sequences * (1 if run.average is None else 2)


def _doubled(first: int, last: int) -> Iterator[int]:
    while first < last:
        yield first
        first *= 2
    yield last


def _listed(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    if not others:
        return f"{last} sequence{'s' * (last != '1')}"
    return f"{', '.join(others)} and {last} sequences"


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.3f} GB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
