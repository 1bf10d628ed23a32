"""Whether the kernels run on this machine, with how many threads, and their compilation.

Other programs may keep the kernels' threads from the cores. Linux counts for each thread how long it was ready to run and
had no core. What all threads of the process have waited so, by the second, is about half of a thread for each core that
another program keeps busy, since the two take turns there. :data:`crowding` follows that.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

_one_at_a_time = threading.RLock()
_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True
    unavailable_reason.cache_clear()


@cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_note_fork)


def to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if _is_forked:
        return "this process was forked from one that has used them, which OpenMP does not bear"
    try:
        import numba  # noqa: F401
    except (ImportError, OSError) as error:  # no such package, or none for this processor
        return f"numba cannot be imported: {error}"
    return None


def most_threads() -> int:
    """On how many threads kernels may run: as many as torch's operations, as far as numba has them."""
    return min(torch.get_num_threads(), _numba_threads())


@cache
def _numba_threads() -> int:
    import numba

    return numba.config.NUMBA_NUM_THREADS


_LOOK_SECONDS = 0.2
_CROWDED = 0.3
"""Threads that wait, in the mean, from which on the cores are taken to be short."""
_HOLD_SECONDS = 0.5, 2.0
"""For how long there are fewer threads before all are tried again: the first time, and at most."""


def waited_seconds() -> float | None:
    """For how long the threads of this process, all together, were ready to run and had no core; None if nobody counts it."""
    total = 0
    try:
        for name in os.listdir("/proc/self/task"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                # Without a Python file around it: half of the time, where threads are many.
                file = os.open(f"/proc/self/task/{name}/schedstat", os.O_RDONLY)
                try:
                    total += int(os.read(file, 100).split()[1])
                finally:
                    os.close(file)
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9


class Crowding:
    """Follows how many cores others keep busy, as calls of the kernels come. ``clock`` gives seconds."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        waited: Callable[[], float | None] = waited_seconds,
    ):
        self._clock, self._waited = clock, waited
        self._lock = threading.Lock()
        self._last: tuple[float, float] | None = None  # when it was looked at, and what had been waited by then
        self._used = 0  # the most threads that a call has had since
        self._busy_cores = 0
        self._hold, self._until, self._freed = _HOLD_SECONDS[0], 0.0, -1e9

    def busy_cores(self, num_threads: int, *, leaves_cores: bool) -> int:
        """How many cores others keep busy, below ``num_threads``, which is what the caller would have without them.

        Args:
            leaves_cores: the caller then takes so many threads fewer.
        """
        with self._lock:
            self._look(num_threads)
            found = min(self._busy_cores, num_threads - 1)
            self._used = max(self._used, num_threads - found if leaves_cores else num_threads)
        return found

    def _look(self, num_threads: int) -> None:
        now = self._clock()
        if self._last is not None and now - self._last[0] < _LOOK_SECONDS:
            return
        waited, before = self._waited(), self._last
        if waited is None:
            return
        used, self._used, self._last = self._used, 0, (now, waited)
        if before is None or num_threads == 1:
            return
        share = (waited - before[1]) / (now - before[0])
        if share > _CROWDED:
            # All were tried again not long ago: the next time, later.
            is_again = now - self._freed < 3 * _LOOK_SECONDS
            self._hold = min(2 * self._hold, _HOLD_SECONDS[1]) if is_again else max(self._hold, _HOLD_SECONDS[0])
            self._busy_cores = min(max(num_threads - used, 0) + max(1, round(2 * share)), num_threads - 1)
            self._until, self._freed = now + self._hold, -1e9
        elif self._busy_cores and now >= self._until:
            self._busy_cores -= 1
            self._until, self._freed = now + _LOOK_SECONDS, now
        elif not self._busy_cores and now >= self._until + _HOLD_SECONDS[1]:
            self._hold = _HOLD_SECONDS[0]


crowding = Crowding()
"""Of this process."""


class _Calm:
    """Lets the OpenMP of torch and numba wait for a moment only, instead of milliseconds, while it is on.

    libgomp does so by itself while its threads are more than the cores (GOMP_SPINCOUNT in its manual): so there is a
    thread with a team of its own, which sleeps.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: threading.Event | None = None

    def set(self, on: bool) -> None:
        if on == (self._end is not None):
            return
        with self._lock:
            if on and self._end is None:
                self._end = threading.Event()
                threading.Thread(target=self._stay, args=[self._end], name="bdh-openmp", daemon=True).start()
            elif not on and self._end is not None:
                self._end.set()
                self._end = None

    @staticmethod
    def _stay(end: threading.Event) -> None:
        torch.zeros(1 << 20, device="cpu").add_(1)  # by all threads of a new team
        end.wait()


calm = _Calm()


FEW_ROWS = 16
"""Up to so many rows a call leaves busy cores to others. In a longer one a thread that gets half of a core is worth having."""


SPINS, SPINS_WHEN_CROWDED = 10_000, 300
"""How often a waiting thread looks before it sleeps. A look takes 20 to 50 nanoseconds."""


class Team(NamedTuple):
    """Who does a call of the kernels."""

    threads: int
    is_crowded: bool = False
    """Whether other programs keep cores busy, so that it is better to sleep soon."""

    def new_progress(self, num_stages: int) -> np.ndarray:
        """The counters of so many stages (:mod:`bdh.ops.cpu.pieces`); each can be gone through once."""
        return _unused_counters(num_stages, SPINS_WHEN_CROWDED if self.is_crowded else SPINS).copy()


@cache
def _unused_counters(num_stages: int, spins: int) -> np.ndarray:
    from bdh.ops.cpu.pieces import SPINS_WORD, STAGE_WORDS

    progress = np.zeros((num_stages, STAGE_WORDS), np.int64)
    progress[:, SPINS_WORD] = spins
    return progress


def team_for(num_rows: int) -> Team:
    """For so many rows, whose bits do not depend on the threads."""
    most, leaves_cores = most_threads(), num_rows <= FEW_ROWS
    busy = crowding.busy_cores(most, leaves_cores=leaves_cores)
    return Team(most - busy if leaves_cores else most, busy > 0)


def exclusive() -> AbstractContextManager[object]:
    """Held while kernels run: by one thread at a time, where numba's threading layer bears no more.

    That is its own one, workqueue, which ends the process otherwise. It serves where there is no OpenMP.
    """
    import numba

    try:
        is_safe = numba.threading_layer() != "workqueue"
    except ValueError:  # nothing has run yet, so it is not chosen
        is_safe = False
    return nullcontext() if is_safe else _one_at_a_time


_addresses: dict[tuple[Any, bytes], int] = {}  # of compiled functions, by the types of their arguments


def run_by_threads(num_threads: int, kernel: Any, *arguments: Any) -> None:
    """Has each of so many threads call a kernel, a function of :data:`bdh.ops.cpu.pieces.jit`, with its own number before these.

    By its address: within the ``prange`` its code would be optimised and compiled three times more, which takes seconds.
    """
    from bdh.ops.cpu import pieces

    key = kernel, pieces.types_of(arguments)
    if key not in _addresses:
        _addresses[key] = pieces.address_of(kernel, arguments)
    with exclusive():
        pieces.launch(num_threads, min(num_threads, _numba_threads()), _addresses[key], arguments)


def compiled(what: str, run: Callable[[], None], announce: Callable[[str], None] = to_stderr) -> None:
    """Runs something small that uses every kernel of ``what``, so that they are compiled, or loaded from the disk.

    Says so where numba compiles, and not where it loads, however long that takes on a busy machine: compiling takes some
    ten seconds, once for each version and processor.
    """
    from numba.core import event

    begun: list[float] = []

    class Compiling(event.Listener):
        def on_start(self, event: object) -> None:
            if not begun:
                begun.append(time.perf_counter())
                announce(f"compiling the kernels for {what}, once on this processor ...")

        def on_end(self, event: object) -> None:
            pass

    _watch_forks()
    threads = torch.get_num_threads()
    try:
        with event.install_listener("numba:compile", Compiling()):
            run()
    finally:
        # numba and torch share OpenMP, and numba's first launch asks it for all cores.
        torch.set_num_threads(threads)
    if begun:
        announce(f"the kernels for {what} are ready, after {time.perf_counter() - begun[0]:.1f} s")
