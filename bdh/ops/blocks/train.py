"""A layer step in blocks, with little memory: neuron-wide activations are not saved for the backward pass.

Autograd only saves v, (B, T, D), and the weights. Tensors as wide as the neurons exist for one block at a time, of one
head and some sequences, and are recomputed in the backward pass, unless memory suffices to keep them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bdh.ops.attention import DecayMask, DecayWeights, Rotation, sum_dtype
from bdh.ops.backends import BackendName, LayerWeights
from bdh.ops.blocks.block import Block, Dropout, Neurons, learn_block, read_block, read_block_backward
from bdh.ops.eager import layer_norm


@dataclass(frozen=True)
class BlockSizes:
    """The division of a layer step into blocks. It changes results only by rounding."""

    sequences: int
    """The number of sequences in a block."""
    tokens: int
    """The number of tokens of each sequence in a block. The state is carried between the blocks of longer sequences."""


@dataclass(frozen=True)
class BlockSpec:
    """The settings of a layer step."""

    eps: float
    """Added to the variance in the layer norms."""
    rotation: Rotation
    sizes: BlockSizes
    backend: BackendName
    """"blocks" or "cpu": the code that computes the neurons."""
    mask: torch.Tensor | None = None
    """Bool (B, T), False for padding."""
    decay_mask: DecayMask | None = None
    dropout: Dropout | None = None
    keep_state: bool = False
    keep_wide: bool = False
    """Whether to keep x for the backward pass instead of recomputing it."""
    keep_scores: bool = False
    """Whether to keep the scores, which for short texts are not wider than v. Not possible in float16."""


def train(
    v: torch.Tensor, weights: LayerWeights, spec: BlockSpec, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes a layer step in blocks.

    Products are computed in the dtype of the weights, and the state and sums in the dtype of sums; v keeps its own
    dtype. First-order gradients flow to v, the weights and the state.

    Returns:
        v (B, T, D) after the layer step, and the new state (B, H, N, D), or None unless ``spec.keep_state``.
    """
    values = v.to(weights.encoder.dtype)
    if spec.mask is not None:  # no neuron fires at a token of zeros
        values = values * spec.mask.to(values.dtype)[..., None]
    with torch.autocast(v.device.type, enabled=False):
        out, state = wide_step(values.contiguous(), weights, spec, state)
    return layer_norm(v + layer_norm(out, spec.eps), spec.eps), state


def wide_step(
    v: torch.Tensor, weights: LayerWeights, spec: BlockSpec, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes sum_h dropout(x_h * y_h) Dec_h, with x, y and attention as defined in ``docs/model.md``.

    Args:
        v: (B, T, D), in the dtype of the weights. Set padding to zeros, at which no neuron fires.
        weights: the weights of the layer.
        spec: the settings.
        state: (B, H, N, D) in the dtype of sums, or None for an empty text.

    Returns:
        (B, T, D) in the dtype of sums, and the new state, or None unless ``spec.keep_state``.

    Raises:
        ValueError: there are no tokens, or scores are to be kept in float16.
        RuntimeError: from the backward pass, if second-order gradients are requested.
    """
    if 0 in v.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}: must have at least 1 token")
    if spec.keep_scores and v.dtype == torch.float16:
        raise ValueError("keep_scores is True: must be False in float16, whose scores have factors")
    out, new_state = _WideStep.apply(v, weights.encoder, weights.decoder, state, spec, *weights.encoder_v)
    return out, new_state if spec.keep_state else None


class _Kept(NamedTuple):
    """The saved tensors of one block; None for those that the backward pass recomputes."""

    x: torch.Tensor | None  # (N, G, C)
    scores: torch.Tensor | None  # (G, C, C)


_NOTHING_KEPT = _Kept(None, None)


@dataclass
class _Walk:
    """Iterates over the blocks of a layer step, in the order in which a head's state is carried through a text."""

    v: torch.Tensor
    num_heads: int
    neurons_per_head: int
    spec: BlockSpec
    tokens: list[slice] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = _ranges(self.v.shape[1], self.spec.sizes.tokens)

    def groups(self) -> Iterator[tuple[slice, int]]:
        """Yields the sequences and head of each carried state."""
        for sequences in _ranges(self.v.shape[0], self.spec.sizes.sequences):
            for head in range(self.num_heads):
                yield sequences, head

    def block(self, sequences: slice, head: int, index: int) -> Block:
        tokens, dropout = self.tokens[index], self.spec.dropout
        neurons = slice(head * self.neurons_per_head, (head + 1) * self.neurons_per_head)
        if dropout is not None:
            dropout = Dropout(dropout.rate, dropout.neuron_keys[neurons], dropout.token_keys[sequences, tokens])
        return Block(head, neurons, sequences, tokens, self.spec.rotation, dropout)

    def decay_weights(self, sequences: slice, head: int, index: int) -> DecayWeights | None:
        """Returns the weights (G or 1, 1, ...) of a head for some sequences. Those of all would be a batch of T x T."""
        if self.spec.decay_mask is None:
            return None
        tokens = self.tokens[index]
        return self.spec.decay_mask.part(sequences, slice(head, head + 1), tokens).weights(
            tokens.stop - tokens.start, self.v.device
        )


class _WideStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        v: torch.Tensor,
        encoder: torch.Tensor,
        decoder: torch.Tensor,
        state: torch.Tensor | None,
        spec: BlockSpec,
        *encoder_v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        v = v.contiguous()
        weights = LayerWeights(encoder, encoder_v, decoder)
        neurons = make_neurons(weights, spec, with_gradients=False)
        walk = _Walk(v, len(encoder_v), len(encoder_v[0]), spec)
        out = torch.zeros(v.shape, dtype=sum_dtype(v.dtype), device=v.device)
        new_state = None
        if spec.keep_state:
            new_state = out.new_empty(len(v), walk.num_heads, walk.neurons_per_head, v.shape[-1])
        kept: dict[tuple[int, int, int], _Kept] = {}
        for sequences, head in walk.groups():
            current = None if state is None else state[sequences, head]
            for index, tokens in enumerate(walk.tokens):
                block, decay = walk.block(sequences, head, index), walk.decay_weights(sequences, head, index)
                values = v[sequences, tokens]
                fired = neurons.fire(block, values)
                a, scores = read_block(fired.q, values, current, decay)
                a = _normalised(a, spec.eps)[0].to(v.dtype)
                neurons.gated_mlp(block, fired.x, a, out[sequences, tokens])
                if spec.keep_state or index < len(walk.tokens) - 1:
                    current = learn_block(fired.q, values, current, decay)
                if spec.keep_wide or spec.keep_scores:
                    x = fired.x if spec.keep_wide else None
                    kept[sequences.start, head, index] = _Kept(x, scores.weighted if spec.keep_scores else None)
            if new_state is not None and current is not None:
                new_state[sequences, head] = current
        ctx.save_for_backward(v, encoder, decoder, state, *encoder_v)
        ctx.spec, ctx.kept, ctx.device_type = spec, kept, v.device.type
        ctx.set_materialize_grads(False)
        return out, new_state

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_state: torch.Tensor | None) -> tuple[Any, ...]:
        # Not once_differentiable, which would silently give wrong second derivatives.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the layer in blocks has no second derivatives (create_graph=True): they need "
                'layer_options = LayerOptions(path="plain")'
            )
        with torch.autocast(ctx.device_type, enabled=False):
            return _backward(ctx, grad_out, grad_state)


def _backward(ctx: Any, grad_out: torch.Tensor | None, grad_state: torch.Tensor | None) -> tuple[Any, ...]:
    v, encoder, decoder, state, *encoder_v = ctx.saved_tensors
    spec: BlockSpec = ctx.spec
    weights = LayerWeights(encoder, tuple(encoder_v), decoder)
    neurons = make_neurons(weights, spec, with_gradients=True)
    walk = _Walk(v, len(encoder_v), len(encoder_v[0]), spec)
    grad_v = torch.zeros(v.shape, dtype=sum_dtype(v.dtype), device=v.device)
    grad_out = torch.zeros_like(grad_v) if grad_out is None else grad_out.contiguous()
    grad_first = None if state is None else torch.zeros_like(state)
    # Taken out of ctx, so that each block is freed as soon as it was used. A second backward pass recomputes them.
    kept, ctx.kept = ctx.kept, {}
    for sequences, head in walk.groups():
        first = None if state is None else state[sequences, head]
        grad_after = None if grad_state is None else grad_state[sequences, head]
        for index, before in _states_backwards(walk, neurons, v, sequences, head, first, kept):
            block, decay = walk.block(sequences, head, index), walk.decay_weights(sequences, head, index)
            values, grad_values = v[sequences, block.tokens], grad_v[sequences, block.tokens]
            had = kept.pop((sequences.start, head, index), _NOTHING_KEPT)
            fired = neurons.fire(block, values) if had.x is None else neurons.rotated(block, had.x)
            a, scores = read_block(fired.q, values, before, decay, had.scores)
            a, inverse_deviation = _normalised(a, spec.eps)
            grads = grad_out[sequences, block.tokens].to(v.dtype)
            grad_a, gated = neurons.gated_mlp_backward(block, fired.x, a.to(v.dtype), grads)
            grad_a = _normalised_backward(grad_a, a, inverse_deviation)
            grad_q, grad_after = read_block_backward(
                grad_a, grad_values, grad_after, fired.q, values, before, scores, decay
            )
            neurons.fire_backward(block, fired.x, values, grad_q, gated, grad_values)
        if grad_first is not None and grad_after is not None:
            grad_first[sequences, head] = grad_after
    found_weights = neurons.gradients()
    return (
        grad_v.to(v.dtype),
        found_weights.encoder.to(encoder.dtype),
        found_weights.decoder.to(decoder.dtype),
        grad_first,
        None,
        *(grad.to(encoder.dtype) for grad in found_weights.encoder_v),
    )


def make_neurons(weights: LayerWeights, spec: BlockSpec, *, with_gradients: bool) -> Neurons:
    if spec.backend == "cpu":
        from bdh.ops.cpu.train import KernelNeurons

        return KernelNeurons(weights, with_gradients=with_gradients, keep_wide=spec.keep_wide)
    return Neurons(weights, with_gradients=with_gradients)


def _ranges(total: int, size: int) -> list[slice]:
    return [slice(start, min(total, start + size)) for start in range(0, total, size)]


def _states_backwards(
    walk: _Walk,
    neurons: Neurons,
    v: torch.Tensor,
    sequences: slice,
    head: int,
    first: torch.Tensor | None,
    kept: "dict[tuple[int, int, int], _Kept]",
) -> Iterator[tuple[int, torch.Tensor | None]]:
    """Yields the blocks of a text from last to first, each with the state before it.

    A first pass keeps every sqrt(n)-th of n states. The states between them are recomputed, one segment at a time.
    """
    count = len(walk.tokens)
    stretch = math.isqrt(count - 1) + 1 if count > 1 else 1

    def state_after(index: int, state: torch.Tensor | None) -> torch.Tensor:
        block = walk.block(sequences, head, index)
        values = v[sequences, block.tokens]
        x = kept.get((sequences.start, head, index), _NOTHING_KEPT).x
        fired = neurons.fire(block, values) if x is None else neurons.rotated(block, x)
        return learn_block(fired.q, values, state, walk.decay_weights(sequences, head, index))

    starts, state = {0: first}, first
    for index in range((count - 1) // stretch * stretch):
        state = state_after(index, state)
        if (index + 1) % stretch == 0:
            starts[index + 1] = state
    for start in sorted(starts, reverse=True):
        states, end = [starts.pop(start)], min(count, start + stretch)
        for index in range(start, end - 1):
            states.append(state_after(index, states[-1]))
        for index in range(end - 1, start - 1, -1):
            yield index, states.pop()


def _normalised(a: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the layer norm over the last dimension, and the inverse standard deviation (..., 1)."""
    normal, _, inverse_deviation = torch.native_layer_norm(a, a.shape[-1:], None, None, eps)
    return normal, inverse_deviation


def _normalised_backward(grad: torch.Tensor, normal: torch.Tensor, inverse_deviation: torch.Tensor) -> torch.Tensor:
    along = (grad * normal).mean(-1, keepdim=True)
    return (grad - grad.mean(-1, keepdim=True) - normal * along) * inverse_deviation
