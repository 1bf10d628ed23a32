"""Signals that ask a run to end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdh.distributed.world import World

# SIGUSR1 is what Slurm is told to send before a job's time is over (`#SBATCH --signal=USR1@120`).
SIGNALS = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
# 75 is EX_TEMPFAIL of sysexits.h: what was left undone should be tried again.
EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 75}
# These come more than once for one reason: SIGUSR1 from Slurm and, passed on, from `torchrun`; SIGHUP, when a terminal is
# closed, from the kernel and from the shell.
_MAY_REPEAT = ("SIGUSR1", "SIGHUP")


class Received:
    """The signals that have come so far."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def add(self, name: str) -> None:
        self._names.append(name)

    def __bool__(self) -> bool:
        return bool(self._names)

    def agreed(self, world: "World") -> str | None:
        """The same on every process: a signal that came to any of them, or None."""
        flags = world.any([name in self._names for name in SIGNALS])
        return next((name for name, flag in zip(SIGNALS, flags, strict=True) if flag), None)


@contextmanager
def deferred_signals() -> Iterator[Received]:
    """Collects signals, so that a step ends before the run does. A second one acts at once, as it does without this.

    Not so SIGUSR1 and SIGHUP, which may come twice. SIGHUP stays ignored where it is, as under ``nohup``. Outside of the
    main thread, where Python gives none, it collects nothing.
    """
    received = Received()
    before: dict[int, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        received.add(name)
        if name not in _MAY_REPEAT:
            restore()

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            each = signal.Signals[name]
            if name == "SIGHUP" and signal.getsignal(each) is signal.SIG_IGN:
                continue
            before[each] = signal.signal(each, remember)
    try:
        yield received
    finally:
        restore()
