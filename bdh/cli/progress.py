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
def token_progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` tokens; yields a function that takes the number done so far."""
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda num_tokens: bar.update(task, completed=num_tokens)
