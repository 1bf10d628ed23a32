"""What a run will take of this machine, from a step or two of a part of its batch: memory and time.

Both are straight lines in the number of sequences. Time is measured for two numbers of them, or for the whole batch where that
is quick. So is the peak of the memory; what more sequences would keep is added by count, as it is little: everything wide
exists for one block at a time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bdh.data.batch import Batch
from bdh.train.run import Run
from bdh.train.speed import (
    available_memory_bytes,
    peak_memory_bytes,
    restart_peak_memory,
    used_memory_bytes,
    wait_for_device,
)

MEASURING_SECONDS = 20.0
"""A whole step is measured where it is not expected to take longer than that."""
_MARGIN = 0.95  # of the available memory: more than that is not counted on


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

    def most(self, quantity: float) -> int:
        """Sequences for which it stays within ``quantity``; 0 for none."""
        if self.at(1) > quantity:
            return 0
        return int((quantity - self.fixed) / self.each) if self.each else 2**31


@dataclass
class Forecast:
    """What a run will take of one process, and what to change where it is too much."""

    parts: dict[str, int]
    """Bytes that follow from the settings alone, by what they are for."""
    memory: Line | None
    """Peak in bytes, by the sequences of a forward pass; None where the system does not tell it."""
    available: int | None
    seconds: Line | None
    """Of a forward and backward pass. None where there is no room to measure one."""
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
    advice: list[str] = field(default_factory=list)

    @property
    def peak(self) -> float | None:
        return None if self.memory is None else self.memory.at(self.rows)

    @property
    def fits(self) -> bool:
        """As far as the system tells."""
        if self.seconds is None:
            return False
        return self.peak is None or self.available is None or self.peak <= _MARGIN * self.available

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
        found = [f"  {name:<{width}}  {_gigabytes(size):>10}" for name, size in self.parts.items()]
        if self.peak is not None and self.available is not None:
            found.append(
                f"peak memory   {_gigabytes(self.peak)} of the {_gigabytes(self.available)} that are available"
            )
        if self.seconds is not None:
            found += [
                f"step          {self.step_seconds:,.2f} s: {self.tokens_per_second:,.0f} tokens/s",
                f"run           {_duration(self.run_seconds)} for {self.steps:,} steps and their evaluations",
                f"measured      forward and backward passes of {' and '.join(map(str, self.measured_rows))} sequences",
            ]
        else:
            found.append("not measured: there is no room for a single block")
        if not self.fits:
            found.append("it does not fit; what would help, the mildest first:")
            found += [f"  {line}" for line in self.advice]
        return found


def forecast(run: Run, *, say: Callable[[str], None] = lambda line: None) -> Forecast:
    """Measures, and thereby trains, ``run``, which must be one of ``settings.dry_run``: it is of no use afterwards."""
    settings, device, plan = run.settings.train, run.runtime.device, run.plan
    available = available_memory_bytes(device)
    rows, least = settings.batch_size, min(plan.sizes.rows, settings.batch_size)
    parts = known_bytes(run)
    found = Forecast(
        parts=parts,
        memory=None,
        available=available,
        seconds=None,
        rows=rows,
        passes=settings.gradient_accumulation_steps,
        update_seconds=0.0,
        tokens_per_row=settings.block_size,
        processes=run.world.size,
        steps=settings.max_steps - run.progress.step,
        evaluated_rows=settings.eval_windows * (settings.max_steps // settings.eval_every_steps + 1) // run.world.size,
        measured_rows=[],
    )
    if available is None or sum(parts.values()) - plan.kept_bytes <= available:
        _measure(run, found, least, say)
    found.advice = _advice(run, found)
    return found


def known_bytes(run: Run) -> dict[str, int]:
    """What a process of the run keeps, as far as the settings say it."""
    settings = run.settings.train
    local = [p.to_local() if hasattr(p, "to_local") else p for p in run.model.parameters()]
    weights = sum(p.numel() * p.element_size() for p in local)
    trained = sum(
        q.numel() * q.element_size() for p, q in zip(run.model.parameters(), local, strict=True) if p.requires_grad
    )
    found = {
        "weights": weights,
        "gradients": trained,
        "optimizer": trained * (2 if settings.optimizer == "adamw" else 1),
        "wide activations of a block": run.plan.block_bytes,
        "wide activations that are kept": run.plan.kept_bytes,
        "narrow activations": _narrow_bytes(run),
    }
    if run.average is not None:
        found["moving average"] = trained
    if run.carried is not None:
        found["carried state"] = run.carried.nbytes
    return found


def _measure(run: Run, found: Forecast, least: int, say: Callable[[str], None]) -> None:
    device, rows = run.runtime.device, found.rows
    batch = run.loader.next()
    part = next(iter(batch.split(rows)))
    step_model = run.parallel.step_model
    if run.settings.train.compile:
        step_model = torch.compile(step_model)
    say("a first pass, which compiles and fills the optimizer ...")
    _pass(run, step_model, part, least)
    found.update_seconds = _timed(run, lambda: _update(run))
    points: list[tuple[int, float, int]] = []
    for count in _counts(least, rows):
        if points and points[-1][1] * count / points[-1][0] > MEASURING_SECONDS:
            break
        say(f"a pass of {count} of {rows} sequences ...")
        restart_peak_memory(device)
        seconds = _timed(run, lambda count=count: _pass(run, step_model, part, count))  # type: ignore[misc]
        points.append((count, seconds, peak_memory_bytes(device) or 0))
        found.measured_rows.append(count)
    found.update_seconds = min(found.update_seconds, _timed(run, lambda: _update(run)))
    first, last = points[0], points[-1]
    found.seconds = Line.through(first[:2], last[:2])
    if used_memory_bytes(device) is not None:
        each = _bytes_of_a_row(run)  # not from two peaks: an allocator's steps are larger than a few sequences are
        found.memory = Line(max(0.0, last[2] - each * last[0]), each)


def _bytes_of_a_row(run: Run) -> float:
    """What one more sequence in a forward pass keeps: the narrow activations, its logits, and x where it is kept."""
    settings, config = run.settings.train, run.model.config
    logits = 3 * settings.block_size * config.vocab_size * 4  # with their gradient and its softmax
    return _narrow_bytes(run) / settings.batch_size + logits + run.plan.kept_bytes / settings.batch_size


def _narrow_bytes(run: Run) -> int:
    """Of each pass: its input, two norms' inputs, and the sum that it adds to."""
    settings, config = run.settings.train, run.model.config
    return 4 * (config.n_layer + 1) * settings.batch_size * settings.block_size * config.n_embd * 4


def _counts(least: int, rows: int) -> list[int]:
    """Numbers of sequences to measure: a block's, twice that, and all."""
    return sorted({least, min(rows, 2 * least), rows})


def _pass(run: Run, step_model: Callable[..., Any], part: Batch, rows: int) -> None:
    """A forward and backward pass over the first ``rows`` sequences."""
    some = next(iter(part.split(rows))).to(run.runtime.device)
    state = run.model.new_state(len(some.input_ids)) if run.carried is not None else None
    run.model.train()
    with run.runtime.autocast():
        loss = step_model(
            input_ids=some.input_ids,
            shift_labels=some.targets,
            document_starts=some.starts,
            num_items_in_batch=some.targets.numel(),
            past_key_values=state,
            use_cache=state is not None,
        ).loss
    run.scaler.scale(loss).backward()


def _update(run: Run) -> None:
    for optimizer in run.optimizers.all:
        run.scaler.step(optimizer)
    run.scaler.update()
    if run.average is not None:
        run.average.update(run.model, 1)
    run.optimizers.zero_grad()


def _timed(run: Run, work: Callable[[], None]) -> float:
    wait_for_device(run.runtime.device)
    start = time.perf_counter()
    work()
    wait_for_device(run.runtime.device)
    return time.perf_counter() - start


def _advice(run: Run, found: Forecast) -> list[str]:
    """Settings that need less memory, the mildest first, each with the peak that it would have where that is known."""
    settings, plan = run.settings.train, run.plan
    lines = []

    def told(peak: float | None) -> str:
        return "" if peak is None else f": {_gigabytes(peak)}"

    if plan.path == "plain" and settings.layer_path == "plain":
        lines.append("--train.layer_path auto, which keeps nothing wide")
    peak = found.peak
    if plan.kept_bytes:
        lines.append(f"--train.recompute pass{told(None if peak is None else peak - plan.kept_bytes)}")
    room = None if found.available is None else _MARGIN * found.available
    if found.memory is not None and room is not None:
        most = found.memory.most(room)
        fitting = [b for b in range(1, min(most, found.rows - 1) + 1) if found.rows % b == 0]
        if fitting:
            rows = fitting[-1]
            steps = settings.gradient_accumulation_steps * found.rows // rows
            flags = f"--train.batch_size {rows} --train.gradient_accumulation_steps {steps}"
            lines.append(f"{flags}{told(found.memory.at(rows))}")
    if run.world.size > 1 and run.parallel.strategy != "fsdp":
        lines.append("--distributed.strategy fsdp, which shares weights, gradients and optimizer among the processes")
    if plan.sizes.columns > 1:
        tokens = max(1, plan.sizes.columns // 2)
        lines.append(f"--train.tokens_per_block {tokens}, for smaller blocks")
    if settings.block_size > 1:
        half = None if found.memory is None else found.memory.at(found.rows / 2)
        lines.append(f"--train.block_size {settings.block_size // 2}{told(half)}")
    return lines


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.3f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
