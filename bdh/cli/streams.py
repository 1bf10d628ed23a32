"""Standard streams that may lose their reader: `| head`, a `tee` that was killed, a terminal that was closed."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# The reader of a pipe, or the terminal, is gone for good; other faults, such as a full disk, may pass.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ESHUTDOWN)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within, what cannot be written to stdout or stderr is lost, and ends nothing; the other one says so, once."""
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = _LastingStream(sys.stdout, before[1])
    if sys.stderr is not None:
        sys.stderr = _LastingStream(sys.stderr, before[0])
    lasting = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in lasting:
            if isinstance(stream, _LastingStream):
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
        if self._other is None:
            return
        try:
            name = self._stream.name.strip("<>")
            print(
                f"warning: {name} cannot be written to ({error.strerror}): what it is told is lost",
                file=self._other,
                flush=True,
            )
        except OSError:
            pass  # both have lost their reader: there is nobody to tell
