"""What rounding has changed: in each matrix, and in what a model predicts and which of its neurons fire."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from bdh.data.batches import Batch
from bdh.evaluate.loss import perplexity
from bdh.model.hook_points import watching
from bdh.model.network import inference
from bdh.model.quantization import neuron_rows, quantized_formats
from bdh.ops import QuantizedFormat
from bdh.ops.formats import CODE_RANGES
from bdh.quantize.progress import Progress

_MAX_BYTES = 2**28
"""Of what both models give for the sequences that are read together: where neurons fire, and log-probabilities."""


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
        lowest, highest = CODE_RANGES[weight_format]
        is_end = (codes.codes == lowest) | (codes.codes == highest)
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
    batches: Sequence[Batch],
    *,
    max_batch_size: int = 16,
    progress: Progress = lambda stage, done, total: None,
) -> Comparison:
    """Reads sequences with both models, each from nothing.

    Hooks listen to which neurons fire: torch's dense operations compute, and not the kernels.
    """
    config = model.config
    num_kept = 2 * config.n_layer * config.n_head * config.neurons_per_head + 8 * config.vocab_size  # bytes of a token
    sums, total = _Sums(config.n_layer), sum(batch.num_targets for batch in batches)
    with inference(model), inference(quantized):
        for batch in batches:
            for part in batch.split(max(1, min(max_batch_size, _MAX_BYTES // (batch.input_ids.shape[1] * num_kept)))):
                sums.add(_read(model, part), _read(quantized, part), part.targets.to(model.device))
                progress("tokens", sums.tokens, total)
    return sums.comparison(config.n_head * config.neurons_per_head)


class _Read(NamedTuple):
    """What a model gives for a batch."""

    log_probabilities: torch.Tensor  # (B, T, V)
    fired: dict[str, list[torch.Tensor]]  # x and y: bool (B, T, H*N) for each layer step


def _read(model: Any, batch: Batch) -> _Read:
    fired: dict[str, list[torch.Tensor]] = {"x": [], "y": []}

    def note(name: str, wide: torch.Tensor) -> None:
        fired[name].append(wide > 0)

    batch = batch.to(model.device)
    with watching(model, {name: partial(note, name) for name in fired}):
        logits = model(batch.input_ids, document_starts=batch.starts, use_cache=False).logits
    return _Read(logits.float().log_softmax(-1), fired)


class _Sums:
    """Of what was counted so far: over the tokens that count, and of the neurons over all."""

    def __init__(self, num_layer_steps: int):
        self.tokens = self.tokens_read = self.same = 0
        self.nats_before = self.nats_after = self.kl = 0.0
        zeros = torch.zeros(3, num_layer_steps, dtype=torch.int64)
        self.fired = {"x": zeros, "y": zeros.clone()}  # before, after, in both

    def add(self, before: _Read, after: _Read, targets: torch.Tensor) -> None:
        """``targets`` are int64 (B, T), below 0 where they do not count."""
        p, q = (read.log_probabilities[targets >= 0] for read in (before, after))  # (n, V)
        counted = targets[targets >= 0][:, None]
        self.tokens, self.tokens_read = self.tokens + len(counted), self.tokens_read + targets.numel()
        self.nats_before -= p.gather(1, counted).double().sum().item()
        self.nats_after -= q.gather(1, counted).double().sum().item()
        self.kl += (p.exp() * (p - q)).sum(1).double().sum().item()
        self.same += int((p.argmax(1) == q.argmax(1)).sum())
        for kind, counts in self.fired.items():
            pairs = zip(before.fired[kind], after.fired[kind], strict=True)
            counts += torch.tensor([[one.sum(), other.sum(), (one & other).sum()] for one, other in pairs]).t()

    def comparison(self, num_neurons: int) -> Comparison:
        def measured(nats: float, which: int) -> Measured:
            loss = nats / self.tokens
            density = {
                kind: (counts[which] / (self.tokens_read * num_neurons)).tolist() for kind, counts in self.fired.items()
            }
            return Measured(loss, perplexity(loss), density)

        still = {kind: (counts[2] / counts[0].clamp_min(1)).tolist() for kind, counts in self.fired.items()}
        return Comparison(
            self.tokens,
            measured(self.nats_before, 0),
            measured(self.nats_after, 1),
            self.kl / self.tokens,
            self.same / self.tokens,
            still,
        )
