"""Whether the kernels run on this machine, with how many threads, and their compilation."""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch

from bdh.ops.cpu.crowding import crowding

Announce = Callable[[str], None]
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


def follow_torch_threads() -> int:
    """Lets the kernels of this thread run on as many threads as torch's operations, and returns how many."""
    import numba

    count = max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    if numba.get_num_threads() != count:
        numba.set_num_threads(count)
    return count


FEW_ROWS = 16
"""Up to so many rows a call leaves busy cores to others. In a longer one a thread that gets half of a core is worth having."""


class Team(NamedTuple):
    """Who does a call of the kernels."""

    threads: int
    is_crowded: bool
    """Whether other programs keep cores busy."""


def team_for(num_rows: int) -> Team:
    """For so many rows, whose bits do not depend on the threads."""
    import numba

    most, leaves_cores = follow_torch_threads(), num_rows <= FEW_ROWS
    busy = crowding.busy_cores(most, leaves_cores=leaves_cores)
    threads = most - busy if leaves_cores else most
    if threads != most:
        numba.set_num_threads(threads)
    return Team(threads, busy > 0)


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


def compiled(run: Callable[[], None], announce: Announce = to_stderr) -> float:
    """Runs something small that uses every kernel, so that they are compiled, or loaded from the disk.

    Says so where numba compiles, and not where it loads, however long that takes on a busy machine: compiling takes about
    ten seconds, once for each version and processor.

    Returns:
        The seconds that it took.
    """
    from numba.core import event

    class Compiling(event.Listener):
        has_begun = False

        def on_start(self, event: object) -> None:
            if not self.has_begun:
                self.has_begun = True
                announce("compiling the kernels for this processor, once ...")

        def on_end(self, event: object) -> None:
            pass

    _watch_forks()
    start, threads = time.perf_counter(), torch.get_num_threads()
    compiling = Compiling()
    try:
        with event.install_listener("numba:compile", compiling):
            run()
    finally:
        # numba and torch share OpenMP, and numba's first launch asks it for all cores.
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    if compiling.has_begun:
        announce(f"the kernels are ready, after {seconds:.1f} s")
    return seconds
