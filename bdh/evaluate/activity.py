"""What the neurons of a model do on a text: how many fire, how strongly, and which never."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from bdh.generate.texts import inference
from bdh.model import BDHForCausalLM

_SAMPLE = 4096  # values kept of each kind and pass, for histograms
# Neurons times tokens that are read at once, where more than one row has them: 128 MiB for each wide tensor in float32.
MAX_WIDE = 2**25


@dataclass(frozen=True)
class Activity:
    """Of the tokens that were measured. Each list has one entry a pass."""

    density: dict[str, list[float]]
    """Share of the neurons that fire on a token: those of ``x``, of ``y``, and of both (``xy``)."""
    norm: dict[str, list[float]]
    """Mean over the tokens of the L2 norm over all neurons: of ``x``, ``y`` and their product ``xy``."""
    dead_neurons: float
    """Share of the neurons whose x fired on none of the tokens, in no pass: they did nothing."""
    samples: dict[str, list[torch.Tensor]]
    """Some values above 0 of ``x``, ``y`` and ``xy``, evenly spaced among all of them."""

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """``density/x/0`` is that of x in the first pass; so for the others."""
        found = {f"{prefix}dead_neurons": self.dead_neurons}
        for name, table in (("density", self.density), ("norm", self.norm)):
            for kind, values in table.items():
                found |= {f"{prefix}{name}/{kind}/{index}": value for index, value in enumerate(values)}
        return found


def measure_activity(
    model: BDHForCausalLM,
    tokens: torch.Tensor,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_batch_size: int = 16,
) -> Activity:
    """Reads tokens (n, T), each row from nothing, and counts.

    It listens to the linear layers, so it costs one forward pass, all at once, and a count of each wide tensor. It
    draws no random numbers and leaves the model as it was.
    """
    batch_size = rows_at_once(model, tokens.shape[1], max_batch_size)
    parts = tokens.split(batch_size)
    listener = _Listener(model, values_each=_SAMPLE // len(parts))
    try:
        with inference(model), autocast():
            for rows in parts:
                model(rows.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        listener.remove()
    return listener.activity(tokens.numel())


def rows_at_once(model: BDHForCausalLM, num_tokens: int, largest: int = 16) -> int:
    """Rows of so many tokens that :func:`measure_activity` reads together."""
    wide = num_tokens * model.config.n_head * model.config.neurons_per_head
    return max(1, min(largest, MAX_WIDE // wide))


class _Listener:
    """Hooks on ``encoder`` (whose output becomes x), ``encoder_v`` (y) and ``decoder`` (whose input is x * y)."""

    def __init__(self, model: BDHForCausalLM, values_each: int):
        """
        Args:
            values_each: values to keep of each kind and pass in one forward pass.
        """
        config = model.config
        self._values_each = max(1, values_each)
        self._num_layer_steps, self._num_heads = config.n_layer, config.n_head
        self._num_neurons = config.n_head * config.neurons_per_head
        self._calls = {"x": 0, "y": 0, "xy": 0}
        zeros = torch.zeros(config.n_layer, dtype=torch.float64, device=model.device)
        self._fired = {kind: zeros.clone() for kind in self._calls}
        self._norms = {kind: zeros.clone() for kind in self._calls}
        self._squares: torch.Tensor | None = None  # of y, whose heads come one by one
        self._samples: dict[str, list[torch.Tensor]] = {kind: [torch.empty(0)] * config.n_layer for kind in self._calls}
        self._ever = torch.zeros(self._num_neurons, dtype=torch.bool, device=model.device)
        self._handles: list[RemovableHandle] = [
            model.encoder.register_forward_hook(self._on_x),
            *(head.register_forward_hook(self._on_y) for head in model.encoder_v),
            model.decoder.register_forward_pre_hook(self._on_xy),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def activity(self, num_tokens: int) -> Activity:
        places = num_tokens * self._num_neurons
        return Activity(
            density={kind: (counts / places).tolist() for kind, counts in self._fired.items()},
            norm={kind: (totals / num_tokens).tolist() for kind, totals in self._norms.items()},
            dead_neurons=1 - self._ever.double().mean().item(),
            samples=self._samples,
        )

    def _on_x(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self._ever |= (output > 0).flatten(0, -2).any(0)
        self._norms["x"][self._pass("x")] += _norms(output).sum()
        self._count("x", output)

    def _on_y(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        squares = _norms(output) ** 2
        self._squares = squares if self._squares is None else self._squares + squares
        if self._calls["y"] % self._num_heads == self._num_heads - 1:  # of the last head
            self._norms["y"][self._pass("y")] += self._squares.sqrt().sum()
            self._squares = None
        self._count("y", output)

    def _on_xy(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._norms["xy"][self._pass("xy")] += _norms(inputs[0]).sum()
        self._count("xy", inputs[0])

    def _pass(self, kind: str) -> int:
        calls_a_pass = self._num_heads if kind == "y" else 1
        return self._calls[kind] // calls_a_pass % self._num_layer_steps

    def _count(self, kind: str, values: torch.Tensor) -> None:
        index = self._pass(kind)
        fires = values > 0
        self._fired[kind][index] += fires.sum()
        above = values[fires]
        step = max(1, above.numel() // self._values_each)
        found = above[::step][: self._values_each].float().cpu()
        self._samples[kind][index] = torch.cat([self._samples[kind][index], found])
        self._calls[kind] += 1


def _norms(values: torch.Tensor) -> torch.Tensor:
    """The L2 norm of each token's neurons, those below 0 counted as 0, as ReLU leaves them."""
    return torch.linalg.vector_norm(values.clamp_min(0), dim=-1, dtype=torch.float64)
