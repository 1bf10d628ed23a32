"""What a run will take of this machine: memory and time.

Both are measured for a growing number of sequences (:mod:`bdh.train.measure`), up to the whole batch where that is quick and
has room. Beyond that time is a straight line in the number of sequences, and of the memory the difference is counted
(:mod:`bdh.train.needs`), as it is little: everything wide exists for one block at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from bdh.train.advice import advise
from bdh.train.measure import Measured, measure
from bdh.train.needs import Need, NoRoomError, available_to_each
from bdh.train.run import Run
from bdh.train.units import duration, gigabytes

MARGIN = 0.95
"""Of the available memory: more than that is not counted on."""


@dataclass(frozen=True)
class Line:
    """A quantity that grows evenly with the sequences of a forward pass."""

    fixed: float
    each: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Line":
        """Through two measurements, (sequences, quantity); what noise makes shrink is taken to stay."""
        (x, y), (other_x, other_y) = sorted((first, second))
        each = max(0.0, (other_y - y) / (other_x - x)) if other_x > x else y / x
        return cls(max(0.0, y - each * x), each)

    def at(self, rows: float) -> float:
        return self.fixed + self.each * rows


@dataclass
class Forecast:
    """What a run will take of one process, and what to change where it is too much."""

    parts: dict[str, int]
    """Bytes that follow from the settings alone, by what they are for."""
    peak: float | None
    """In bytes. None where the system does not tell it."""
    is_counted: bool
    """Whether the peak is the sum of the parts, as nothing could be measured."""
    available: int | None
    """To each process."""
    seconds: Line | None
    """Of a forward and backward pass, by its sequences. None where none was measured."""
    rows: int
    """Sequences in a forward pass, and how many such a step has."""
    passes: int
    update_seconds: float
    tokens_per_row: int
    processes: int
    steps: int
    evaluated_rows: int
    """Over the whole run, of this process."""
    measured_rows: list[int]
    obstacle: str = ""
    """Why nothing, or no more, was measured, where that was for lack of memory."""
    ran_out: bool = False
    """A pass was given up as it found no memory, whatever the system tells of it."""
    advice: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """As far as the system tells."""
        if self.seconds is None or self.ran_out:
            return False
        return self.peak is None or self.available is None or self.peak <= MARGIN * self.available

    @property
    def step_seconds(self) -> float:
        return 0.0 if self.seconds is None else self.passes * self.seconds.at(self.rows) + self.update_seconds

    @property
    def run_seconds(self) -> float:
        """With the evaluations: a forward pass is about a third of one with its backward pass."""
        evaluations = 0.0 if self.seconds is None else self.seconds.each * self.evaluated_rows / 3
        return self.steps * self.step_seconds + evaluations

    @property
    def tokens_per_second(self) -> float:
        """Of all processes."""
        return self.rows * self.passes * self.tokens_per_row * self.processes / self.step_seconds

    def lines(self) -> list[str]:
        """For people."""
        width = max(map(len, self.parts))
        found = [f"  {name:<{width}}  {gigabytes(size):>10}" for name, size in self.parts.items()]
        if self.peak is not None:
            known = "" if self.available is None else f" of the {gigabytes(self.available)} that are available"
            each = " per process" if self.processes > 1 else ""
            counted = " (counted, not measured)" if self.is_counted else ""
            found.append(f"peak memory   {gigabytes(self.peak)}{known}{each}{counted}")
        if self.seconds is not None:
            also = f"; {self.obstacle}" if self.obstacle else ""
            found += [
                f"step          {self.step_seconds:,.2f} s: {self.tokens_per_second:,.0f} tokens/s",
                f"run           {duration(self.run_seconds)} for {self.steps:,} steps and their evaluations",
                f"measured      forward and backward passes of {_listed(self.measured_rows)}{also}",
            ]
        else:
            found.append(f"not measured: {self.obstacle}")
        if not self.fits:
            found.append("it does not fit; what would help, the mildest first:" if self.advice else "it does not fit")
            found += [f"  {line}" for line in self.advice]
        return found


def forecast(run: Run, *, say: Callable[[str], None] = lambda line: None) -> Forecast:
    """Measures, and thereby trains, ``run``, which must be one of ``settings.dry_run``: it is of no use afterwards.

    All processes of the run call it together, and get the same.
    """
    need = need_of(run)
    available = available_to_each(run.runtime, run.world)
    room = None if available is None else MARGIN * available
    measured = measure(run, need, room, say)
    found = _forecast(need, measured, available)
    found.steps, found.evaluated_rows = steps_to_go(run), evaluated_rows(run)
    return found


def forecast_without_room(error: NoRoomError) -> Forecast:
    """Of a run whose model was not even made."""
    found = _forecast(error.need, Measured(error.base), error.available)
    found.obstacle = f"{error}"
    return found


def need_of(run: Run) -> Need:
    return Need.of(run.settings, run.model.config, run.runtime, run.parallel.strategy, run.world.size)


def _forecast(need: Need, measured: Measured, available: int | None) -> Forecast:
    settings, points = need.settings.train, measured.points
    peak, room = measured.peak(need), None if available is None else MARGIN * available
    ran_out_at, obstacle = measured.ran_out_at, ""
    if ran_out_at is not None:
        obstacle = f"there was no memory for a pass of {ran_out_at}"
        needed = measured.peak_of_measuring(need.with_rows(ran_out_at))
        room = needed - 1 if room is None else min(room, needed - 1)
    elif not points:
        obstacle = "there is no room for a pass of a single sequence"
    found = Forecast(
        parts=need.parts,
        peak=None if measured.is_counted and points else peak,
        is_counted=measured.is_counted,
        available=available,
        seconds=Line.through(*((p.rows, p.seconds) for p in (points[0], points[-1]))) if points else None,
        rows=need.rows,
        passes=settings.gradient_accumulation_steps,
        update_seconds=measured.update_seconds,
        tokens_per_row=settings.block_size,
        processes=need.processes,
        steps=0,
        evaluated_rows=0,
        measured_rows=[point.rows for point in points],
        obstacle=obstacle,
        ran_out=ran_out_at is not None,
    )
    if not found.fits:
        found.advice = advise(need, measured, room)
    return found


def steps_to_go(run: Run) -> int:
    return max(0, _last_step(run) - run.progress.step)


def evaluated_rows(run: Run) -> int:
    """Over the steps to go, of the process that has most of them. The moving average is evaluated too."""
    settings, first, last = run.settings.train, run.progress.step, _last_step(run)
    every = settings.eval_every_steps
    number = max(0, last // every - first // every)
    if last == settings.max_steps and last % every and last > first:
        number += 1
    parts = run.corpus.validation_parts(settings.eval_windows, run.document_end) if number else []
    rows = sum(-(-len(part.batch.tokens) // run.world.size) for part in parts)
    return number * rows * (1 if run.average is None else 2)


def _last_step(run: Run) -> int:
    settings = run.settings.train
    return min(settings.max_steps, settings.stop_at_step or settings.max_steps)


def _listed(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    if not others:
        return f"{last} sequence{'s' * (last != '1')}"
    return f"{', '.join(others)} and {last} sequences"
