"""The update of the weights: schedules, optimizers, float16's loss scale, and the guard against faulty steps.

Whether a step may change the weights is decided on the device. Only :meth:`UpdateGuard.read` synchronizes with a GPU
and, for checkpoints, the ``state_dict`` of the loss scale and of the norms.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from bdh.distributed.world import World
from bdh.model.network import exact_dtype
from bdh.train.config import TrainSettings


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Returns the learning rate of a step (counted from 0) as a fraction of ``settings.learning_rate``.

    It depends only on the step, so that a resumed run has nothing to restore.
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
    """The optimizers of a model's trainable weights, which are stepped together.

    Either AdamW for all weights, or Muon for the neurons' matrices (``encoder``, ``encoder_v``, ``decoder``) and AdamW
    for the embedding and the head.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings):
        self._model, self._settings = model, settings
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        embeddings = [name for name in trained if name.startswith(("embed.", "lm_head."))]
        matrices = [p for name, p in trained.items() if name not in embeddings]
        lr, decay = settings.learning_rate, settings.weight_decay
        embeddings_decay = decay if settings.decay_embeddings else 0.0
        groups = [{"params": [trained[name] for name in embeddings], "weight_decay": embeddings_decay}]
        self.all: list[torch.optim.Optimizer] = []
        if settings.optimizer == "muon":
            # match_rms_adamw scales updates to the size of AdamW's, so that the same learning rate fits both.
            self.all.append(torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        else:
            groups.append({"params": matrices, "weight_decay": decay})
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        self.all.append(torch.optim.AdamW(groups, lr=lr, betas=(settings.beta1, settings.beta2), fused=fused))

    def set_learning_rate(self, step: int) -> float:
        """Sets and returns the learning rate of a step."""
        lr = self._settings.learning_rate * learning_rate_factor(step, self._settings)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
        return lr

    def zero_grad(self) -> None:
        """Sets all gradients to None."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def step(self, skip: torch.Tensor, *, on_device: bool) -> None:
        """Updates the weights, unless ``skip`` is True. Then neither weights nor optimizer states change.

        Args:
            skip: bool (), on the device of the weights.
            on_device: whether to decide on the device, without synchronizing.
        """
        if not on_device:
            if not skip:
                for optimizer in self.all:
                    optimizer.step()
            return
        for optimizer in self.all:
            if optimizer.defaults.get("fused"):
                # As torch.amp.GradScaler does: fused kernels change nothing if this is 1. Checked with PyTorch 2.13.
                optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
                optimizer.step()
            else:
                _step_or_undo(optimizer, skip)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the optimizers' state tensors by names such as "encoder.weight.exp_avg", sharded like the weights.

        Hyperparameters are not included. The result is empty before the first update.
        """
        if not any(optimizer.state for optimizer in self.all):
            return {}
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        state: dict[str, Any] = get_optimizer_state_dict(self._model, self.all, options=options)
        prefix = "state."
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def make_state(self) -> None:
        """Creates the state tensors of optimizers that have made no update yet, so that a checkpoint can be loaded."""
        get_optimizer_state_dict(self._model, self.all)


def _step_or_undo(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """Steps an optimizer that cannot skip on the device, and restores a copy if the step is to be skipped.

    The copy only exists while there are no activations, so peak memory does not grow.
    """

    def tensors() -> list[torch.Tensor]:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return weights + kept

    with torch.no_grad():
        before = {tensor: tensor.detach().clone() for tensor in tensors()}
        optimizer.step()
        for tensor in tensors():
            old = before[tensor] if tensor in before else torch.zeros_like(tensor)
            tensor.copy_(torch.where(skip.to(tensor.device), old, tensor))


class LossScale:
    """The loss scale that keeps small gradients within the range of float16; 1 for other dtypes.

    The rule is that of ``torch.amp.GradScaler``: the scale is halved after an overflow, and doubled after 2,000 steps
    without one. Overflows are detected by the norm of all gradients, which is the same in every process, without
    synchronizing with the device.
    """

    _GROWTH_STEPS = 2000

    def __init__(self, device: torch.device, *, is_float16: bool):
        self.is_enabled = is_float16
        self.value = torch.full((), 65536.0 if is_float16 else 1.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, norm: torch.Tensor) -> None:
        """Updates the scale with the gradient norm of a step."""
        if not self.is_enabled:
            return
        good_steps = torch.where(norm.isfinite(), self._good_steps + 1, 0)
        grows = good_steps >= self._GROWTH_STEPS
        self.value = self.value * torch.where(norm.isfinite(), torch.where(grows, 2.0, 1.0), 0.5)
        self._good_steps = torch.where(grows, 0, good_steps)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state under the names of ``GradScaler``."""
        if not self.is_enabled:
            return {}
        return {"scale": self.value.item(), "_growth_tracker": int(self._good_steps.item())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved scale. The empty state of a run that was not in float16 changes nothing."""
        if state and self.is_enabled:
            self.value.fill_(state["scale"])
            self._good_steps.fill_(state["_growth_tracker"])


class NormStatistics:
    """The running mean and variance of the gradient norm, as in ZClip (arXiv 2504.02507, with its decay and warm-up).

    A spike is counted as the norm at the threshold, so that a lasting change is followed while a single spike hardly
    matters.
    """

    _DECAY = 0.97
    _WARMUP_STEPS = 25

    def __init__(self, device: torch.device, threshold: float):
        self._threshold = threshold
        self._values = torch.zeros(3, dtype=exact_dtype(device), device=device)  # mean, variance, steps counted

    @property
    def mean(self) -> torch.Tensor:
        return self._values[0]

    def z_score(self, norm: torch.Tensor) -> torch.Tensor:
        """Returns by how many standard deviations ``norm`` exceeds the mean; 0 in the first 25 steps, the warm-up."""
        mean, variance, count = self._values
        z = (norm.to(mean.dtype) - mean) / torch.maximum(variance.sqrt(), 1e-12 + 1e-6 * mean)
        return torch.where(count < self._WARMUP_STEPS, 0.0, z)

    def take_in(self, norm: torch.Tensor) -> None:
        """Updates the statistics with a step's norm, if it is finite."""
        mean, variance, count = self._values
        norm = norm.to(mean.dtype)
        # During warm-up: Welford's mean and variance.
        early_mean = mean + (norm - mean) / (count + 1)
        early_variance = variance + ((norm - mean) * (norm - early_mean) - variance) / (count + 1)
        early = torch.stack([early_mean, early_variance, count + 1])
        clipped = torch.minimum(norm, mean + self._threshold * variance.sqrt())
        late_mean = self._DECAY * mean + (1 - self._DECAY) * clipped
        late_variance = self._DECAY * variance + (1 - self._DECAY) * (clipped - mean) ** 2
        new = torch.where(count < self._WARMUP_STEPS, early, torch.stack([late_mean, late_variance, count]))
        self._values = torch.where(norm.isfinite(), new, self._values)

    def state_dict(self) -> dict[str, Any]:
        mean, variance, count = self._values.tolist()
        return {"mean": mean, "variance": variance, "count": int(count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            values = [state["mean"], state["variance"], state["count"]]
            self._values = torch.tensor(values, dtype=self._values.dtype, device=self._values.device)


@dataclass(frozen=True)
class StepResult:
    """The outcome of an optimizer step, over all processes."""

    step: int
    loss: float
    """The mean over all tokens that count, in nats per token."""
    grad_norm: float
    """The norm of all gradients together, before clipping."""
    grad_norms: dict[str, float]
    """The norm of each weight's gradient, before clipping."""
    updated: bool
    """Whether the weights changed: float16 skips a step whose scaled gradients overflow, and lowers the scale."""
    fault: str | None
    """What was not finite or a spike; None if the step was sound."""


class UpdateGuard:
    """Decides on the device which steps may change the weights, and keeps their results until they are read.

    A step whose loss or gradient is not finite, or whose gradient is a spike (``train.spike_threshold``), changes
    nothing. With ``train.on_nonfinite`` "stop", no later step does either, so that the weights are those before the
    fault however late it is read. The loss needs no separate check: a non-finite one makes all gradients non-finite.
    """

    def __init__(self, settings: TrainSettings, device: torch.device, world: World, *, is_float16: bool):
        self._stops = settings.on_nonfinite == "stop"
        self._is_float16 = is_float16
        self._threshold = settings.spike_threshold
        self._world = world
        self._statistics = None if self._threshold is None else NormStatistics(device, self._threshold)
        self._stopped = torch.zeros((), dtype=torch.bool, device=device)
        # Of each step since the last reading: loss (of this process, or of all), norm, skip, norms, z-score, mean.
        self._pending: list[tuple[torch.Tensor, ...]] = []
        self._names: tuple[str, ...] = ()
        self.is_on_device = device.type != "cpu"
        """Whether steps are decided without synchronizing; a CPU needs no synchronization."""
        # In float16 an overflow is not a fault but a non-finite loss is, so every process needs the loss of each step.
        self.needs_loss_of_all = world.size > 1 and is_float16

    def judge(
        self, loss: torch.Tensor, norm: torch.Tensor, norms: torch.Tensor, names: tuple[str, ...]
    ) -> torch.Tensor:
        """Returns whether to skip the update: bool (), the same in every process.

        Args:
            loss: (), this process's part of the loss or, with ``needs_loss_of_all``, the sum over all processes.
            norm: (), the norm of the gradient over all processes.
            norms: (n,), the norm of each weight's gradient, in the order of ``names``.
            names: the names of the weights.
        """
        skip = ~norm.isfinite()
        fault = ~loss.isfinite() if self._is_float16 else skip
        z = mean = torch.zeros_like(norm)
        if self._statistics is not None and self._threshold is not None:
            z, mean = self._statistics.z_score(norm), self._statistics.mean
            self._statistics.take_in(norm)
            is_spike = norm.isfinite() & (z > self._threshold)
            skip, fault = skip | is_spike, fault | is_spike
        if self._stops:
            self._stopped = self._stopped | fault
            skip = skip | self._stopped
        self._pending.append((loss, norm, skip, norms, z, mean))
        self._names = names
        return skip

    def read(self, step: int) -> list[StepResult]:
        """Returns the results of the steps since the last call, up to ``step``. Synchronizes device and processes."""
        if not self._pending:
            return []
        dtype = exact_dtype(self._stopped.device)
        losses, norm, skip, norms, z, mean = (torch.stack(column) for column in zip(*self._pending, strict=True))
        self._pending = []
        if not self.needs_loss_of_all:
            losses = self._world.sum(losses)
        columns = [each.to(dtype)[:, None] for each in (losses, norm, skip, z, mean)]
        rows = torch.cat([*columns, norms.to(dtype)], dim=1).tolist()
        first = step - len(rows) + 1
        return [self._result(first + number, *row) for number, row in enumerate(rows)]

    def _result(
        self, step: int, loss: float, norm: float, skipped: float, z: float, mean: float, *norms: float
    ) -> StepResult:
        fault = None
        if not math.isfinite(loss):
            fault = f"the loss is {loss}"
        elif not math.isfinite(norm):  # an overflow of float16, by which the scale is found
            fault = None if self._is_float16 else f"the gradient's norm is {norm}"
        elif self._threshold is not None and z > self._threshold:
            fault = f"the gradient's norm is {norm:.4g}, {z:.1f} standard deviations above its mean of {mean:.4g}"
        return StepResult(step, loss, norm, dict(zip(self._names, norms, strict=True)), not skipped, fault)

    @property
    def has_unread(self) -> bool:
        return bool(self._pending)

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics of the norms; empty without a threshold."""
        return {} if self._statistics is None else self._statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._statistics is not None:
            self._statistics.load_state_dict(state)
