"""What rounding has changed: in each matrix, and in what a model predicts and which of its neurons fire."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from bdh.generate.texts import inference
from bdh.model.quantization import neuron_rows, quantized_formats
from bdh.ops import QuantizedFormat
from bdh.quantize.rounding import Progress

_MAX_NUMBERS = 2**27
"""Activations of a batch that are kept of the model before, to be compared: a byte each, and their float32 besides."""


@dataclass(frozen=True)
class MatrixError:
    """What rounding has changed in the weights of a module."""

    module: str
    format: QuantizedFormat
    relative_error: float
    """The root mean square of the changes, over that of the weights."""
    saturated: float
    """Share of the codes that are the largest or the smallest that there is."""


def matrix_errors(model: Any, quantized: Any) -> list[MatrixError]:
    """Of each quantized module, beside that of the model that it was made of."""
    found = []
    for name, weight_format in quantized_formats(quantized).items():
        before = neuron_rows(name, model.get_submodule(name).weight.detach()).float()
        codes = quantized.get_submodule(name).codes
        error = (codes.dequantized() - before).norm() / before.norm()
        ends = (-127, 127) if weight_format == "int8" else (-8, 7)
        is_end = (codes.codes == ends[0]) | (codes.codes == ends[1])
        found.append(MatrixError(name, weight_format, error.item(), is_end.float().mean().item()))
    return found


@dataclass(frozen=True)
class Measured:
    """A model on held-out text."""

    loss: float
    """Nats per token."""
    perplexity: float
    density: dict[str, list[float]]
    """Share of the neurons that fire on a token, ``x`` and ``y``, in each layer step."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same text."""

    tokens: int
    """That were predicted."""
    before: Measured
    after: Measured
    kl: float
    """Divergence of the distribution of the next token after from that before, nats per token, in the mean."""
    same_prediction: float
    """Share of the tokens at which both predict the same one."""
    still_fire: dict[str, list[float]]
    """Of the neurons that fire before, the share that fire after, ``x`` and ``y``, in each layer step."""


def compare(
    model: Any,
    quantized: Any,
    sequences: torch.Tensor,
    *,
    max_batch_size: int = 16,
    progress: Progress = lambda stage, done, total: None,
) -> Comparison:
    """Reads tokens (n, T + 1) with both models, each sequence from nothing.

    The modules are called as they are, and hooks listen to them: a GPU or the matrix products of the CPU compute.
    """
    config, T = model.config, sequences.shape[1] - 1
    wide = T * (2 * config.n_layer * config.n_head * config.neurons_per_head + 2 * config.vocab_size)
    sums = _Sums(config.n_layer)
    with inference(model), inference(quantized):
        for batch in sequences.split(max(1, min(max_batch_size, _MAX_NUMBERS // wide))):
            inputs, targets = batch[:, :-1], batch[:, 1:]
            before, fired_before = _read(model, inputs)
            after, fired_after = _read(quantized, inputs)
            sums.add(before, after, targets.to(before.device), fired_before, fired_after)
            progress("tokens", sums.tokens, sequences.shape[0] * T)
    return sums.comparison(config.n_head * config.neurons_per_head)


def _read(model: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """Log-probabilities (B, T, V) and where neurons fire, bool (B, T, H*N) for each layer step."""
    fired: dict[str, list[torch.Tensor]] = {"x": [], "y": []}
    heads: list[torch.Tensor] = []  # of y in this layer step

    def on_head(module: Any, inputs: Any, output: torch.Tensor) -> None:
        heads.append(output > 0)
        if len(heads) == model.config.n_head:
            fired["y"].append(torch.cat(heads, -1))
            heads.clear()

    with ExitStack() as hooks:
        for handle in (
            model.encoder.register_forward_hook(lambda module, inputs, output: fired["x"].append(output > 0)),
            *(head.register_forward_hook(on_head) for head in model.encoder_v),
        ):
            hooks.callback(handle.remove)
        logits = model(inputs.to(model.device), use_cache=False).logits
    return logits.float().log_softmax(-1), fired


class _Sums:
    """Of what was counted so far."""

    def __init__(self, num_layer_steps: int):
        self.tokens = self.same = 0
        self.nats_before = self.nats_after = self.kl = 0.0
        zeros = torch.zeros(3, num_layer_steps, dtype=torch.int64)
        self.fired = {"x": zeros, "y": zeros.clone()}  # before, after, in both

    def add(
        self,
        before: torch.Tensor,
        after: torch.Tensor,
        targets: torch.Tensor,
        fired_before: dict[str, list[torch.Tensor]],
        fired_after: dict[str, list[torch.Tensor]],
    ) -> None:
        self.tokens += targets.numel()
        self.nats_before -= before.gather(-1, targets[..., None]).double().sum().item()
        self.nats_after -= after.gather(-1, targets[..., None]).double().sum().item()
        self.kl += (before.exp() * (before - after)).sum(-1).double().sum().item()
        self.same += int((before.argmax(-1) == after.argmax(-1)).sum())
        for kind, counts in self.fired.items():
            pairs = zip(fired_before[kind], fired_after[kind], strict=True)
            of_steps = [[one.sum(), other.sum(), (one & other).sum()] for one, other in pairs]
            counts += torch.tensor(of_steps).t()

    def comparison(self, num_neurons: int) -> Comparison:
        def measured(nats: float, which: int) -> Measured:
            loss = nats / self.tokens
            density = {
                kind: (counts[which] / (self.tokens * num_neurons)).tolist() for kind, counts in self.fired.items()
            }
            return Measured(loss, math.exp(loss) if loss < 700 else math.inf, density)

        still = {kind: (counts[2] / counts[0].clamp_min(1)).tolist() for kind, counts in self.fired.items()}
        return Comparison(
            self.tokens,
            measured(self.nats_before, 0),
            measured(self.nats_after, 1),
            self.kl / self.tokens,
            self.same / self.tokens,
            still,
        )
