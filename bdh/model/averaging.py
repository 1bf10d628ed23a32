"""Averages of weights: of several models, and of one model over the steps of its training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

Weights = Mapping[str, torch.Tensor]


def average_weights(models: Iterable[Weights], shares: Sequence[float] | None = None) -> dict[str, torch.Tensor]:
    """The weighted mean of each weight over several models of one shape, which are read one after the other.

    Args:
        models: state dicts.
        shares: a number for each; they are divided by their sum. None for equal ones.

    Returns:
        A state dict in the first one's dtypes; the sums are taken in float64.

    Raises:
        ValueError: no models, another number of shares than of models, shares that are negative or sum to 0, or
            models whose weights have not the same names and shapes.
    """
    if shares is not None and (not all(share >= 0 for share in shares) or not sum(shares) > 0):
        raise ValueError(f"the shares are {list(shares)}: none may be negative, and their sum must be above 0")
    total: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    number = 0
    for number, weights in enumerate(models, start=1):
        if shares is not None and number > len(shares):
            raise ValueError(f"there are more models than the {len(shares)} shares: give one share a model")
        share = 1.0 if shares is None else shares[number - 1]
        if number == 1:
            dtypes = {name: weight.dtype for name, weight in weights.items()}
            total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        differing = sorted(
            name
            for name in {*total, *weights}
            if name not in total or name not in weights or total[name].shape != weights[name].shape
        )
        if differing:
            raise ValueError(
                f"model {number} has not the shape of the first one, so they cannot be averaged: {', '.join(differing)}"
            )
        for name, weight in weights.items():
            total[name] += share * weight.double()
    if number == 0:
        raise ValueError("there are no models to average: give at least one")
    if shares is not None and number < len(shares):
        raise ValueError(f"there are {number} models and {len(shares)} shares: give one share a model")
    divisor = float(number) if shares is None else sum(shares)
    return {name: (weight / divisor).to(dtypes[name]) for name, weight in total.items()}


class MovingAverage:
    """An exponential moving average of a model's weights (Polyak averaging).

    After step t (counted from 1) it is ``d * average + (1 - d) * weights`` with d the smaller of ``decay`` and
    (1 + t) / (10 + t): the early steps, whose weights are far from the later ones, are soon forgotten. Frozen
    weights have no average of their own.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self._decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in _trained(model)}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int, *, unless: torch.Tensor | None = None) -> None:
        """Takes in the weights after a step.

        Args:
            unless: bool (): where it is set, the average stays as it is. On a GPU it is not waited for.
        """
        share: float | torch.Tensor = 1 - min(self._decay, (1 + step) / (10 + step))
        if unless is not None and unless.device.type == "cpu":
            if unless:
                return
        elif unless is not None:
            share = torch.where(unless, 0.0, share)
        for name, weight in _trained(model):
            average = self.weights[name]
            average.lerp_(weight, share if isinstance(share, float) else share.to(average.dtype))

    @contextmanager
    def in_place_of_weights(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it, the model has the average as its weights."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model: torch.nn.Module) -> None:
        """Exchanges the model's weights and the average; a second time undoes it exactly."""
        for name, weight in _trained(model):
            kept = weight.clone()
            weight.copy_(self.weights[name])
            self.weights[name].copy_(kept)

    def load(self, weights: Weights) -> None:
        """Takes over an average that was stored."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])


def _trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
