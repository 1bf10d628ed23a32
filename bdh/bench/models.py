"""Models whose neurons fire as sparsely as those of trained ones, without training; and the memory traffic of a token.

Which neurons fire decides what the sparse kernels cost, and with fresh weights half of them do. Here a direction u of
the residual stream is common to all tokens, the rows of E and Ev lean against it, which is a threshold, and the columns of
Dec lean towards it, so that it lasts through the passes. How far they lean is found by measuring.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist, mean, median

import torch

from bdh.model.configuration import BDHConfig
from bdh.model.modeling import BDHForCausalLM
from bdh.ops import naive
from bdh.ops.attention import DecayMask, attend, rotation_table
from bdh.ops.eager import Layer, layer_norm, layer_step

X_DENSITY = 0.13
"""Share of x that fire; in trained models of 25M to 100M parameters 11 to 14 %."""
XY_DENSITY = 0.04
"""Share of x * y that are not zero; in trained models 3 to 5 %."""
_CALIBRATION_TOKENS = 96
_ROUNDS = 12
_CLOSE_ENOUGH = 0.01  # of a density, relatively
# Of the embedding: with it the first pass is about as dense as the others.
_EMBED_LEAN = 1.5
_SKIPPED_TOKENS = 8  # the first ones recall little, or nothing


@dataclass(frozen=True)
class Density:
    """Of one pass."""

    x: float
    """Share of the neurons that fire in x."""
    pairs: float
    """Share of the pairs (2i, 2i + 1) in which one of them does: those whose rows of the state are touched."""
    xy: float
    """Share of the neurons that fire in x and in y."""


def sparse_model(
    config: BDHConfig, seed: int = 0, *, x_density: float = X_DENSITY, xy_density: float = XY_DENSITY
) -> BDHForCausalLM:
    """A float32 model on the CPU whose passes fire, in the mean, as densely as that.

    The same seed and configuration give the same weights on one machine.
    """
    generator = torch.Generator().manual_seed(seed)
    D, V = config.n_embd, config.vocab_size
    model = BDHForCausalLM(config).eval().requires_grad_(False)
    direction = torch.randn(D, generator=generator)
    direction -= direction.mean()  # or the layer norm would remove some of it
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
    """Leans the weights until the densities are those wanted, and those of the last pass like those of the first."""
    normal = NormalDist()
    num_neurons = model.decoder.weight.shape[1]
    _lean(model, direction, x=-1.6, y=-0.6, out=0.5 / math.sqrt(xy_density * num_neurons))
    for _ in range(_ROUNDS):
        found = densities(model, tokens)
        x, xy = mean(each.x for each in found), mean(each.xy for each in found)
        slope = found[-1].x / found[0].x  # below 1, u grows from pass to pass
        errors = (x / x_density - 1, xy / xy_density - 1, slope - 1 if len(found) > 1 else 0)
        if max(map(abs, errors)) < _CLOSE_ENOUGH:
            break
        # A share p of normally distributed numbers lies above -inv_cdf(p): the way from one share to another.
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
    """What fires in each layer step while the model reads ``tokens`` (T,), but for the first few, whose attention sees little."""
    config, first = model.config, min(_SKIPPED_TOKENS, len(tokens) - 1)
    layer = Layer(model.encoder, list(model.encoder_v), model.decoder)
    table = rotation_table(torch.arange(len(tokens)), config.neurons_per_head, config.rope_theta, torch.float32)
    lives = half_lives(model)
    attention = partial(attend, form="parallel", decay_mask=None if lives is None else DecayMask(half_lives=lives))
    v = layer_norm(model.embed(tokens[None]), config.layer_norm_eps)  # (1, T, D)
    found = []
    for _ in range(config.n_layer):
        fires: dict[str, torch.Tensor] = {}

        def trace(name: str, wide: torch.Tensor, fires: dict[str, torch.Tensor] = fires) -> None:
            fires[name] = wide[:, first:] > 0

        v, _ = layer_step(v, layer, attention, table, eps=config.layer_norm_eps, dtype=torch.float32, trace=trace)
        pairs = fires["x"].unflatten(-1, (-1, 2)).any(-1)
        found.append(Density(*(share.float().mean().item() for share in (fires["x"], pairs, fires["xy"]))))
    return found


def naive_weights(model: BDHForCausalLM) -> naive.Weights:
    """A model's weights as :mod:`bdh.ops.naive` takes them: views of the same memory, but for Ev."""
    H, N = model.config.n_head, model.config.neurons_per_head
    return naive.Weights(
        embed=model.embed.weight.detach(),
        encoder=model.encoder.weight.detach().unflatten(0, (H, N)).transpose(1, 2),
        encoder_v=torch.stack([head.weight.detach().t() for head in model.encoder_v]),  # type: ignore[operator]
        decoder=model.decoder.weight.detach().t(),
        lm_head=model.lm_head.weight.detach().t(),
    )


def half_lives(model: BDHForCausalLM) -> torch.Tensor | None:
    """As :mod:`bdh.ops.naive` takes them, (H,)."""
    lives = model.config.half_lives
    return None if lives is None else torch.tensor(lives, device=model.embed.weight.device)


@torch.no_grad()
def naive_logits(model: BDHForCausalLM, tokens: torch.Tensor, weights: naive.Weights | None = None) -> torch.Tensor:
    """Logits (B, T, V) of :func:`bdh.ops.naive.forward` for ``tokens`` (B, T); ``weights`` spares making them again."""
    config = model.config
    return naive.forward(
        tokens,
        weights or naive_weights(model),
        config.n_layer,
        theta=config.rope_theta,
        eps=config.layer_norm_eps,
        half_lives=half_lives(model),
    )


def random_tokens(vocab_size: int, count: int, seed: int) -> torch.Tensor:
    """(count,): text for a model that has read none."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, of as many threads as torch has."""

    copy: float
    """Copying: what is read and what is written, counted together."""
    read: float


def measure_bandwidth(num_bytes: int = 1 << 30, rounds: int = 7) -> Bandwidth:
    """The medians of several rounds, by turns, over a buffer of so many bytes (and a second one)."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    target.copy_(source)  # so that its pages are there
    copies, reads = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        copies.append(2 * source.nbytes / (time.perf_counter() - start))
        start = time.perf_counter()
        source.sum()
        reads.append(source.nbytes / (time.perf_counter() - start))
    return Bandwidth(median(copies), median(reads))


@dataclass(frozen=True)
class Traffic:
    """Bytes that must move for one token of one sequence, read and written ones counted alike."""

    encoder: int
    """E, whole, in each layer step: which neurons fire is not known before."""
    state: int
    """The rows of pairs that fire: two a pair, read and written."""
    encoder_v: int
    """Rows of Ev where x fires."""
    decoder: int
    """Rows of Dec where x * y is not zero."""
    lm_head: int

    @property
    def total(self) -> int:
        return self.encoder + self.state + self.encoder_v + self.decoder + self.lm_head

    def limit_seconds(self, bandwidth: Bandwidth, batch: int = 1) -> float:
        """The least time of a step of ``batch`` sequences: E and the head once, the rest for each of them.

        Rows of weights that several sequences use are counted for each, so the limit of a batch is not quite one.
        """
        each = self.state + self.encoder_v + self.decoder
        return (self.encoder + self.lm_head + batch * each) / bandwidth.copy


def traffic(config: BDHConfig, found: list[Density], weights: str = "float32", state: str = "float32") -> Traffic:
    """Of a model whose layer steps are as dense as was found."""
    num_rows = config.n_layer * config.n_head * config.neurons_per_head
    weight_row, state_row = (config.n_embd * getattr(torch, dtype).itemsize for dtype in (weights, state))
    x, pairs, xy = (mean(getattr(each, name) for each in found) for name in ("x", "pairs", "xy"))
    return Traffic(
        encoder=num_rows * weight_row,
        state=round(pairs * num_rows) * state_row * 2,
        encoder_v=round(x * num_rows) * weight_row,
        decoder=round(xy * num_rows) * weight_row,
        lm_head=config.vocab_size * weight_row,
    )
