"""Computes one block of tokens in one head: its neurons and attention, forward and backward, in dense operations.

A block consists of C tokens of each of G sequences, and one head. Wide tensors are stored neuron by neuron, (N, G, C),
so that matrix products need no batching and a neuron's weights are read once for all tokens. :class:`Neurons` supports
any device and dtype; on a GPU each of its element-wise parts is compiled into one kernel.
:class:`bdh.ops.cpu.train.KernelNeurons` only computes neurons that fire.

With the weights W of a :class:`bdh.ops.attention.DecayMask`, strictly lower triangular and 1 without decay,

    scores = (q_t . q_s) W_ts        a = scores v + q S        S' = S + q v^T

and for the gradients da of a and dS' of S', with the gradient ds = (da v^T) W of the unweighted scores,

    dq = (ds + ds^T) q + da S^T + v dS'^T        dv = scores^T da + q dS'        dS = dS' + q da^T

Only the lower blocks of the scores are computed.

The dropout mask is computed wherever it is needed and never stored. Whether neuron n of token t is kept depends only on
a seed, n and t, as in the counter-based generators of Salmon et al. (SC 2011), and thus neither on the division into
blocks nor on the backend. Neurons and tokens have keys of 32 bits each, which are computed beforehand. The sum of two
keys is mixed by two multiplications and three shifts, with the constants of C. Wellons's hash-prospector ("lowbias32").
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from bdh.ops.attention import DecayWeights, Rotation, scaled_for_float16, sum_dtype, weighted
from bdh.ops.backends import LayerWeights, compiles_parts

_MASK = 0xFFFFFFFF
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
SHIFTS = (16, 15, 16)
_APART = 0x9E3779B9  # 2^32 divided by the golden ratio: gives neighbouring numbers keys that are far apart
_WORD = 1 << 32


class Dropout(NamedTuple):
    """The dropout mask of one layer step, as keys from which it is computed."""

    rate: float
    """The fraction of neuron outputs that are dropped."""
    neuron_keys: torch.Tensor  # int64 (H * N,), each from 0 to 2^32 - 1
    token_keys: torch.Tensor  # int64 (B, T), likewise

    @property
    def threshold(self) -> int:
        """Outputs whose mixed key is below it are dropped."""
        return min(_WORD - 1, round(self.rate * _WORD))

    @property
    def scale(self) -> float:
        """The factor of kept outputs, which preserves the mean."""
        return 1 / (1 - self.rate)


def make_dropout(rate: float, seed: torch.Tensor, num_neurons: int, num_sequences: int, num_tokens: int) -> Dropout:
    """Creates the mask for the neurons of all heads, and for sequences of ``num_tokens`` tokens.

    Args:
        rate: the fraction of outputs to drop.
        seed: int64, a single number on the device of the computation. It is not copied to the host.
        num_neurons: H * N.
        num_sequences: B.
        num_tokens: T.
    """
    low, high = seed & _MASK, (seed >> 32) & _MASK
    neurons = torch.arange(num_neurons, device=seed.device)
    tokens = torch.arange(num_sequences * num_tokens, device=seed.device)
    neuron_keys = _mix((neurons * _APART + low) & _MASK)
    token_keys = _mix((_mix((tokens * _APART + high) & _MASK) + low) & _MASK)
    return Dropout(rate, neuron_keys, token_keys.view(num_sequences, num_tokens))


def is_kept(dropout: Dropout, neuron_keys: torch.Tensor, token_keys: torch.Tensor) -> torch.Tensor:
    """Returns which outputs of some neurons (n,) are kept for some tokens (...): bool (n, ...)."""
    keys = neuron_keys.view(-1, *[1] * token_keys.ndim) + token_keys
    return _mix(keys & _MASK) >= dropout.threshold


def _mix(keys: torch.Tensor) -> torch.Tensor:
    """Hashes 32-bit numbers, stored as int64. Products are truncated to 32 bits before the next step."""
    for multiplier, shift in zip(MULTIPLIERS, SHIFTS[:2], strict=True):
        keys = ((keys ^ (keys >> shift)) * multiplier) & _MASK
    return keys ^ (keys >> SHIFTS[2])


# The number of rows of scores to compute at once, up to the diagonal. Fewer waste less of the upper half; more make a
# more efficient matrix product. A step of the 25M model on an H200 takes 116 ms with 128 and 106 ms with 512.
_SCORE_ROWS, _SCORE_ROWS_OF_GPU = 128, 512


class Scores(NamedTuple):
    """The tensors that the backward pass of a block needs."""

    weighted: torch.Tensor  # (G, C, C), times ``factor``
    queries: torch.Tensor  # (N, G, C)
    keys: torch.Tensor  # (N, G, C)
    query_scale: torch.Tensor | None  # (G, C, 1): the divisor of the queries in float16; None otherwise
    key_scale: torch.Tensor | None  # (G, 1, 1)

    @property
    def factor(self) -> torch.Tensor | None:
        """The factor that was divided out of the scores, (G, C, 1); None for 1."""
        if self.query_scale is None or self.key_scale is None:
            return None
        return self.query_scale * self.key_scale


def read_block(
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None,
    weights: DecayWeights | None,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Scores]:
    """Computes the attention output of a block.

    Args:
        q: (N, G, C), rotated.
        v: (G, C, D).
        state: (G, N, D), the state before the block; None for zeros.
        weights: the weights of decay and documents; None if all earlier tokens count alike.
        kept: the weighted scores of an earlier call. Not for float16, whose scores have factors.

    Returns:
        ``a`` (G, C, D), in the dtype of sums, and the tensors for the backward pass.
    """
    scores = _scores(q, weights) if kept is None else Scores(kept, q, q, None, None)
    a = torch.bmm(scores.weighted, v).to(sum_dtype(q.dtype))
    if scores.factor is not None:
        a *= scores.factor
    if state is not None:
        read = _product(q.permute(1, 2, 0), state, q.dtype)
        a += read if weights is None else weighted(read, weights.from_state[:, 0])
    return a, scores


def learn_block(
    q: torch.Tensor, v: torch.Tensor, state: torch.Tensor | None, weights: DecayWeights | None
) -> torch.Tensor:
    """Computes the state (G, N, D) after the block."""
    learned = _product(_keys_to_end(q, weights).permute(1, 0, 2), v, q.dtype)
    if state is None:
        return learned
    return learned.add_(state if weights is None else weighted(state, weights.through[:, 0]))


def read_block_backward(
    grad_a: torch.Tensor,
    grad_v: torch.Tensor,
    grad_state: torch.Tensor | None,
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None,
    scores: Scores,
    weights: DecayWeights | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes the gradients of :func:`read_block` and :func:`learn_block` together.

    Args:
        grad_a: (G, C, D), in the dtype of sums.
        grad_v: (G, C, D), in the dtype of sums, to which the gradient of v is added.
        grad_state: (G, N, D), the gradient of the state after the block; None if it is not used.
        q: as for :func:`read_block`.
        v: as for :func:`read_block`.
        state: as for :func:`read_block`.
        scores: the second result of :func:`read_block`.
        weights: as for :func:`read_block`.

    Returns:
        The gradient of q (N, G, C), possibly not contiguous, and that of the state before the block, or None without
        one.
    """
    dtype = q.dtype
    grad = grad_a if scores.factor is None else grad_a * scores.factor
    grad = grad.to(dtype)
    between = torch.bmm(grad, v.transpose(1, 2))  # (G, C, C)
    between = between.tril_(-1) if weights is None else between * weights.between[:, 0].to(dtype)
    grad_v += torch.bmm(scores.weighted.transpose(1, 2), grad)
    if scores.query_scale is None or scores.key_scale is None:
        grad_q = torch.bmm(q.permute(1, 0, 2), between + between.transpose(1, 2))  # (G, N, C)
    else:
        of_queries = torch.bmm(scores.keys.permute(1, 0, 2), between.transpose(1, 2))
        of_keys = torch.bmm(scores.queries.permute(1, 0, 2), between)
        grad_q = of_queries / scores.query_scale.transpose(1, 2) + of_keys / scores.key_scale
    if grad_state is not None:
        learned = _product(grad_state, v.transpose(1, 2), dtype)  # (G, N, C)
        grad_v += _product(_keys_to_end(q, weights).permute(1, 2, 0), grad_state, dtype)
        grad_q = grad_q + (learned if weights is None else learned * weights.to_end[:, 0].transpose(1, 2))
    if state is None:
        return grad_q.permute(1, 0, 2), None
    grad_read = grad_a if weights is None else weighted(grad_a, weights.from_state[:, 0])
    grad_q = grad_q + _product(state, grad_read.transpose(1, 2), dtype)
    before = _product(q.permute(1, 0, 2), grad_read, dtype)
    if grad_state is not None:
        before += grad_state if weights is None else weighted(grad_state, weights.through[:, 0])
    return grad_q.permute(1, 0, 2), before


def _scores(q: torch.Tensor, weights: DecayWeights | None) -> Scores:
    _, G, C = q.shape
    queries = keys = q
    query_scale = key_scale = None
    if q.dtype == torch.float16:
        queries, keys, query_scale, key_scale = scaled_for_float16(q, neurons=0, tokens=2)
        query_scale, key_scale = query_scale[0, ..., None], key_scale[0, ..., None]
    columns = keys.permute(1, 0, 2)  # (G, N, C)
    at_once = _SCORE_ROWS_OF_GPU if q.device.type == "cuda" else _SCORE_ROWS
    if at_once >= C:
        scores = torch.bmm(queries.permute(1, 2, 0), columns)
    else:
        scores = q.new_zeros(G, C, C)
        for first in range(0, C, at_once):
            last = min(C, first + at_once)
            scores[:, first:last, :last] = torch.bmm(queries[:, :, first:last].permute(1, 2, 0), columns[:, :, :last])
    scores = scores.tril_(-1) if weights is None else scores * weights.between[:, 0].to(q.dtype)
    return Scores(scores, queries, keys, query_scale, key_scale)


def _keys_to_end(q: torch.Tensor, weights: DecayWeights | None) -> torch.Tensor:
    return q if weights is None else q * weights.to_end[:, 0, :, 0].to(q.dtype)


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiplies matrices whose factors or result are states, and returns the product in the dtype of sums.

    The product is computed in bfloat16 if that is the dtype. float16 cannot represent the sums of a text, so the
    product is computed in float32 instead.
    """
    wide = sum_dtype(dtype)
    factors = dtype if dtype == torch.bfloat16 else wide
    return torch.bmm(left.to(factors), right.to(factors)).to(wide)


@dataclass(frozen=True)
class Block:
    """The coordinates of a block: one head, some sequences, some tokens."""

    head: int
    neurons: slice
    """The neurons of the head among those of all heads."""
    sequences: slice
    tokens: slice
    rotation: Rotation
    """The rotation of all sequences and tokens."""
    dropout: Dropout | None
    """The dropout mask with the keys of this block's neurons and tokens, (N,) and (G, C)."""

    def turns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the cosine and sine for this block, (N/2, 1 or G, C)."""
        return self.rotation.of_block(self.sequences, self.tokens)


class Fired(NamedTuple):
    """The activations of a block: x = relu(E v), and q = rope(x)."""

    x: torch.Tensor  # (N, G, C)
    q: torch.Tensor  # (N, G, C)


class Neurons:
    """Computes blocks with the weights of a layer step in dense operations, and accumulates the weights' gradients."""

    def __init__(self, weights: LayerWeights, *, with_gradients: bool):
        self._weights = weights
        self._is_compiled = compiles_parts(weights.encoder.device)
        wide = sum_dtype(weights.encoder.dtype)
        self._gradients = zeros_like(weights, wide) if with_gradients else None

    def fire(self, block: Block, v: torch.Tensor) -> Fired:
        """Computes x and its rotation q from v (G, C, D)."""
        before = self._weights.encoder[block.neurons] @ v.flatten(0, 1).t()  # (N, G * C)
        return Fired(*self._run(_rotated, before.unflatten(1, v.shape[:2]), *block.turns()))

    def rotated(self, block: Block, x: torch.Tensor) -> Fired:
        """Computes the same from a saved x."""
        return Fired(x, self._run(_turned, x, *block.turns()))

    def gated_mlp(self, block: Block, x: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
        """Adds the product of the decoder and dropout(x * relu(Ev a)) to ``out`` (G, C, D), in the dtype of sums."""
        z = self._run(_gated, x, self._ev_a(block, a), block.dropout)
        product = z.flatten(1).t() @ self._weights.decoder[block.neurons]
        out += product.view(out.shape)

    def gated_mlp_backward(
        self, block: Block, x: torch.Tensor, a: torch.Tensor, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gradient of a (G, C, D), in the dtype of sums, and that of x as the gate of y."""
        assert self._gradients is not None
        decoder = self._weights.decoder[block.neurons]
        grads = grad_out.flatten(0, 1)  # (G * C, D)
        grad_z = (decoder @ grads.t()).view(x.shape)
        z, grad_y, gated = self._run(_gated_backward, x, self._ev_a(block, a), grad_z, block.dropout)
        self._gradients.decoder[block.neurons] += z.flatten(1) @ grads
        self._gradients.encoder_v[block.head].add_(grad_y.flatten(1) @ a.flatten(0, 1))
        grad_a = grad_y.flatten(1).t() @ self._weights.encoder_v[block.head]
        return grad_a.view(a.shape).to(sum_dtype(a.dtype)), gated

    def fire_backward(
        self,
        block: Block,
        x: torch.Tensor,
        v: torch.Tensor,
        grad_q: torch.Tensor,
        gated: torch.Tensor,
        grad_v: torch.Tensor,
    ) -> None:
        """Adds the gradient through x to ``grad_v`` (G, C, D): by its rotation, and ``gated``, as the gate of y."""
        assert self._gradients is not None
        grad_x = self._run(_rotated_backward, x, grad_q, gated, *block.turns()).flatten(1)
        self._gradients.encoder[block.neurons] += grad_x @ v.flatten(0, 1)
        grad_v += (grad_x.t() @ self._weights.encoder[block.neurons]).view(v.shape)

    def gradients(self) -> LayerWeights:
        """Returns the gradients of the weights over all blocks so far, in the dtype of sums."""
        assert self._gradients is not None
        return self._gradients

    def _ev_a(self, block: Block, a: torch.Tensor) -> torch.Tensor:
        """Computes Ev a, (N, G, C): y before its ReLU."""
        return (self._weights.encoder_v[block.head] @ a.flatten(0, 1).t()).unflatten(1, a.shape[:2])

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return (compiled(function, arguments[0].shape) if self._is_compiled else function)(*arguments)


def zeros_like(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    def zeros(weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)

    encoder_v = tuple(zeros(weight) for weight in weights.encoder_v)
    return LayerWeights(zeros(weights.encoder), encoder_v, zeros(weights.decoder))


# This many block sizes get their own compiled kernel. All others share one that divides by sizes unknown at compile
# time, with which the rotation takes eleven times as long on an H200.
MOST_SIZES_COMPILED = 8
sizes_compiled: set[torch.Size] = set()


def compiled(function: Callable[..., Any], size: torch.Size) -> Callable[..., Any]:
    """Returns an element-wise function compiled for blocks (N, G, C) of this size."""
    if len(sizes_compiled) < MOST_SIZES_COMPILED:
        sizes_compiled.add(size)
    return _compiled(function, size not in sizes_compiled)


@cache
def _compiled(function: Callable[..., Any], is_dynamic: bool) -> Callable[..., Any]:
    # Documents, dropout and dtypes also lead to separate compilations. Beyond the default limit of 8, nothing would be
    # compiled at all.
    more: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # PyTorch 2.13 has it, 2.9 does not
        more["recompile_limit"] = 64
    return torch.compile(function, dynamic=is_dynamic, **more)


def _rotated(before: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes x and q = rope(x) from x before its ReLU (N, G, C); cos and sin are (N/2, 1 or G, C)."""
    x = before.relu()
    return x, _turned(x, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Computes rope(x)."""
    a, b = _pairs(x)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=1).flatten(0, 1).to(x.dtype)


def _rotated_backward(
    x: torch.Tensor, grad_q: torch.Tensor, gated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Computes the gradient before the ReLU: that of q, rotated back, plus that of the gate, where x fires."""
    a, b = _pairs(grad_q)
    turned = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=1).flatten(0, 1)
    return torch.where(x > 0, turned + gated, 0.0).to(x.dtype)


def _pairs(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = wide.to(sum_dtype(wide.dtype)).unflatten(0, (-1, 2))
    return pairs[:, 0], pairs[:, 1]


def _gated(x: torch.Tensor, ev_a: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Computes z = dropout(x * y)."""
    z = x * ev_a.relu()
    if dropout is None:
        return z
    return torch.where(is_kept(dropout, dropout.neuron_keys, dropout.token_keys), z * dropout.scale, 0.0)


def _gated_backward(
    x: torch.Tensor, ev_a: torch.Tensor, grad_z: torch.Tensor, dropout: Dropout | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes z, and the gradients of y before its ReLU and of x as the gate of y."""
    y = y_kept = ev_a.relu()
    if dropout is not None:
        scale = is_kept(dropout, dropout.neuron_keys, dropout.token_keys).to(x.dtype) * dropout.scale
        grad_z, y_kept = grad_z * scale, y * scale
    return x * y_kept, torch.where(y > 0, grad_z * x, 0.0), grad_z * y
