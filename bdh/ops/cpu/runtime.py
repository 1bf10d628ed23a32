"""Whether the kernels run on this machine, on how many threads, and their compilation.

Other programs can keep the cores from the kernels' threads. Linux counts for each thread how long it was ready to run
and had no core. For all threads of the process together, this wait per second is about half of a thread for each core
that another program keeps busy, since the two take turns there. :data:`crowding` follows it.
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
    """Returns why the kernels cannot run here, or None if they can."""
    if _is_forked:
        return "this process was forked from one that has used them, which OpenMP does not support"
    try:
        import numba  # noqa: F401
    except (ImportError, OSError) as error:  # no such package, or none for this processor
        return f"numba cannot be imported: {error}"
    return None


def most_threads() -> int:
    """Returns the number of threads for kernels: as many as for torch's operations, as far as numba has them."""
    return min(torch.get_num_threads(), _numba_threads())


@cache
def _numba_threads() -> int:
    import numba

    return numba.config.NUMBA_NUM_THREADS


_LOOK_SECONDS = 0.2
_CROWDED = 0.3
"""The mean number of waiting threads above which cores count as scarce."""
_HOLD_SECONDS = 0.5, 2.0
"""How long fewer threads are used before one more is tried again: the first time, and at most."""


def waited_seconds() -> float | None:
    """Returns the total time for which threads of this process were ready to run and had no core.

    It is None if the system does not count this time.
    """
    total = 0
    try:
        for name in os.listdir("/proc/self/task"):
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
                # A Python file object would double the time with many threads.
                file = os.open(f"/proc/self/task/{name}/schedstat", os.O_RDONLY)
                try:
                    total += int(os.read(file, 100).split()[1])
                finally:
                    os.close(file)
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9


class Crowding:
    """Follows how many cores other programs keep busy, whenever kernels are called. ``clock`` returns seconds."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        waited: Callable[[], float | None] = waited_seconds,
    ):
        self._clock, self._waited = clock, waited
        self._lock = threading.Lock()
        self._last: tuple[float, float] | None = None  # the time of the last check, and the wait until then
        self._used = 0  # the most threads of a call since then
        self._busy_cores = 0
        self._hold, self._until, self._freed = _HOLD_SECONDS[0], 0.0, -1e9

    def busy_cores(self, num_threads: int, *, leaves_cores: bool) -> int:
        """Returns how many cores other programs keep busy, which is less than ``num_threads``.

        Args:
            num_threads: the number of threads that the caller would use without other programs.
            leaves_cores: whether the caller then uses this many threads fewer.
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
            # Another thread was tried again not long ago, so the next try is later.
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
"""The instance of this process."""


class _Calm:
    """While it is on, idle OpenMP threads of torch and numba spin only for a moment, instead of milliseconds.

    libgomp does so itself while it has more threads than cores (GOMP_SPINCOUNT in its manual). An additional thread
    with a team of its own, which sleeps, brings this about.
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
        torch.zeros(1 << 20, device="cpu").add_(1)  # uses all threads of a new team
        end.wait()


calm = _Calm()


FEW_ROWS = 16
"""Calls with up to this many rows leave busy cores to other programs. In longer calls, a thread that gets half of a
core is worth having."""


SPINS, SPINS_WHEN_CROWDED = 10_000, 300
"""How often a waiting thread checks for work before it sleeps. A check takes 20 to 50 nanoseconds."""


class Team(NamedTuple):
    """The threads that do a call of the kernels."""

    threads: int
    is_crowded: bool = False
    """Whether other programs keep cores busy, so that waiting threads should soon sleep."""

    def new_progress(self, num_stages: int) -> np.ndarray:
        """Returns the counters of this many stages (:mod:`bdh.ops.cpu.pieces`). Each stage can be run once."""
        return _unused_counters(num_stages, SPINS_WHEN_CROWDED if self.is_crowded else SPINS).copy()


@cache
def _unused_counters(num_stages: int, spins: int) -> np.ndarray:
    from bdh.ops.cpu.pieces import SPINS_WORD, STAGE_WORDS

    progress = np.zeros((num_stages, STAGE_WORDS), np.int64)
    progress[:, SPINS_WORD] = spins
    return progress


def team_for(num_rows: int) -> Team:
    """Returns the team for a call with this many rows. The bits of the result do not depend on the threads."""
    most, leaves_cores = most_threads(), num_rows <= FEW_ROWS
    busy = crowding.busy_cores(most, leaves_cores=leaves_cores)
    return Team(most - busy if leaves_cores else most, busy > 0)


def exclusive() -> AbstractContextManager[object]:
    """A context for running kernels, by one thread at a time if numba's threading layer supports no more.

    This is true of numba's own layer, workqueue, which would end the process. It is used if there is no OpenMP.
    """
    import numba

    try:
        is_safe = numba.threading_layer() != "workqueue"
    except ValueError:  # no parallel code has run yet, so the layer is not chosen
        is_safe = False
    return nullcontext() if is_safe else _one_at_a_time


_addresses: dict[tuple[Any, bytes], int] = {}  # addresses of compiled functions, by their types of arguments


def run_by_threads(num_threads: int, kernel: Any, *arguments: Any) -> None:
    """Calls a kernel on this many threads, each with its own number before the arguments.

    The kernel is a function of :data:`bdh.ops.cpu.pieces.jit`. It is called by its address: within the ``prange``, its
    code would be optimized and compiled three more times, which takes seconds.
    """
    from bdh.ops.cpu import pieces

    key = kernel, pieces.types_of(arguments)
    if key not in _addresses:
        _addresses[key] = pieces.address_of(kernel, arguments)
    with exclusive():
        pieces.launch(num_threads, min(num_threads, _numba_threads()), _addresses[key], arguments)


def compiled(what: str, run: Callable[[], None], announce: Callable[[str], None] = to_stderr) -> None:
    """Runs something small that uses every kernel of ``what``, so that they are compiled or loaded from the disk.

    It announces that numba compiles, but not that it loads, however long that takes on a busy machine. Compiling takes
    some ten seconds, once for each version and processor.
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
