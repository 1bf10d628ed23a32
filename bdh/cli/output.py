"""What a command shows: its standard streams, which may lose their reader, what libraries log, and progress bars.

transformers, datasets, huggingface_hub and others log what they raise too, and each try of a download. That is kept back
while a command gets ready, so that an error is the one line that its reader sees. See also :mod:`bdh.unneeded_lines`.
"""

import errno
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from bdh.unneeded_lines import hide_unneeded_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

# The reader of a pipe, or the terminal, is gone for good; other faults, such as a full disk, may pass.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ESHUTDOWN)
StageProgress = Callable[[str, int, int | None], None]
_kept: list[tuple[logging.Logger, logging.LogRecord]] | None = None  # where nothing is kept back


@contextmanager
def kept_back(*, show_on_error: bool) -> Iterator[None]:
    """Keeps back the lines of libraries that are imported within, until :func:`show_kept` or the end.

    At the end they are shown, but where an exception is raised only with ``show_on_error``. Our own are never kept.
    """
    global _kept
    logger_class = logging.getLoggerClass()
    logging.setLoggerClass(_KeepingLogger)
    logging.captureWarnings(True)
    _kept = []
    if not show_on_error:
        hide_unneeded_lines()
    try:
        yield
    except Exception:
        if not show_on_error:
            _kept = []
        raise
    finally:
        show_kept()
        logging.setLoggerClass(logger_class)


def show_kept() -> None:
    """Shows what was kept back; from now on, lines are shown as they come."""
    global _kept
    kept, _kept = _kept or [], None
    logging.captureWarnings(False)
    for logger, record in kept:
        if logger.name == "py.warnings":  # which has no handler but for this time
            print(record.getMessage(), end="", file=sys.stderr)
        else:
            logger.handle(record)


class _KeepingLogger(logging.Logger):
    """A logger whose lines can be kept back, unless it is one of ours, on which nothing is put."""

    def __init__(self, name: str, level: int = logging.NOTSET):
        super().__init__(name, level)
        if name.partition(".")[0] != "bdh":
            self.addFilter(self._is_shown_now)

    def _is_shown_now(self, record: logging.LogRecord) -> bool:
        if _kept is not None:
            _kept.append((self, record))
        return _kept is None


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within, what cannot be written to stdout or stderr is lost, and ends nothing; the other one says so, once."""
    before = sys.stdout, sys.stderr
    lasting = [stream and _LastingStream(stream, other) for stream, other in (before, before[::-1])]
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in filter(None, lasting):
            stream.end()
        sys.stdout, sys.stderr = before


class _LastingStream:
    """A stream whose faults are its own."""

    def __init__(self, stream: TextIO, other: TextIO | None):
        self._stream, self._other = stream, other
        self._has_failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def end(self) -> None:
        """Writes what is left; what cannot be written is lost here rather than a fault at Python's end."""
        if not self._tried(self._stream.flush):
            self._discard()
            self._tried(self._stream.flush)

    def _tried(self, write: Callable[[], Any]) -> bool:
        try:
            write()
        except OSError as error:
            if error.errno in _GONE:
                self._discard()
            if not self._has_failed:
                self._has_failed = True
                self._announce(error)
            return False
        return True

    def _discard(self) -> None:
        """Leads what follows, and what lies in the buffers, to nowhere: Python's own writing and that of libraries."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        finally:
            os.close(nowhere)

    def _announce(self, error: OSError) -> None:
        name = self._stream.name.strip("<>")
        about = f"warning: {name} cannot be written to ({error.strerror}): what is written there is lost"
        if self._other is not None:
            with suppress(OSError):  # both have lost their reader: nobody is left
                print(about, file=self._other, flush=True)


def print_error(message: str) -> None:
    """To standard error, the first line in red on a terminal."""
    first, *others = message.splitlines() or [""]
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error: {first}{plain}", *others, sep="\n", file=sys.stderr, flush=True)


def table_lines(rows: Sequence[Sequence[str]], *, num_names: int) -> list[str]:
    """In columns, of which the first ones hold names and the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [str.ljust] * num_names + [str.rjust] * (len(widths) - num_names)
    return ["  ".join(map(lambda align, *cell: align(*cell), aligned, row, widths)).rstrip() for row in rows]


def indented(text: str) -> str:
    """A line below an entry of a list: on a terminal as several, that none is wider than it; else whole, for other programs."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(text) + 4
    wrapper = textwrap.TextWrapper(width, "    ", "      ", break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text)


def error_console(**options: Any) -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, **options)


@contextmanager
def stage_progress(unit: str, console: "Console | None" = None) -> Iterator[StageProgress]:
    """A line for each stage of some work; yields a function of the stage, how far it is, and of how much.

    The total is None where nobody knows it.
    """
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    console = console or error_console()
    columns = (SpinnerColumn(), "{task.description}", "{task.fields[done]}", TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=None, done="")
            share = f" of {total:,}" if total else ""
            bar.update(tasks[stage], done=f"{done:,}{share} {unit}" if done else "")

        yield report


@contextmanager
def count_progress(description: str, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` things; yields a function that takes the number done so far."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = error_console()
    columns = (description, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda number: bar.update(task, completed=number)


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of some work; yields a function of the stage, how far it is, and of how much."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = error_console()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
