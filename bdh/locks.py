"""Locks that let at most one process write something, on one machine or on several that share a network disk.

A lock is a file beside or inside what it protects. It names its holder: the host, the process and the time when that
process started. The holder touches the file every few seconds. A process that finds the lock held takes it over if the
holder has ended. On the same machine this is certain. The holder on another machine is assumed to have ended if nobody
has touched the lock for a while, measured by the clock of the waiting process.
"""

import functools
import logging
import math
import os
import re
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

LEASE_SECONDS = 120.0
"""A lock of another machine counts as abandoned if nobody has touched it for this long."""
_BEATS = 12  # touches within LEASE_SECONDS
_CHECK_SECONDS = 5.0  # between two checks of a held lock, if a check is requested in each step
_ASIDE_SECONDS = 1.0  # more than a process takes to rename a lock and check it, see _remove
_MAX_BYTES = 1 << 14  # the most that is read of a lock; those written here have a few hundred
_logger = logging.getLogger(__name__)


class InUseError(OSError):
    """Another process holds the lock, or this process has lost it."""


class Lock:
    """A lock, to be acquired by a ``with`` statement.

    It is not reentrant: a second lock of the same process is treated like one of another process.

    Example::

        with Lock(folder / "lock", str(folder)):
            ...  # no other process writes
    """

    def __init__(self, path: Path, target: str, *, wait: bool = False, advice: str = "try again when it has ended"):
        """Creates a lock without acquiring it.

        Args:
            path: the lock's file, in a folder that exists.
            target: what the lock protects, for error messages.
            wait: whether to wait as long as another process holds the lock. If False, the lock waits only until it is
                clear whether a holder on another machine is alive.
            advice: what to do while another process holds the lock, for error messages.
        """
        self._path, self._target, self._wait, self._advice = path, target, wait, advice
        self._lease = SoftFileLease(
            path, lease_duration=LEASE_SECONDS, heartbeat_interval=LEASE_SECONDS / _BEATS, thread_local=False
        )
        self._checked_at = -math.inf  # when this was last checked
        self._unreadable_since: float | None = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Acquires the lock.

        Raises:
            InUseError: another process holds it, and ``wait`` is False. Nothing was changed.
            IsADirectoryError: the path of the lock is a folder.
            OSError: the lock's file cannot be written.
        """
        if self._path.is_dir():
            raise IsADirectoryError(
                f"{self._path} is a folder, but must be free for the lock on {self._target}: remove or rename it"
            )
        seen, changed = self._read()[1], time.monotonic()
        is_announced = False
        while not self._take():
            holder, beat = self._read()
            patience, is_touched = self._patience(holder, beat), beat not in (None, seen)
            if (patience == math.inf or is_touched) and not self._wait:
                raise InUseError(f"{self._target} is in use by {self._holder()}: {self._advice}; nothing was changed")
            if is_touched:
                seen, changed = beat, time.monotonic()
            if patience == 0 or time.monotonic() - changed > patience:
                if patience == 0 and _is_copy(holder, beat):
                    about = "%s is a copy, as of a folder that was copied while process %s used it: it is removed"
                    _logger.warning(about, self._path, holder["pid"])
                self._remove(seen)
                continue
            if not is_announced:
                until = "it has ended" if self._wait else f"it shows that it is alive, at most {patience:g} s"
                _logger.warning("%s is in use by %s: waiting until %s", self._target, self._holder(), until)
                is_announced = True
            time.sleep(min(1.0, LEASE_SECONDS / _BEATS))

    def release(self) -> None:
        """Releases the lock, if it is held."""
        self._lease.release()

    def is_held(self) -> bool:
        """Whether a process seems to hold the lock, without waiting and without changing the lock.

        That is so if the lock was touched within the last ``LEASE_SECONDS``, by the clock of this machine, and its holder
        is not known to have ended. A killed process of this machine is known to have ended at once.

        Raises:
            OSError: the lock cannot be read.
        """
        holder, beat = self._read()
        if beat is None:
            return False
        patience = LEASE_SECONDS
        with suppress(OSError):  # without space for a temporary file, nothing is known of the holder
            patience = min(patience, self._patience(holder, beat))
        return max(0.0, time.time() - beat.touched / 1e9) < patience

    def check(self, *, seldom: bool = False) -> None:
        """Checks that this process still holds the lock.

        If the disk does not answer, the lock counts as held for as long as no other machine can have acquired it.

        Args:
            seldom: whether to check only every few seconds, for a call in each step.

        Raises:
            InUseError: the lock was removed, another process acquired it while this one was suspended for too long, or
                it has been unreadable for too long.
        """
        now, token = time.monotonic(), self._lease.token
        if seldom and now - self._checked_at < _CHECK_SECONDS:
            return
        self._checked_at = now
        try:
            holder = self._read()[0]
            if token is not None and holder.get("token") != token:
                time.sleep(_ASIDE_SECONDS)
                holder = self._read()[0]
        except OSError as error:
            self._tolerate(error)
            return
        self._unreadable_since = None
        if token is not None and holder.get("token") == token:
            if self._lease.compromise is None:
                return
            self.release()  # touching has ended, because the disk did not answer for a while
            if self._take():
                return
        now_held = f"{self._holder()} holds it" if holder else "nobody holds it"
        raise InUseError(
            f"this process has lost its lock on {self._target}, now {now_held}: it was stopped for too long, or somebody "
            f"removed {self._path}; it writes nothing more there"
        )

    def _tolerate(self, error: OSError) -> None:
        """Lets the process continue for a while although the lock cannot be read. Raises ``InUseError`` after that."""
        now = time.monotonic()
        if self._unreadable_since is None:
            self._unreadable_since = now
            about = "the lock on %s cannot be read (%s): it counts as held for %g s more"
            _logger.warning(about, self._target, error, LEASE_SECONDS)
        if self._lease.compromise is not None or now - self._unreadable_since > LEASE_SECONDS:
            raise InUseError(
                f"this process may have lost its lock on {self._target}, which it cannot read any more ({error}); it "
                "writes nothing more there"
            ) from error

    def _take(self) -> bool:
        if _is_of_namesake(self._read()[0]):  # filelock would look for the process on this machine
            return False
        try:
            self._lease.acquire(timeout=0)
            with self._path.open("a", encoding="utf-8") as file:  # filelock ignores unknown lines
                since = time.strftime("%Y-%m-%d %H:%M:%S%z")
                file.write(f"since={since}\nfile={_Beat.of(os.fstat(file.fileno())).file}\n")
        except (Timeout, LeaseSettingsMismatch):
            return False
        except OSError as error:
            self.release()
            error.filename = error.filename or str(self._path)
            raise
        return True

    def _read(self) -> tuple[dict[str, str], "_Beat | None"]:
        """Returns the lock's description of its holder, and its beat; empty and None if there is no lock."""
        try:
            with self._path.open("rb") as file:  # opened, because network disks may otherwise return cached facts
                text, status = file.read(_MAX_BYTES).decode("utf-8", errors="replace"), os.fstat(file.fileno())
        except FileNotFoundError:
            return {}, None
        lines = text.split("\n")[:-1]  # without an incomplete line
        return dict(line.split("=", 1) for line in lines if "=" in line), _Beat.of(status)

    def _patience(self, holder: dict[str, str], beat: "_Beat | None") -> float:
        """Returns for how many seconds a lock must be untouched for its holder to count as ended.

        The result is 0 if the holder has ended, and infinity if it is alive.
        """
        pid = holder.get("pid", "")
        if not pid:  # the process that was writing it was killed, or is about to touch it
            return 2 * LEASE_SECONDS / _BEATS
        if holder.get("host") != _machine()[0] or not re.fullmatch("[0-9]{1,9}", pid):
            return LEASE_SECONDS
        if _is_of_namesake(holder):
            return 2 * LEASE_SECONDS / _BEATS
        if _is_copy(holder, beat):
            return 0
        if os.name == "nt":  # filelock has checked it; os.kill would end the process
            return math.inf
        try:
            os.kill(int(pid), 0)
            state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except ProcessLookupError:
            return 0
        except OSError:  # a process of another user, or a system without /proc
            return math.inf
        return 0 if state in (b"Z", b"X") else math.inf  # a zombie has ended

    def _remove(self, judged: "_Beat | None") -> None:
        """Removes the lock of a holder that has ended, unless the lock has changed since it was judged.

        filelock does this itself by exchanging two names, which is not possible on some disks, such as NFS.
        """
        aside = self._path.with_name(f"{self._path.name}.{secrets.token_hex(8)}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:  # another process was faster
            return
        if _Beat.of(aside.stat()) != judged:
            with suppress(FileExistsError):
                os.link(aside, self._path)
        aside.unlink()

    def _holder(self) -> str:
        facts = self._read()[0]
        if "pid" not in facts:
            return "another process"
        since = f" since {facts['since']}" if "since" in facts else ""
        return f"process {facts['pid']} on {facts.get('host', '').partition('?')[0]}{since}"


class _Beat(NamedTuple):
    """A value that changes with each touch of a lock and with each holder."""

    file: str
    touched: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        return cls(f"{status.st_dev}:{status.st_ino}", status.st_mtime_ns)


def _is_copy(holder: dict[str, str], beat: _Beat | None) -> bool:
    """Whether the file of a lock is not the one that its holder made."""
    return beat is not None and holder.get("file", beat.file) != beat.file


def _is_of_namesake(holder: dict[str, str]) -> bool:
    """Whether a lock is of another machine with the same name, or of this machine before it was restarted.

    In both cases the boot ids differ, if both are known.
    """
    name, boot = _machine()
    start = holder.get("start", "")
    is_known = holder.get("host") == name and re.fullmatch("[0-9]{1,60}", start)
    return bool(is_known) and 0 != boot != _boot(int(start)) != 0


@functools.cache
def _machine() -> tuple[str, int]:
    """Returns the name and the boot id of this machine as filelock records them.

    Process ids in a container are its own, so the name includes the container's namespace. The boot id is 0 if it is
    unknown.
    """
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder) / "lock") as lease:
        assert lease.owner is not None
        return lease.owner.hostname, _boot(lease.owner.start or 0)


def _boot(start: int) -> int:
    """Returns the boot id, which filelock puts above the lower 64 bits of a process's start if the system has one."""
    return start >> 64
