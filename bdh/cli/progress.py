"""Progress bars of the commands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

StageProgress = Callable[[str, int, int | None], None]


@contextmanager
def stage_progress(console: Console, unit: str) -> Iterator[StageProgress]:
    """A line for each stage of some work; yields a function of the stage, how far it is, and of how much.

    The total is None where nobody knows it.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, int] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None, done="")
            share = f" of {total:,}" if total else ""
            bar.update(tasks[stage], done=f"{done:,}{share} {unit}" if done else "")  # type: ignore[arg-type]

        yield report


@contextmanager
def count_progress(
    console: Console, description: str, unit: str, total: int, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` things; yields a function that takes the number done so far."""
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda number: bar.update(task, completed=number)


@contextmanager
def token_progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` tokens; yields a function that takes the number done so far."""
    with count_progress(console, "evaluating", "tokens", total) as advance:
        yield advance
