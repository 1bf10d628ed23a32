"""Locks: at most one process writes something, be it on one machine or, over a network disk, on several.

A lock is a file beside or inside what it protects. It names its holder (host, process, its start), and the holder
touches it every few seconds. Who finds it held takes it over if the holder has ended, which is certain on the same
machine, and on another one is concluded from a lock that nobody has touched for a while. The clocks of the machines do
not matter: whoever waits watches the file for a change.
"""

import functools
import logging
import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

LEASE_SECONDS = 120.0
"""So long untouched, a lock of another machine counts as left behind."""
_BEATS = 12  # touches in that time
_logger = logging.getLogger(__name__)


class InUseError(OSError):
    """Another process writes there; nothing was changed."""


class Lock:
    """A lock on something, not taken yet. Not reentrant: its own process is as much another holder as any.

    Example::

        with Lock(folder / "lock", str(folder)):
            ...  # nobody else writes
    """

    def __init__(self, path: Path, target: str, *, wait: bool = False, advice: str = "try again when it has ended"):
        """
        Args:
            path: the lock's file, in a folder that is there.
            target: what it protects, for the errors.
            wait: for as long as another process holds it. Without, only to see whether a holder on another machine is
                alive.
            advice: what to do while another process holds it, for the errors.
        """
        self._path, self._target, self._wait, self._advice = path, target, wait, advice
        self._lease = SoftFileLease(
            path, lease_duration=LEASE_SECONDS, heartbeat_interval=LEASE_SECONDS / _BEATS, thread_local=False
        )

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            InUseError: another process holds it, and this one is not to wait.
            OSError: the lock's file cannot be written.
        """
        seen, changed = self._beat(), time.monotonic()
        is_announced = False
        while not self._take():
            ended = self._holder_has_ended()
            if ended is False and not self._wait:
                raise self._in_use()
            if (beat := self._beat()) not in (None, seen):
                if not self._wait:
                    raise self._in_use()
                seen, changed = beat, time.monotonic()
            if ended or (ended is None and time.monotonic() - changed > LEASE_SECONDS):
                self._remove(seen)
                continue
            if not is_announced:
                until = "it has ended" if self._wait else f"it shows that it is alive, at most {LEASE_SECONDS:g} s"
                _logger.warning("%s is in use by %s: waiting until %s", self._target, self._holder(), until)
                is_announced = True
            time.sleep(min(1.0, LEASE_SECONDS / _BEATS))

    def release(self) -> None:
        """Gives the lock back; nothing, if it is not held."""
        self._lease.release()

    def check(self) -> None:
        """Makes sure that the lock, once taken, is still this process's.

        Raises:
            InUseError: it was removed, or another process has taken it, as this one was stopped for too long.
        """
        owner, loss = self._lease.owner, self._lease.compromise
        if owner is not None and owner.token == self._lease.token:
            if loss is None:
                return
            self.release()  # the disk has not answered for a while, which has ended the touching
            if self._take():
                return
        holder = "nobody holds it" if owner is None else f"{self._holder()} holds it"
        raise InUseError(
            f"this process has lost its lock on {self._target}, now {holder}: it was stopped for too long, or somebody "
            f"removed {self._path}; it writes nothing more there"
        )

    def _take(self) -> bool:
        try:
            self._lease.acquire(timeout=0)
        except (Timeout, LeaseSettingsMismatch):
            return False
        try:
            with self._path.open("a", encoding="utf-8") as file:  # filelock skips lines that it does not know
                file.write(f"since={time.strftime('%Y-%m-%d %H:%M:%S%z')}\n")
        except OSError:
            self.release()
            raise
        return True

    def _beat(self) -> tuple[int, int] | None:
        """What is another after each touch and for each holder; None without a lock."""
        try:
            with self._path.open("rb") as file:  # opened, as network disks answer from memory otherwise
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _holder_has_ended(self) -> bool | None:
        """None where this machine cannot know."""
        owner = self._lease.owner
        if owner is None or owner.hostname != _host_name():
            return None
        if os.name == "nt":  # filelock has looked; os.kill would end the process
            return False
        try:
            os.kill(owner.pid, 0)
            state = Path(f"/proc/{owner.pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except ProcessLookupError:
            return True
        except OSError:  # a process of another user, or a system without /proc
            return False
        return state in (b"Z", b"X")  # killed, though its parent has not asked for its status yet

    def _remove(self, judged: tuple[int, int] | None) -> None:
        """Takes away the lock of a holder that has ended, if it is still the one that was judged.

        filelock does so itself by exchanging two names, but not on disks that cannot, such as NFS.
        """
        aside = self._path.with_name(f"{self._path.name}.{secrets.token_hex(8)}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:  # another process was faster
            return
        status = aside.stat()
        if (status.st_ino, status.st_mtime_ns) != judged:
            with suppress(FileExistsError):
                os.link(aside, self._path)
        aside.unlink()

    def _holder(self) -> str:
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
        facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        if "pid" not in facts:
            return "another process"
        since = f" since {facts['since']}" if "since" in facts else ""
        return f"process {facts['pid']} on {facts.get('host', '').partition('?')[0]}{since}"

    def _in_use(self) -> InUseError:
        return InUseError(f"{self._target} is in use by {self._holder()}: {self._advice}; nothing was changed")


@functools.cache
def _host_name() -> str:
    """This machine's name as filelock writes it, with the namespace of a container, whose process ids are its own."""
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder) / "lock") as lease:
        assert lease.owner is not None
        return lease.owner.hostname
