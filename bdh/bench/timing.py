"""Times several ways of doing one thing by turns, so that whatever else the machine does falls on all of them."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch


@dataclass
class Timing:
    """Seconds of what was run several times."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    repeats: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Times the candidates in rounds: in each one, every candidate in turn.

    Args:
        rounds: timed rounds, behind ``warm_up`` others.
        repeats: how often a candidate runs in a round, where that is not once; each run is timed.
    """
    found = {name: Timing() for name in candidates}
    for number in range(warm_up + rounds):
        for name, candidate in candidates.items():
            for _ in range((repeats or {}).get(name, 1)):
                start = time.perf_counter()
                candidate()
                seconds = time.perf_counter() - start
                if number >= warm_up:
                    found[name].seconds.append(seconds)
    return found


def percentile(numbers: list[float], share: float) -> float:
    """The smallest of the numbers that at least this share of them does not exceed."""
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def machine() -> dict[str, str | int]:
    """What the figures depend on, beside the code."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numba", "transformers")},
    }


def machine_line() -> str:
    found = machine()
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['torch_threads']} threads; Python {found['python']}, "
        f"torch {found['torch']}, numba {found['numba']}, transformers {found['transformers']}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
