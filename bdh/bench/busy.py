"""What busy programs beside cost: one thread and all of them, alone and beside those programs, by turns."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import mean

import torch

from bdh.bench.report import Report, milliseconds

_SETTLING_SECONDS = 0.5
"""For the programs to start, and the kernels to find out that they have."""


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many other processes, each of which keeps a core busy."""
    programs = [subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
        for program in programs:
            program.wait()


def time_busy(
    report: Report, candidates: Mapping[str, Callable[[], object]], num_busy: int, *, rounds: int, seconds: float
) -> None:
    """Times each candidate for about so many seconds a round. Means, since what is lost to others is lost in lumps."""
    most = torch.get_num_threads()
    found: dict[tuple[str, int, int], list[float]] = {}
    try:
        for _ in range(rounds):
            for name, candidate in candidates.items():
                for threads in sorted({1, most}):
                    torch.set_num_threads(threads)
                    for busy in (0, num_busy):
                        with busy_programs(busy):
                            _run(candidate, min(_SETTLING_SECONDS, seconds))
                            found.setdefault((name, threads, busy), []).extend(_run(candidate, seconds))
    finally:
        torch.set_num_threads(most)
    rows, figures = [], []
    for name in candidates:
        for threads in sorted({1, most}):
            alone, beside = mean(found[name, threads, 0]), mean(found[name, threads, num_busy])
            figures.append(
                {
                    "name": name,
                    "threads": threads,
                    "ms_alone": 1000 * alone,
                    "ms_beside": 1000 * beside,
                    "speed_kept": alone / beside,
                }
            )
            rows.append([name, str(threads), milliseconds(alone), milliseconds(beside), f"{alone / beside:.2f}"])
    report.figures["busy"] = {"programs": num_busy, "timings": figures}
    report.table(
        f"alone, and beside busy programs ({num_busy}): means of {rounds} rounds by turns",
        ["", "threads", "ms alone", "ms beside", "speed kept"],
        rows,
    )


def _run(candidate: Callable[[], object], seconds: float) -> list[float]:
    """The seconds of each call."""
    found: list[float] = []
    first = time.perf_counter()
    while not found or time.perf_counter() - first < seconds:
        start = time.perf_counter()
        candidate()
        found.append(time.perf_counter() - start)
    return found
