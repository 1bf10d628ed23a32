"""Which neurons fired while a token was read: what a watched sequence tells beside its logits."""

from dataclasses import dataclass

import numpy as np

MOST_NEURONS = 64
"""The strongest neurons that may be asked for, of each pass."""


def check_watch(num_strongest: int | None) -> None:
    """
    Raises:
        ValueError: so many neurons of each pass cannot be watched.
    """
    if num_strongest is not None and not 0 <= num_strongest <= MOST_NEURONS:
        raise ValueError(f"watch is {num_strongest}: must be within 0 and {MOST_NEURONS}, or None")


@dataclass
class PassActivity:
    """Of one token in one pass."""

    fired: float
    """The share of all neurons that fired."""
    neurons: list[int]
    """The strongest of those that did, from 0 to H*N - 1, head by head; the strongest first."""
    values: list[float]
    """Their activations x."""


def activity_of(x: np.ndarray, num_strongest: int) -> PassActivity:
    """Of a token's activations x (H*N,)."""
    num_fired = int(np.count_nonzero(x > 0))
    count = min(num_strongest, num_fired)
    strongest = np.argpartition(x, len(x) - count)[len(x) - count :] if count else np.empty(0, np.int64)
    strongest = strongest[np.lexsort((strongest, -x[strongest]))]
    return PassActivity(num_fired / len(x), strongest.tolist(), [float(value) for value in x[strongest]])
