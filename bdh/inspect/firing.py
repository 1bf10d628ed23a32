"""Measures the sparsity of activations: how many neurons fire, and how much of the activation mass a few of them carry.

The paper (arXiv 2509.26507) reports that the activations of trained models are sparse and non-negative. Activations of
a model with random weights contain zeros too, so each figure is reported with that of an untrained twin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bdh.inspect.tracing import observe, token_ids
from bdh.inspect.untrained import untrained_twin

FIRING = ("x", "y", "z")


@dataclass(frozen=True, eq=False)
class FiringShares:
    """The fractions of neurons that fire, by name: x, y and z = x * y. Float64, on the CPU."""

    by_head: Mapping[str, torch.Tensor]
    """(L, H): for each layer step and head, averaged over neurons and tokens."""
    by_position: Mapping[str, torch.Tensor]
    """(L, T): for each layer step and token, averaged over the neurons of all heads."""


@dataclass(frozen=True, eq=False)
class Density:
    """The result of :func:`density`."""

    model: FiringShares
    untrained: FiringShares
    """The same for an untrained model, on the same tokens."""


def density(model: Any, ids: Sequence[int] | torch.Tensor, *, seed: int = 0) -> Density:
    """Measures the fraction of neurons that fire while a model reads a text, and the same for an untrained model.

    No y fires at the first token of a text, since there is no earlier token to attend to.

    Args:
        model: as for :func:`bdh.inspect.trace`.
        ids: the token ids of a text, (T,).
        seed: the seed of the untrained model's weights.

    Raises:
        ValueError: as :func:`bdh.inspect.trace`.
    """
    tokens = token_ids(ids)
    return Density(_firing_shares(model, tokens), _firing_shares(untrained_twin(model, seed), tokens))


def _firing_shares(model: Any, ids: torch.Tensor) -> FiringShares:
    L, H, N = model.config.n_layer, model.config.n_head, model.config.neurons_per_head
    by_head = {name: torch.zeros(L, H, dtype=torch.float64) for name in FIRING}
    by_position = {name: torch.zeros(L, len(ids), dtype=torch.float64) for name in FIRING}

    def add(name: str, step: int, tokens: slice, values: torch.Tensor) -> None:
        counts = (values > 0).sum(-1).double().cpu()  # (H, T)
        by_head[name][step] += counts.sum(1) / (len(ids) * N)
        by_position[name][step, tokens] = counts.sum(0) / (H * N)

    observe(model, ids, {name: partial(add, name) for name in FIRING})
    return FiringShares(by_head, by_position)


@dataclass(frozen=True, eq=False)
class MassShares:
    """Fractions of activation mass, by name: x, y and z = x * y. Float64 (L,), on the CPU; NaN if no neuron fires."""

    cross_fitted: Mapping[str, torch.Tensor]
    """With the neurons chosen on one half of the text and measured on the other; the mean of both directions."""
    uncorrected: Mapping[str, torch.Tensor]
    """With the neurons chosen and measured on the whole text, which overestimates the fraction."""


@dataclass(frozen=True, eq=False)
class Concentration:
    """The result of :func:`concentration`."""

    k: int
    num_neurons: int
    """The number of neurons of all heads together."""
    model: MassShares
    untrained: MassShares
    """The same of a model with fresh weights, on the same tokens."""

    @property
    def even_share(self) -> float:
        """The fraction that k neurons would carry if all neurons carried the same."""
        return self.k / self.num_neurons


def concentration(
    model: Any, ids: Sequence[int] | torch.Tensor, *, k: int | None = None, seed: int = 0
) -> Concentration:
    """Measures the fraction of activation mass that the k strongest neurons carry, for each layer step.

    The mass of a neuron is the sum of its activations. Choosing the strongest neurons on the same tokens on which their
    mass is measured overestimates the fraction, since some neurons are the strongest by chance. They are therefore
    chosen on one half of the text and measured on the other. The halves are the first and the second half of the text,
    since neighbouring tokens are similar.

    Args:
        model: as for :func:`bdh.inspect.trace`.
        ids: the token ids of a text, (T,), at least 2.
        k: the number of neurons, of all heads; by default a tenth of them.
        seed: the seed of the weights of the untrained model that serves as the baseline.

    Raises:
        ValueError: k is out of range, the text has only one token; or as :func:`bdh.inspect.trace`.
    """
    tokens = token_ids(ids)
    num_neurons = model.config.n_head * model.config.neurons_per_head
    k = max(1, num_neurons // 10) if k is None else k
    if not 1 <= k <= num_neurons:
        raise ValueError(f"k is {k}: must be within 1 to {num_neurons}, the neurons of all heads")
    if len(tokens) < 2:
        raise ValueError("the text has 1 token: at least 2 are needed, one for each half")
    shares = (_mass_shares(each, tokens, k) for each in (model, untrained_twin(model, seed)))
    return Concentration(k, num_neurons, *shares)


def _mass_shares(model: Any, ids: torch.Tensor, k: int) -> MassShares:
    L, num_neurons = model.config.n_layer, model.config.n_head * model.config.neurons_per_head
    masses = {name: torch.zeros(2, L, num_neurons, dtype=torch.float64) for name in FIRING}
    middle = len(ids) // 2

    def add(name: str, step: int, tokens: slice, values: torch.Tensor) -> None:
        num_before = min(max(middle - tokens.start, 0), tokens.stop - tokens.start)
        for half, part in enumerate((values[:, :num_before], values[:, num_before:])):
            masses[name][half, step] += part.sum(1).flatten().double().cpu()

    observe(model, ids, {name: partial(add, name) for name in FIRING})

    def share(ranked: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
        return measured.gather(-1, ranked.topk(k).indices).sum(-1) / measured.sum(-1)

    return MassShares(
        {name: (share(first, second) + share(second, first)) / 2 for name, (first, second) in masses.items()},
        {name: share(halves.sum(0), halves.sum(0)) for name, halves in masses.items()},
    )
