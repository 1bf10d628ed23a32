"""Timing by turns, so that whatever else the machine does affects all candidates alike, and the report: tables for people,
and the same figures as one JSON object."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from bdh.bench.models import Density, densities, random_tokens
from bdh.model.modeling import BDHForCausalLM

Progress = Callable[[str], None]
_DENSITY_TOKENS = 256


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
        rounds: timed rounds, after ``warm_up`` others.
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


@dataclass
class Report:
    """Gathered while a benchmark runs."""

    benchmark: str
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    failed: bool = False
    """Whether what was to be compared does not agree; nothing was timed then."""

    def say(self, line: str = "") -> None:
        self.lines.append(line)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column to the left, the others to the right."""
        cells = [list(columns), *map(list, rows)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
        self.lines += ["", title]
        for row in cells:
            first, *others = row
            aligned = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
            self.lines.append("  ".join(["", f"{first:<{widths[0]}}", *aligned]).rstrip())

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def json(self) -> str:
        found = {"benchmark": self.benchmark, "failed": self.failed, **self.figures}
        return json.dumps(_finite(found), indent=2, allow_nan=False) + "\n"

    def introduce(self, model: BDHForCausalLM, seed: int) -> list[Density]:
        """Says what is measured and where, and how densely its passes fire, which it returns."""
        config = model.config
        sizes = {
            name: getattr(config, name)
            for name in ("n_embd", "n_head", "n_layer", "mlp_internal_dim_multiplier", "vocab_size")
        }
        parameters = sum(weight.numel() for weight in model.parameters())
        found = densities(model, random_tokens(config.vocab_size, _DENSITY_TOKENS, seed + 1))
        self.figures["machine"] = machine()
        others = {name: getattr(config, name) for name in ("rope_theta", "decay", "attention_form", "chunk_size")}
        counts = {"neurons_per_head": config.neurons_per_head, "parameters": parameters}
        self.figures["model"] = {**sizes, **counts, **others}
        self.figures["density"] = [asdict(each) for each in found]
        self.say(f"machine   {machine_line()}")
        self.say(
            f"model     D {config.n_embd}, H {config.n_head}, N {config.neurons_per_head}, L {config.n_layer}, "
            f"V {config.vocab_size}: {parameters / 1e6:.1f}M parameters"
        )
        shares = {name: [100 * getattr(each, name) for each in found] for name in ("x", "pairs", "xy")}
        names = {"x": "x", "pairs": "pairs of x", "xy": "x * y"}
        told = [f"{names[n]} {mean(s):.1f} % ({min(s):.1f} to {max(s):.1f})" for n, s in shares.items()]
        self.say(f"fires     {', '.join(told)}, on average over the layer steps (and in the sparsest and the densest)")
        return found


def _finite(found: Any) -> Any:
    """JSON has no infinity, and nothing for what is not a number: null stands for them."""
    if isinstance(found, dict):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}"
