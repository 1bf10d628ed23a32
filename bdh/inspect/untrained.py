"""Untrained models as baselines of measurements."""

from typing import Any

import torch


def untrained_twin(model: Any, seed: int = 0) -> Any:
    """Returns an untrained model of the same class and configuration, on the same device and in the same dtype.

    It is in evaluation mode, and serves as the baseline of a measurement.

    Args:
        model: the trained model.
        seed: the seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(model)(model.config)
    return twin.to(model.device, model.dtype).eval()
