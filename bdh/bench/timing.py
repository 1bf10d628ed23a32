"""Timing of candidates in turn, so that whatever else the machine does meets all of them alike."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over several rounds."""

    median: float
    least: float
    most: float


def timed(candidates: Mapping[str, Callable[[], object]], *, rounds: int, calls: int = 1) -> dict[str, Timing]:
    """Runs each candidate ``calls`` times in every round, one after the other, and once before all.

    Returns:
        The seconds of one call: the median over the rounds, and the extremes.
    """
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            found[name].append((time.perf_counter() - start) / calls)
    return {name: Timing(statistics.median(each), min(each), max(each)) for name, each in found.items()}


def machine() -> str:
    """What was measured on: processor, cores, threads and versions."""
    parts = [_processor(), f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    try:
        parts.append(f"numba {version('numba')}")
    except PackageNotFoundError:
        parts.append("no numba")
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def resident_bytes() -> int:
    """Memory of this process that lies in RAM; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
