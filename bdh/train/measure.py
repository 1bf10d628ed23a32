"""Forward and backward passes of a growing number of sequences, as far as the memory and a few seconds carry."""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from bdh.data.corpus import Batch
from bdh.memory import peak_bytes, reset_peak, used_bytes
from bdh.train.needs import Need
from bdh.train.run import Run
from bdh.train.speed import wait_for_device

MEASURING_SECONDS = 20.0
"""A pass is measured where it is not expected to take longer than that."""
_KERNELS_BYTES = 10**8  # of the compiled kernels, which the first pass loads
_LOADED_BYTES = 10**8  # of what else it sets up on a CPU, PyTorch's libraries above all
_TELLING_BYTES = 2**26  # of growth: below that, an allocator's steps are larger than what is measured


@dataclass(frozen=True)
class Point:
    """A measured pass. With several processes: of the one that took most."""

    rows: int
    seconds: float
    peak: int | None
    """None where the system does not tell it."""
    counted: int
    """What was counted of it beforehand."""


@dataclass
class Measured:
    """What was measured, and what follows of it for other settings."""

    base: int
    """What the process has beside what is counted: the program itself."""
    path: str = ""
    """Who computes the layer in what is measured."""
    points: list[Point] = field(default_factory=list)
    update_seconds: float = 0.0
    ran_out_at: int | None = None
    """Sequences of a pass for which the memory did not suffice."""

    @property
    def is_counted(self) -> bool:
        """Whether no peak was measured, so that :meth:`peak` has the counts alone."""
        return not any(point.peak is not None for point in self.points)

    def peak(self, need: Need) -> float:
        """Bytes at the peak: of the measured pass that is most like it, and what is counted for the difference."""
        return self.peak_of_measuring(need) + need.unmeasured

    def peak_of_measuring(self, need: Need) -> float:
        """The same of a pass here, where no checkpoint is written."""
        counted = need.total - need.unmeasured
        if need.plan.path == "kernels" and (self.path != "kernels" or not self.points):
            counted += _KERNELS_BYTES
        points = [(point.counted, point.peak) for point in self.points if point.peak is not None]
        if not points:
            return float(self.base + counted)
        nearest, peak = min(points, key=lambda point: abs(counted - point[0]))
        difference = counted - nearest
        (first, first_peak), (last, last_peak) = points[0], points[-1]
        told = (last_peak - first_peak) / (last - first) if last - first >= _TELLING_BYTES else 1.0
        # Where the counts prove wrong, in the direction that promises less.
        found = peak + difference * (max(1.0, told) if difference > 0 else min(1.0, max(0.0, told)))
        # What another path keeps is so much less that a small fault in the count of what it replaces would be all of it.
        return found if need.plan.path == self.path else max(found, float(self.base + counted))


def measure(run: Run, need: Need, room: float | None, say: Callable[[str], None]) -> Measured:
    """Measures, and thereby trains, a run of ``settings.dry_run``.

    All processes call this together, and take the same decisions, as these depend on what all of them have told.

    Args:
        room: bytes of which no pass is expected to take more; None where nobody knows.
    """
    device, world, rows = run.runtime.device, run.world, need.rows
    found = Measured(max(world.gather(_base(run, need))), need.plan.path)

    def has_room(count: int, more: int = 0) -> bool:
        return room is None or found.peak_of_measuring(need.with_rows(count)) + more <= room

    loaded = _LOADED_BYTES if device.type != "cuda" else 0
    first = 1 if need.plan.path == "plain" else min(need.plan.sizes.rows, rows)
    while first > 1 and not has_room(first, loaded):
        first //= 2
    if not has_room(first, loaded):
        return found
    counts = list(_doubled(first, rows))
    passes = _Passes(run, max(count for count in counts if count == first or has_room(count)))
    say("a first pass, which compiles and fills the optimizer ...")
    update_seconds = 0.0

    def begin() -> None:
        nonlocal update_seconds
        passes.run(first)
        update_seconds = passes.timed(passes.update)

    if passes.runs_out(begin, lambda: passes.run(first)):
        found.ran_out_at = first
        return found
    for count in counts:
        last = found.points[-1] if found.points else None
        if last and (last.seconds * count / last.rows > MEASURING_SECONDS or not has_room(count)):
            break
        if count > passes.rows:  # less was to be had than what there turns out to be room for
            break
        say(f"a pass of {count} of {rows} sequences ...")
        give_back_free_memory()
        reset_peak(device)
        seconds = passes.measured(count)
        if seconds is None:
            found.ran_out_at = count
            break
        found.points.append(_point(run, need.with_rows(count), seconds))
    if found.points and found.ran_out_at is None:
        update_seconds = min(update_seconds, passes.timed(passes.update))
        last = found.points.pop()  # what the update takes may be more than what the pass did
        found.points.append(_point(run, need.with_rows(last.rows), last.seconds))
    found.update_seconds = max(world.gather(update_seconds))
    return found


def give_back_free_memory() -> None:
    """What the C library has kept of smaller passes would count for a larger one, which would not have had them before."""
    with suppress(OSError, AttributeError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _base(run: Run, need: Need) -> int:
    give_back_free_memory()
    parts, is_resumed = need.parts, run.progress.step > 0
    there = ("weights", "moving average", *(("optimizer",) if is_resumed else ()))
    return max(0, used_bytes(run.runtime.device) - sum(parts.get(name, 0) for name in there))


def _point(run: Run, need: Need, seconds: float) -> Point:
    peaks, all_seconds = zip(*run.world.gather((peak_bytes(run.runtime.device), seconds)), strict=True)
    known = [each for each in peaks if each is not None]
    return Point(need.rows, max(all_seconds), max(known, default=None), need.total - need.unmeasured)


def _doubled(first: int, last: int) -> Iterator[int]:
    while first < last:
        yield first
        first *= 2
    yield last


class _Passes:
    """The parts of a training step, with fewer sequences than it has."""

    def __init__(self, run: Run, rows: int):
        """
        Args:
            rows: the most that a pass will have.
        """
        self._run, self.rows = run, rows
        settings, world = run.settings.train, run.world
        # Not the run's own loader, which gives the sequences of the whole step.
        loader = run.corpus.train_loader(
            rows * world.size, settings.seed, rank=world.rank, world_size=world.size, carry_state=settings.carry_state
        )
        self._batch: Batch = loader.next()
        self._step_model: Callable[..., Any] = run.parallel.step_model
        if settings.compile:
            self._step_model = torch.compile(self._step_model)

    def run(self, rows: int) -> None:
        """A forward and backward pass over the first ``rows`` sequences."""
        run = self._run
        some = self._batch[:rows].to(run.runtime.device)
        state = run.model.new_state(rows) if run.carried is not None else None
        run.model.train()
        with run.runtime.autocast():
            loss = self._step_model(
                input_ids=some.input_ids,
                shift_labels=some.targets,
                document_starts=some.starts,
                num_items_in_batch=some.targets.numel(),
                past_key_values=state,
                use_cache=state is not None,
            ).loss
        run.scaler.scale(loss).backward()

    def update(self) -> None:
        run = self._run
        for optimizer in run.optimizers.all:
            run.scaler.step(optimizer)
        run.scaler.update()
        if run.average is not None:
            run.average.update(run.model, 1)
        run.optimizers.zero_grad()

    def measured(self, rows: int) -> float | None:
        """Seconds of such a pass; None where some process runs out of memory."""
        seconds = 0.0

        def work() -> None:
            nonlocal seconds
            seconds = self.timed(lambda: self.run(rows))

        return None if self.runs_out(work, lambda: self.run(rows)) else seconds

    def runs_out(self, work: Callable[[], None], probe: Callable[[], None] | None = None) -> bool:
        """Does the work, and tells whether some process ran out of memory.

        Args:
            probe: the part of it that may. One process that gives up would leave the others waiting for its gradients, so
                where it can give up, this is first done with none exchanged.
        """
        world, parallel = self._run.world, self._run.parallel
        steps: list[tuple[Callable[[], None], AbstractContextManager]] = [(work, nullcontext())]
        if world.size > 1 and probe is not None and self._run.runtime.device.type == "cuda":
            steps.insert(0, (probe, parallel.accumulating(is_last=False)))
        for step, context in steps:
            with context:
                failed = _runs_out(step)
            if any(world.any([failed])):
                self._run.optimizers.zero_grad()
                if self._run.runtime.device.type == "cuda":
                    torch.cuda.empty_cache()
                return True
        return False

    def timed(self, work: Callable[[], None]) -> float:
        device = self._run.runtime.device
        wait_for_device(device)
        start = time.perf_counter()
        work()
        wait_for_device(device)
        return time.perf_counter() - start


def _runs_out(work: Callable[[], None]) -> bool:
    try:
        work()
    except (torch.OutOfMemoryError, MemoryError):
        return True
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what PyTorch says on a CPU, as under ulimit
            raise
        return True
    return False
