"""Measures the effect of quantization on each matrix, on the predictions, and on which neurons fire."""

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
"""The most bytes of the firing patterns and log-probabilities of both models, for sequences that are read together."""


@dataclass(frozen=True)
class MatrixError:
    """The quantization error of a module's weights."""

    module: str
    format: QuantizedFormat
    relative_error: float
    """The root mean square of the errors, divided by that of the weights."""
    saturated: float
    """The fraction of codes that are the largest or smallest possible."""


def matrix_errors(model: Any, quantized: Any) -> list[MatrixError]:
    """Returns the error of each quantized module, compared with the model from which it was made."""
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
    """Measurements of a model on held-out text."""

    loss: float
    """Nats per token."""
    perplexity: float
    density: dict[str, list[float]]
    """The fraction of neurons that fire, for ``x`` and ``y``, in each layer step, over the tokens whose prediction
    counts."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of a model before and after quantization on the same text."""

    tokens: int
    """The number of predicted tokens."""
    before: Measured
    after: Measured
    kl: float
    """The mean KL divergence of the next-token distribution after quantization from that before, in nats per token."""
    same_prediction: float
    """The fraction of tokens at which both models predict the same token."""
    still_fire: dict[str, list[float]]
    """The fraction of neurons firing before quantization that still fire, for ``x`` and ``y``, in each layer step."""


def compare(
    model: Any,
    quantized: Any,
    batches: Sequence[Batch],
    *,
    max_batch_size: int = 16,
    progress: Progress = lambda stage, done, total: None,
) -> Comparison:
    """Reads sequences with both models, each with an empty state, and compares them.

    Firing is recorded by hooks, so both models compute with PyTorch's dense operations and not with the kernels.
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
    """The outputs of a model for a batch."""

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
    """Sums over the tokens that have a target that counts, which excludes padding."""

    def __init__(self, num_layer_steps: int):
        self.tokens = self.same = 0
        self.nats_before = self.nats_after = self.kl = 0.0
        zeros = torch.zeros(3, num_layer_steps, dtype=torch.int64)
        self.fired = {"x": zeros, "y": zeros.clone()}  # before, after, in both

    def add(self, before: _Read, after: _Read, targets: torch.Tensor) -> None:
        """``targets`` are int64 (B, T), below 0 where they do not count."""
        counts_here = targets >= 0
        p, q = (read.log_probabilities[counts_here] for read in (before, after))  # (n, V)
        counted = targets[counts_here][:, None]
        self.tokens += len(counted)
        self.nats_before -= p.gather(1, counted).double().sum().item()
        self.nats_after -= q.gather(1, counted).double().sum().item()
        self.kl += (p.exp() * (p - q)).sum(1).double().sum().item()
        self.same += int((p.argmax(1) == q.argmax(1)).sum())
        for kind, counts in self.fired.items():
            pairs = zip(*((wide[counts_here] for wide in read.fired[kind]) for read in (before, after)), strict=True)
            counts += torch.tensor([[one.sum(), other.sum(), (one & other).sum()] for one, other in pairs]).t()

    def comparison(self, num_neurons: int) -> Comparison:
        def measured(nats: float, which: int) -> Measured:
            loss = nats / self.tokens
            most = self.tokens * num_neurons
            density = {kind: (counts[which] / most).tolist() for kind, counts in self.fired.items()}
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
