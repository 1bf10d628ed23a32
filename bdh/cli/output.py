"""The output of commands: standard streams whose reader may disappear, log lines of libraries, and progress bars.

transformers, datasets, huggingface_hub and others also log the errors that they raise, and each attempt of a download.
These lines are held back while a command starts, so that an error is the only line that the user sees. See also
:mod:`bdh.unneeded_lines`.
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

# The reader of a pipe, or the terminal, is gone for good. Other errors, such as a full disk, may be temporary.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ESHUTDOWN)
StageProgress = Callable[[str, int, int | None], None]
_kept: list[tuple[logging.Logger, logging.LogRecord]] | None = None  # None while nothing is held back


@contextmanager
def kept_back(*, show_on_error: bool) -> Iterator[None]:
    """A context that holds back log lines of libraries imported within it, until :func:`show_kept` or its end.

    At the end they are shown. After an exception, they are only shown with ``show_on_error``. Lines of this package are
    never held back.
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
    """Shows the lines that were held back. Later lines are shown at once."""
    global _kept
    kept, _kept = _kept or [], None
    logging.captureWarnings(False)
    for logger, record in kept:
        if logger.name == "py.warnings":  # has no handler of its own
            print(record.getMessage(), end="", file=sys.stderr)
        else:
            logger.handle(record)


class _KeepingLogger(logging.Logger):
    """A logger whose lines can be held back. Loggers of this package are not changed."""

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
    """A context in which failed writes to stdout or stderr are ignored. The other stream reports the first failure."""
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
    """A stream whose write errors are not raised."""

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
        """Flushes the stream. What cannot be written is discarded, so that Python does not fail when it exits."""
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
        """Redirects the file descriptor to the null device, for the content of buffers and all later writes.

        This includes writes of Python itself and of libraries.
        """
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        finally:
            os.close(nowhere)

    def _announce(self, error: OSError) -> None:
        name = self._stream.name.strip("<>")
        about = f"warning: {name} cannot be written to ({error.strerror}): what is written there is lost"
        if self._other is not None:
            with suppress(OSError):  # neither stream has a reader any more
                print(about, file=self._other, flush=True)


def print_error(message: str) -> None:
    """Prints an error to the standard error; in a terminal, the first line is red."""
    first, *others = message.splitlines() or [""]
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error: {first}{plain}", *others, sep="\n", file=sys.stderr, flush=True)


def table_lines(rows: Sequence[Sequence[str]], *, num_names: int) -> list[str]:
    """Returns the lines of a table. The first ``num_names`` columns are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [str.ljust] * num_names + [str.rjust] * (len(widths) - num_names)
    return ["  ".join(map(lambda align, *cell: align(*cell), aligned, row, widths)).rstrip() for row in rows]


def indented(text: str) -> str:
    """Indents a line that belongs to an entry of a list.

    In a terminal it is wrapped to the terminal's width. Otherwise it stays on one line, for other programs.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(text) + 4
    wrapper = textwrap.TextWrapper(width, "    ", "      ", break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text)


def error_console(**options: Any) -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, **options)


@contextmanager
def stage_progress(unit: str, console: "Console | None" = None) -> Iterator[StageProgress]:
    """A context that shows a line for each stage of some work.

    It yields a function to call with the stage, the amount done, and the total amount, or None if it is unknown.
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
    """A context that shows a bar for ``total`` items. It yields a function to call with the number done so far."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = error_console()
    columns = (description, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda number: bar.update(task, completed=number)


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A context that shows a bar for each stage of some work.

    It yields a function to call with the stage, the amount done, and the total amount.
    """
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
