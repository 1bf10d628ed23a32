"""What a benchmark found: tables for people, and the same figures as one JSON object."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

import torch

from bdh.bench.timing import machine, machine_line
from bdh.bench.weights import Density, densities
from bdh.model.modeling import BDHForCausalLM

_DENSITY_TOKENS = 256


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
        self.say(f"fires     {', '.join(told)}, in the mean of the passes (and from one to another)")
        return found


def _finite(found: Any) -> Any:
    """JSON has no infinity, and nothing for what is not a number: null stands for them."""
    if isinstance(found, dict):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def random_tokens(vocab_size: int, count: int, seed: int) -> torch.Tensor:
    """(count,): text for a model that has read none."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}"
