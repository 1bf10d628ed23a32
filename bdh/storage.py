"""Writing that is whole or not there: under a temporary name, synced to the disk, and then renamed."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The words that libraries written in Rust and C++ put into exceptions of their own.
_SAYS_FULL = re.compile(rf"{os.strerror(errno.ENOSPC)}|\bos error ({'|'.join(map(str, sorted(_FULL)))})\b")
_ROOM = 1 << 16  # bytes; with less than this free, PyTorch's writer has failed for want of room, which it does not say


class DiskFullError(OSError):
    """There was no room for what should have been written; nothing of it is left."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place and name of ``folder`` when the block ends.

    If the block raises, or the process dies, ``folder`` is what it was before. Not for two processes at a time.

    Raises:
        DiskFullError: the block or the syncing raised for want of room.
    """
    temporary, old = temporary_name(folder), folder.with_name(f".{folder.name}.old")
    with _removed_on_error(temporary, folder):
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """Where a file or folder is written before it takes its place."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file's name to write to, which takes the place and name of ``path`` when the block ends; see above."""
    temporary = temporary_name(path)
    with _removed_on_error(temporary, path):
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by a text, as a whole. Raises as :func:`whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # cannot be opened there; the system does so by itself
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _removed_on_error(temporary: Path, target: Path) -> Iterator[None]:
    _remove(temporary)  # of a process that was killed
    try:
        yield
    except BaseException as error:
        is_full = isinstance(error, Exception) and _is_full(error, temporary.parent)
        _remove(temporary)
        if is_full:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DiskFullError(f"the disk is full, {target} could not be written ({reason})") from error
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if _SAYS_FULL.search(str(error)):
        return True
    return isinstance(error, (OSError, RuntimeError)) and folder.is_dir() and shutil.disk_usage(folder).free < _ROOM
