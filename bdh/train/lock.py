"""The lock on a run's folder: one training, or one export into it, at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bdh.distributed.world import World
from bdh.locks import InUseError, Lock
from bdh.storage import naming_full_disk
from bdh.train.places import LOCK_FILE, holds_run


class RunLock:
    """Keeps other starts out of a run's folder. Rank 0 takes it; all processes call :meth:`acquire` together."""

    def __init__(self, folder: Path, world: World | None = None):
        self._folder, self._world = folder, world or World()
        self._made: list[Path] = []
        self._lock = Lock(
            folder / LOCK_FILE,
            str(folder),
            advice="wait until it has ended, and continue the run with --resume, or give another --run_dir",
        )

    def acquire(self) -> None:
        """Takes the lock. The folder is made, if it is not there.

        Raises:
            InUseError: another process has it, on all processes alike.
            DiskFullError: there is no room for it; a folder that was made is removed.
            OSError: the folder cannot be written.
        """
        error = None
        if self._world.is_main:
            try:
                self._take()
            except OSError as caught:
                error = caught
        reason = self._world.gather(error and str(error))[0]
        if reason is not None:
            raise error or InUseError(reason)

    def check(self, *, seldom: bool = False) -> None:
        """Raises on rank 0, where another process has taken the lock meanwhile; see :meth:`bdh.locks.Lock.check`."""
        if self._world.is_main:
            self._lock.check(seldom=seldom)

    def release(self) -> None:
        """Gives the lock back; a folder that it made, and that has stayed empty, is removed."""
        if self._world.is_main:
            self._lock.release()
            self._remove_made()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self) -> None:
        self._made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        try:
            with naming_full_disk(self._folder):
                while True:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    with suppress(FileNotFoundError):  # another start has failed and removed its empty folder
                        self._lock.acquire()
                        break
        except BaseException:
            self._remove_made()
            raise

    def _remove_made(self) -> None:
        for folder in self._made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
        self._made = []


@contextmanager
def lock_run_around(path: Path) -> Iterator[None]:
    """Locks the run in whose folder ``path`` lies, if it lies in one, for a command that writes there.

    Raises:
        InUseError: the run is being trained.
    """
    run = next((folder for folder in path.resolve().parents if holds_run(folder)), None)
    if run is None:
        yield
        return
    with Lock(run / LOCK_FILE, str(run), advice="wait until it has ended, or write somewhere else"):
        yield
