"""Optimizers, and the course of the learning rate."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from bdh.train.config import TrainSettings


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """The learning rate of step ``step`` (counted from 0), as a share of ``settings.learning_rate``.

    It depends on the step alone, so a resumed run needs to restore nothing.
    """
    warmup, total, floor = settings.warmup_steps, settings.max_steps, settings.min_learning_rate_ratio
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "wsd":
        decay = settings.decay_steps if settings.decay_steps is not None else max(1, total // 5)
        start = max(warmup, total - decay)
    else:
        start = warmup
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, total - start))
    share = (1 + math.cos(math.pi * progress)) / 2 if settings.schedule == "cosine" else 1 - progress
    return floor + (1 - floor) * share


class Optimizers:
    """The optimizers of a model's weights, but for frozen ones, stepped together.

    AdamW for everything, or Muon for the neurons' matrices (``encoder``, ``encoder_v``, ``decoder``) with
    AdamW for the embedding and the head.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings):
        self._settings = settings
        self._names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        ends = [p for name, p in trained.items() if name.startswith(("embed.", "lm_head."))]
        ends_ids = {id(p) for p in ends}
        matrices = [p for p in trained.values() if id(p) not in ends_ids]
        ends_decay = {"weight_decay": settings.weight_decay if settings.decay_embeddings else 0.0}
        lr = settings.learning_rate
        groups = [{"params": ends, **ends_decay}]
        self.all: list[torch.optim.Optimizer] = []
        if settings.optimizer == "muon":
            # match_rms_adamw scales the updates to AdamW's size, so that one learning rate fits both.
            self.all.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        else:
            groups.append({"params": matrices, "weight_decay": settings.weight_decay})
        device = next(model.parameters()).device.type
        fused = device in ("cpu", "cuda")
        self.all.append(torch.optim.AdamW(groups, lr=lr, betas=(settings.beta1, settings.beta2), fused=fused))

    def set_learning_rate(self, step: int) -> float:
        """Sets and returns the learning rate of a step."""
        lr = self._settings.learning_rate * learning_rate_factor(step, self._settings)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
        return lr

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the optimizers keep of each weight, as "encoder.weight.exp_avg". Settings are not among it."""
        return {
            f"{self._names[weight]}.{key}": value
            for optimizer in self.all
            for weight, state in optimizer.state.items()
            for key, value in state.items()
        }

    def make_room(self, shapes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        """Makes tensors of the stored shapes, sharded as the weights are, for :meth:`tensors` to be read into."""
        for optimizer in self.all:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                prefix = f"{self._names[weight]}."
                optimizer.state[weight] = {
                    name.removeprefix(prefix): torch.zeros_like(weight, dtype=dtype)
                    if shape == weight.shape
                    else torch.zeros(shape, dtype=dtype, device=weight.device)
                    for name, (shape, dtype) in shapes.items()
                    if name.startswith(prefix)
                }
