"""The model that training started from, or one like it: what a figure is before anything was learned."""

from typing import Any

import torch


def untrained_twin(model: Any, seed: int = 0) -> Any:
    """A model of the same class and configuration with fresh weights, in evaluation mode, in the same dtype on the same device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(model)(model.config)
    return twin.to(model.device, model.dtype).eval()
