"""Dropout whose mask is computed again wherever it is needed, and never stored.

Whether neuron n of token t is kept is a function of a seed, n and t alone: a counter-based generator in the sense of
Salmon et al. (SC 2011). So the mask does not depend on how the work is cut into blocks, nor on who computes them. Keys of
the neurons and of the tokens, 32 bits each, are made beforehand; a neuron's and a token's are added and mixed by two
multiplications and three shifts, with the constants that C. Wellons found by search (hash-prospector: "lowbias32").
"""

from typing import NamedTuple

import torch

_MASK = 0xFFFFFFFF
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
SHIFTS = (16, 15, 16)
_APART = 0x9E3779B9  # 2^32 divided by the golden ratio: neighbouring numbers get keys far apart
_WORD = 1 << 32


class Dropout(NamedTuple):
    """The mask of one layer step."""

    rate: float
    """Share of the neurons' outputs that are dropped."""
    neuron_keys: torch.Tensor  # int64 (H * N,), each from 0 to 2^32 - 1
    token_keys: torch.Tensor  # int64 (B, T), likewise

    @property
    def threshold(self) -> int:
        """Mixed keys below it are dropped."""
        return min(_WORD - 1, round(self.rate * _WORD))

    @property
    def scale(self) -> float:
        """What the kept ones are multiplied by, so that their mean stays."""
        return 1 / (1 - self.rate)


def make_dropout(rate: float, seed: torch.Tensor, num_neurons: int, num_rows: int, num_tokens: int) -> Dropout:
    """The mask of ``num_neurons`` neurons of all heads for ``num_rows`` sequences of ``num_tokens``.

    Args:
        seed: int64, one number, on the device that computes; it is not read back from there.
    """
    low, high = seed & _MASK, (seed >> 32) & _MASK
    neurons = torch.arange(num_neurons, device=seed.device)
    tokens = torch.arange(num_rows * num_tokens, device=seed.device)
    neuron_keys = _mix((neurons * _APART + low) & _MASK)
    token_keys = _mix((_mix((tokens * _APART + high) & _MASK) + low) & _MASK)
    return Dropout(rate, neuron_keys, token_keys.view(num_rows, num_tokens))


def kept(dropout: Dropout, neuron_keys: torch.Tensor, token_keys: torch.Tensor) -> torch.Tensor:
    """Which outputs of these neurons (n,) are kept for these tokens (...): bool (n, ...)."""
    keys = neuron_keys.view(-1, *[1] * token_keys.ndim) + token_keys
    return _mix(keys & _MASK) >= dropout.threshold


def _mix(keys: torch.Tensor) -> torch.Tensor:
    """Numbers of 32 bits, in int64, to others that look random. Products are cut to 32 bits before the next step."""
    for multiplier, shift in zip(MULTIPLIERS, SHIFTS[:2], strict=True):
        keys = ((keys ^ (keys >> shift)) * multiplier) & _MASK
    return keys ^ (keys >> SHIFTS[2])
