"""What the benchmarks share: models whose neurons fire as sparsely as in trained ones, the memory traffic of a token,
timing by turns (so that other load on the machine affects all candidates alike), and the report.

The cost of the sparse kernels depends on which neurons fire. With fresh weights, half of them do. So in the models made
here, all tokens share a direction u of the residual stream. The rows of E and Ev lean against u, which acts as a threshold.
The columns of Dec lean towards u, so that it lasts through the layer steps. How far they lean is found by measuring.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import NormalDist, mean, median
from typing import Any

import torch
from transformers import GPT2Config

from bdh.model.configuration import BDHConfig
from bdh.model.modeling import BDHForCausalLM
from bdh.ops import StateFormat, WeightFormat, naive
from bdh.ops.attention import DecayMask, attend, rotation_table
from bdh.ops.backends import STATE_DTYPES
from bdh.ops.eager import Layer, layer_norm, layer_step
from bdh.ops.formats import layer_formats, row_bytes

Progress = Callable[[str], None]
_DENSITY_TOKENS = 256
X_DENSITY = 0.13
"""Share of the neurons that fire in x. In trained models of 25M to 100M parameters it is 11 to 14 %."""
XY_DENSITY = 0.04
"""Share of x * y that is not zero. In trained models it is 3 to 5 %."""
_CALIBRATION_TOKENS = 96
_ROUNDS = 12
_CLOSE_ENOUGH = 0.01  # relative error of a density
# How far the embedding leans. With this value, the first layer step is about as dense as the others.
_EMBED_LEAN = 1.5
_SKIPPED_TOKENS = 8  # the first tokens have little or nothing to attend to


@dataclass(frozen=True)
class Density:
    """The density of one layer step."""

    x: float
    """Share of the neurons that fire in x."""
    pairs: float
    """Share of the pairs (2i, 2i + 1) with a neuron that fires. Only their rows of the state are touched."""
    xy: float
    """Share of the neurons that fire in x and in y."""


def sparse_model(
    config: BDHConfig, seed: int = 0, *, x_density: float = X_DENSITY, xy_density: float = XY_DENSITY
) -> BDHForCausalLM:
    """Returns a float32 model on the CPU whose layer steps have these densities on average.

    The same seed and configuration give the same weights on one machine.
    """
    generator = torch.Generator().manual_seed(seed)
    D, V = config.n_embd, config.vocab_size
    model = BDHForCausalLM(config).eval().requires_grad_(False)
    direction = torch.randn(D, generator=generator)
    direction -= direction.mean()  # the layer norm would remove the mean
    direction /= direction.norm()
    model.embed.weight.normal_(generator=generator).add_(direction * (_EMBED_LEAN * math.sqrt(D)))
    model.lm_head.weight.normal_(0, 1 / math.sqrt(D), generator=generator)  # logits of order 1
    for layer in (model.encoder, *model.encoder_v, model.decoder):
        layer.weight.normal_(0, 1 / math.sqrt(D), generator=generator)
    tokens = torch.randint(V, (_CALIBRATION_TOKENS,), generator=generator)
    _calibrate(model, direction, tokens, x_density, xy_density)
    return model


def _calibrate(
    model: BDHForCausalLM, direction: torch.Tensor, tokens: torch.Tensor, x_density: float, xy_density: float
) -> None:
    """Leans the weights until the mean densities are as wanted, and the last layer step is as dense as the first."""
    normal = NormalDist()
    num_neurons = model.decoder.weight.shape[1]
    _lean(model, direction, x=-1.6, y=-0.6, out=0.5 / math.sqrt(xy_density * num_neurons))
    for _ in range(_ROUNDS):
        found = densities(model, tokens)
        x, xy = mean(each.x for each in found), mean(each.xy for each in found)
        slope = found[-1].x / found[0].x  # below 1, u grows from step to step
        errors = (x / x_density - 1, xy / xy_density - 1, slope - 1 if len(found) > 1 else 0)
        if max(map(abs, errors)) < _CLOSE_ENOUGH:
            break
        # The fraction p of normally distributed numbers is above -inv_cdf(p). This gives the step from one to another.
        by_x = normal.inv_cdf(x_density) - normal.inv_cdf(_inside(x))
        by_y = normal.inv_cdf(_inside(xy_density / x_density)) - normal.inv_cdf(_inside(xy / max(x, 1e-6)))
        by_out = 0.3 * math.log(max(slope, 0.1)) / math.sqrt(xy_density * num_neurons)
        _lean(model, direction, x=by_x, y=by_y, out=by_out)


def _inside(share: float) -> float:
    return min(max(share, 1e-3), 1 - 1e-3)


def _lean(model: BDHForCausalLM, direction: torch.Tensor, *, x: float, y: float, out: float) -> None:
    D = len(direction)
    model.encoder.weight.add_(direction * (x / math.sqrt(D)))
    for head in model.encoder_v:
        head.weight.add_(direction * (y / math.sqrt(D)))  # type: ignore[operator]
    model.decoder.weight.add_(direction[:, None] * out)


@torch.no_grad()
def densities(model: BDHForCausalLM, tokens: torch.Tensor) -> list[Density]:
    """Returns the density of each layer step over ``tokens`` (T,), without the first few, whose attention sees little."""
    config, first = model.config, min(_SKIPPED_TOKENS, len(tokens) - 1)
    fires: dict[str, torch.Tensor] = {}

    def note(name: str, wide: torch.Tensor) -> torch.Tensor:
        fires[name] = wide[:, first:] > 0
        return wide

    points = {name: partial(note, name) for name in ("x", "z")}
    layer = Layer(model.encoder, list(model.encoder_v), model.decoder, points)
    table = rotation_table(torch.arange(len(tokens)), config.neurons_per_head, config.rope_theta, torch.float32)
    lives = half_lives(model)
    attention = partial(attend, form="parallel", decay_mask=None if lives is None else DecayMask(half_lives=lives))
    v = layer_norm(model.embed(tokens[None]), config.layer_norm_eps)  # (1, T, D)
    found = []
    for _ in range(config.n_layer):
        v, _ = layer_step(v, layer, attention, table, eps=config.layer_norm_eps, dtype=torch.float32)
        pairs = fires["x"].unflatten(-1, (-1, 2)).any(-1)
        found.append(Density(*(share.float().mean().item() for share in (fires["x"], pairs, fires["z"]))))
    return found


def naive_weights(model: BDHForCausalLM) -> naive.Weights:
    """Returns the weights for :mod:`bdh.ops.naive`: views of the model's, except Ev. Gradients reach the model."""
    H, N = model.config.n_head, model.config.neurons_per_head
    return naive.Weights(
        embed=model.embed.weight,
        encoder=model.encoder.weight.unflatten(0, (H, N)).transpose(1, 2),
        encoder_v=torch.stack([head.weight.t() for head in model.encoder_v]),  # type: ignore[operator]
        decoder=model.decoder.weight.t(),
        lm_head=model.lm_head.weight.t(),
    )


def half_lives(model: BDHForCausalLM) -> torch.Tensor | None:
    """Returns the half-lives (H,) for :mod:`bdh.ops.naive`, in float32, or in float64 for a float64 model."""
    lives, weight = model.config.half_lives, model.embed.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return None if lives is None else torch.tensor(lives, dtype=dtype, device=weight.device)


def naive_forward(
    model: BDHForCausalLM, tokens: torch.Tensor, weights: naive.Weights | None = None, **options: Any
) -> torch.Tensor:
    """Returns the logits (B, T, V) of :func:`bdh.ops.naive.forward` for ``tokens`` (B, T), with their graph.

    Args:
        model: the model, whose configuration is used.
        tokens: the token ids.
        weights: the weights to use; None converts those of the model.
        options: other arguments of :func:`bdh.ops.naive.forward`.
    """
    config = model.config
    return naive.forward(
        tokens,
        weights or naive_weights(model),
        config.n_layer,
        theta=config.rope_theta,
        eps=config.layer_norm_eps,
        half_lives=half_lives(model),
        **options,
    )


@torch.no_grad()
def naive_logits(model: BDHForCausalLM, tokens: torch.Tensor, weights: naive.Weights | None = None) -> torch.Tensor:
    """Returns the same logits without a graph."""
    return naive_forward(model, tokens, weights)


def gpt2_config(vocab_size: int, num_positions: int, layers: int, width: int, heads: int, dropout: float) -> GPT2Config:
    """Returns the configuration of a GPT-2 of this size, with PyTorch's attention."""
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=num_positions,
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # transformers takes it for every model
    )


def gpt2_shape(model: BDHForCausalLM) -> tuple[int, int, int]:
    """Returns layers, width and heads of a GPT-2 with about as many parameters, not counting positions.

    It has a layer for every 64 of width.
    """
    num_parameters = sum(weight.numel() for weight in model.parameters())

    def of_width(width: int) -> tuple[int, int, int]:
        return max(1, round(width / 64)), width, width // (64 if width % 64 == 0 else 16)

    def difference(shape: tuple[int, int, int]) -> int:
        layers, width, _ = shape
        return abs(12 * layers * width**2 + model.config.vocab_size * width - num_parameters)

    return min(map(of_width, range(16, 8193, 16)), key=difference)


def random_tokens(vocab_size: int, count: int, seed: int) -> torch.Tensor:
    """Returns random token ids (count,), the text for an untrained model."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second, with as many threads as torch has."""

    copy: float
    """For copying, with the bytes read and the bytes written added."""
    read: float


def measure_bandwidth(num_bytes: int = 1 << 30, rounds: int = 7) -> Bandwidth:
    """Returns the medians of several rounds by turns, over a buffer of ``num_bytes`` (and a second one)."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    timings = interleaved({"copy": lambda: target.copy_(source), "read": source.sum}, rounds=rounds)
    return Bandwidth(2 * source.nbytes / timings["copy"].median, source.nbytes / timings["read"].median)


@dataclass(frozen=True)
class Traffic:
    """Bytes that must be moved for one token of one sequence. Bytes read and bytes written count alike."""

    encoder: int
    """All of E in each layer step, since it is not known beforehand which neurons fire."""
    state: int
    """The rows of the pairs that fire: two for each pair, read and written."""
    encoder_v: int
    """Rows of Ev where x fires."""
    decoder: int
    """Rows of Dec where x * y is not zero."""
    lm_head: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def limit_seconds(self, bandwidth: Bandwidth, batch: int = 1) -> float:
        """Returns the least time of a step of ``batch`` sequences: E and the head count once, the rest for each sequence.

        Rows of weights that several sequences use are counted for each of them, so for a batch it is not a strict limit.
        """
        each = self.state + self.encoder_v + self.decoder
        return (self.encoder + self.lm_head + batch * each) / bandwidth.copy


def traffic(
    config: BDHConfig, found: list[Density], weights: WeightFormat = "float32", state: StateFormat = "float32"
) -> Traffic:
    """Returns the traffic at these densities. ``state`` must be a format that is read and written at each token."""
    num_rows = config.n_layer * config.n_head * config.neurons_per_head
    of_encoder, of_encoder_v, of_decoder, of_head = (row_bytes(each, config.n_embd) for each in layer_formats(weights))
    state_row = config.n_embd * STATE_DTYPES[state].itemsize
    x, pairs, xy = (mean(getattr(each, name) for each in found) for name in ("x", "pairs", "xy"))
    return Traffic(
        encoder=num_rows * of_encoder,
        state=round(pairs * num_rows) * state_row * 2,
        encoder_v=round(x * num_rows) * of_encoder_v,
        decoder=round(xy * num_rows) * of_decoder,
        lm_head=config.vocab_size * of_head,
    )


@dataclass
class Timing:
    """The seconds of several runs."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    def cells(self) -> list[str]:
        return [milliseconds(self.median), milliseconds(self.least)]

    def figures(self, per: str, work: float = 1) -> dict[str, float]:
        """Returns the figures of a ``per`` ("token" or "step") of ``work`` tokens."""
        return {f"ms_per_{per}": 1000 * self.median, "least_ms": 1000 * self.least, "tokens_per_s": work / self.median}


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    repeats: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Times the candidates by turns: each round runs every candidate.

    Args:
        candidates: the functions to time, by name.
        rounds: the number of timed rounds, after ``warm_up`` others.
        warm_up: the number of rounds before these, which are not timed.
        repeats: how often a candidate runs in a round, if not once. Each run is timed.
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
    """Returns the smallest of the numbers such that at least ``share`` of them are no larger."""
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def machine() -> dict[str, str | int]:
    """Returns what the figures depend on besides the code."""
    names = [platform.processor() or platform.machine()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    found: dict[str, str | int] = {
        "cpu": names[0],
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
    }
    found["python"] = platform.python_version()
    for package in ("torch", "numba", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def machine_line() -> str:
    """Returns the processor and the versions of Python and the packages, for a report."""
    return (
        "{cpu}, {cores} cores, {torch_threads} threads; Python {python}, torch {torch}, numba {numba}, "
        "transformers {transformers}".format_map(machine())
    )


@dataclass
class Report:
    """The report of a benchmark, filled while it runs."""

    benchmark: str
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    failed: bool = False
    """Whether the compared results do not agree. Nothing is timed after that."""

    def say(self, line: str = "") -> None:
        self.lines.append(line)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Adds a table. The first column is aligned to the left, the others to the right."""
        cells = [columns, *rows]
        first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
        self.lines += ["", title]
        for name, *numbers in cells:
            aligned = [f"{cell:>{width}}" for cell, width in zip(numbers, others, strict=True)]
            self.lines.append("  ".join(["", f"{name:<{first}}", *aligned]).rstrip())

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def json(self) -> str:
        found = {"benchmark": self.benchmark, "failed": self.failed, **self.figures}
        return json.dumps(_finite(found), indent=2, allow_nan=False) + "\n"

    def introduce(self, model: BDHForCausalLM, seed: int) -> list[Density]:
        """Reports the machine, the model, and the densities of its layer steps, which it returns."""
        config = model.config
        parameters = sum(weight.numel() for weight in model.parameters())
        found = densities(model, random_tokens(config.vocab_size, _DENSITY_TOKENS, seed + 1))
        names = ("n_embd", "n_head", "n_layer", "mlp_internal_dim_multiplier", "vocab_size", "neurons_per_head")
        others = ("rope_theta", "decay", "attention_form", "chunk_size")
        self.figures["machine"] = machine()
        self.figures["model"] = {name: getattr(config, name) for name in names} | {"parameters": parameters}
        self.figures["model"] |= {name: getattr(config, name) for name in others}
        self.figures["density"] = [asdict(each) for each in found]
        self.say(f"machine   {machine_line()}")
        self.say(
            f"model     D {config.n_embd}, H {config.n_head}, N {config.neurons_per_head}, L {config.n_layer}, "
            f"V {config.vocab_size}: {parameters / 1e6:.1f}M parameters"
        )
        shares = []
        for name, words in (("x", "x"), ("pairs", "pairs of x"), ("xy", "x * y")):
            each = [100 * getattr(density, name) for density in found]
            shares.append(f"{words} {mean(each):.1f} % ({min(each):.1f} to {max(each):.1f})")
        self.say(
            f"fires     {', '.join(shares)}, on average over the layer steps (and in the sparsest and the densest)"
        )
        return found


def _finite(found: Any) -> Any:
    """Replaces infinity and NaN, which JSON does not have, by None."""
    if isinstance(found, dict):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}"
