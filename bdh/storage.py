"""Atomic writes of files and folders: under a temporary name, synced to the disk, and then renamed."""

import ctypes
import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bdh.words import first_line

if TYPE_CHECKING:
    from bdh.locks import Lock

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The wording of a full disk in the exceptions of libraries written in Rust and C++.
_SAYS_FULL = re.compile(rf".*({os.strerror(errno.ENOSPC)}|\bos error ({'|'.join(map(str, sorted(_FULL)))})\b).*")
_OF_WRITER = re.compile("inline_container|PytorchStreamWriter")  # an error of PyTorch's writer, which explains nothing
_LEAST_FREE = 1 << 16  # bytes; with less, an unexplained failure of PyTorch's writer is taken for a full disk
# The errors of systems and file systems that cannot exchange two names: EPERM of seccomp filters, EXDEV of overlayfs.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM}
_logger = logging.getLogger(__name__)


def check_file(path: Path, what: str) -> None:
    """Raises ``FileNotFoundError`` if a file does not exist; ``what`` describes it in the message."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, not a {what}" if path.is_dir() else f"there is no {what} {path}")


def check_free(folder: Path, advice: str = "choose another folder") -> None:
    """Raises ``FileExistsError`` if the path exists and is not an empty folder, or if a parent is not a folder."""
    above = next(each for each in folder.absolute().parents if each.exists())
    if not above.is_dir():
        raise FileExistsError(f"{folder} cannot be written: {above} is a file")
    if is_taken(folder):
        raise FileExistsError(f"{folder} exists already and is not empty: {advice}")


def check_folder_of(file: Path, setting: str) -> None:
    """Raises ``FileNotFoundError`` if the folder into which a file is to be written does not exist."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{setting} is {str(file)!r}: must be a file in a folder that exists")


class DiskFullError(OSError):
    """The disk is full. Nothing that was partly written is left."""


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """A context that yields a temporary folder, which replaces ``folder`` when the block ends.

    If the block raises an exception, or the process dies, ``folder`` is unchanged. If the system cannot exchange two
    folders in one step, a process that dies in between leaves the old folder under another name. Code that opens such
    folders should therefore call :func:`recover_dir` first.

    Raises:
        InUseError: another process is writing the folder.
        DiskFullError: the block or the sync failed because the disk is full.
    """
    with _writing(folder) as (temporary, lock):
        temporary.mkdir()
        yield temporary
        allowed = temporary.stat().st_mode & 0o666  # the permissions that the umask allows
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                _allow(path, allowed)
            sync(path)
        lock.check()
        _replace_dir(folder, temporary)


def recover_dir(folder: Path) -> None:
    """Restores a folder that a process was replacing when it died, and logs it. Call it before opening the folder.

    If nothing can be written, as on a read-only disk, this is logged instead, and the folder stays missing.
    """
    if os.path.lexists(folder) or not (old := _old_name(folder)).is_dir():
        return
    try:
        with _lock(folder, wait=True):  # waits for a process that is replacing it at the moment
            if not _put_back(folder):
                return
            sync(folder.parent)
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            raise
        about = "%s was being replaced when a process died, and the one before, %s, cannot be put back (%s)"
        _logger.warning(about, folder, old, os.strerror(error.errno or 0))
    else:
        _logger.warning("%s was being replaced when a process died: the one before is back in its place", folder)


def recover_dirs(parent: Path) -> None:
    """Calls :func:`recover_dir` for all folders within another."""
    for old in parent.glob(".*.old"):
        recover_dir(parent / old.name.removeprefix(".").removesuffix(".old"))


def is_taken(folder: Path) -> bool:
    """Whether a path exists and is not an empty folder. Calls :func:`recover_dir` first."""
    recover_dir(folder)
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def temporary_name(path: Path) -> Path:
    """Returns the name under which a file or folder is written before it is renamed."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A context that yields a temporary path, whose file replaces ``path`` when the block ends; see :func:`atomic_dir`.

    Args:
        path: the file.
        private: whether to deny other users access regardless of the umask, as for the texts of conversations.
    """
    with _writing(path) as (temporary, lock):
        temporary.touch(0o600 if private else 0o666)
        allowed = temporary.stat().st_mode & 0o666
        yield temporary
        _allow(temporary, allowed)
        sync(temporary)
        lock.check()
        temporary.replace(path)
        sync(path.parent)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Writes a text file atomically. Arguments and exceptions are those of :func:`atomic_file`."""
    with atomic_file(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _allow(path: Path, mode: int) -> None:
    """Gives a file the permissions that ``open`` would give it, since safetensors writes files with 0600."""
    if path.stat().st_mode & 0o666 != mode:
        path.chmod(mode)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # folders cannot be opened on Windows, which syncs them itself
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(target: Path) -> Iterator[tuple[Path, "Lock"]]:
    """A context that yields a target's temporary name, which is removed after an error, and its lock, which is held."""
    temporary = temporary_name(target)
    with naming_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target) as lock:
            for left in (temporary, removed_name(target)):  # left by a process that was killed
                remove(left)
            try:
                _put_back(target)
                with naming_full_disk(target):  # checked before the removal below frees space
                    yield temporary, lock
            finally:
                _put_back(target)  # after an error between the two renames
                remove(temporary)


@contextmanager
def naming_full_disk(target: Path) -> Iterator[None]:
    """A context that raises :class:`DiskFullError` if the block fails because there is no space to write ``target``."""
    try:
        yield
    except DiskFullError:  # already converted
        raise
    except Exception as error:
        reason = _why_full(error, target.parent)
        if reason is None:
            raise
        raise DiskFullError(f"the disk is full, {target} could not be written{reason and f' ({reason})'}") from error


def _lock(target: Path, *, wait: bool = False) -> "Lock":
    from bdh.locks import Lock  # filelock takes a while to import, and most commands write nothing

    return Lock(target.with_name(f".{target.name}.lock"), str(target), wait=wait)


def _replace_dir(folder: Path, temporary: Path) -> None:
    if not os.path.lexists(folder):
        temporary.rename(folder)
    elif not exchange(folder, temporary):
        _logger.info("%s cannot be exchanged in one step: it is renamed first", folder)
        old = _old_name(folder)
        _remove_old(folder)
        folder.rename(old)
        temporary.rename(folder)
        sync(folder.parent)
        _remove_old(folder)
    sync(folder.parent)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders atomically. Returns False if the system or file system cannot."""
    if os.name == "nt":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*paths, 2)  # RENAME_SWAP
    elif sys.platform == "linux" and hasattr(libc, "renameat2"):
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, paths[0], here, paths[1], 2)  # RENAME_EXCHANGE
    else:
        return False
    if failed and (number := ctypes.get_errno()) not in _NO_EXCHANGE:
        raise OSError(number, os.strerror(number), str(one), None, str(other))
    return not failed


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def removed_name(path: Path) -> Path:
    """Returns the name of a folder while it is deleted, so that an interrupted deletion is never restored."""
    return path.with_name(f".{path.name}.removed")


def _remove_old(folder: Path) -> None:
    old = _old_name(folder)
    if old.is_dir() and not old.is_symlink():
        old = old.rename(removed_name(folder))
    remove(old)


def _put_back(folder: Path) -> bool:
    """Undoes a replacement that was interrupted between its two renames. Returns whether there was one."""
    old = _old_name(folder)
    is_broken_off = not os.path.lexists(folder) and old.is_dir()
    if is_broken_off:
        old.rename(folder)
    return is_broken_off


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _why_full(error: Exception, folder: Path) -> str | None:
    """Returns the error's own words for a full disk, or None if it is another error.

    The words are those of any error if there is no space left, and empty if they explain nothing.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in _FULL else None
    if said := _SAYS_FULL.search(str(error)):
        return said[0].strip()
    may_be = isinstance(error, (OSError, RuntimeError)) and folder.is_dir()
    if not may_be or shutil.disk_usage(folder).free >= _LEAST_FREE:
        return None
    return "" if _OF_WRITER.search(str(error)) else first_line(error)
