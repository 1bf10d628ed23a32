"""Gradients that are out of all proportion to those before."""

import math
from dataclasses import dataclass

_DECAY = 0.97
_WARMUP_STEPS = 25


@dataclass
class NormStatistics:
    """Running mean and variance of the gradient's norm, as in ZClip (arXiv 2504.02507, with its decay and warm-up).

    ZClip scales a spike down; here it is for the caller to decide. A spike enters the statistics as the norm at the
    threshold, so that a lasting change of level is learned, and a single spike hardly matters.
    """

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def z_score(self, norm: float) -> float:
        """Standard deviations by which ``norm`` exceeds the mean; 0 in the first 25 steps, which only count."""
        if self.count < _WARMUP_STEPS:
            return 0.0
        return (norm - self.mean) / max(math.sqrt(self.variance), 1e-12 + 1e-6 * self.mean)

    def take_in(self, norm: float, threshold: float) -> None:
        """Counts a step's norm, a finite number."""
        if self.count < _WARMUP_STEPS:  # Welford's mean and variance of the steps so far
            self.count += 1
            change = norm - self.mean
            self.mean += change / self.count
            self.variance += (change * (norm - self.mean) - self.variance) / self.count
            return
        norm = min(norm, self.mean + threshold * math.sqrt(self.variance))
        self.variance = _DECAY * self.variance + (1 - _DECAY) * (norm - self.mean) ** 2
        self.mean = _DECAY * self.mean + (1 - _DECAY) * norm
