"""Attention of one block of tokens, and its gradients, written out.

A block is C tokens of each of G sequences and one head. Its queries, which are its keys too, stand neuron by neuron: ``q``
(N, G, C). With the weights W of :mod:`bdh.ops.attention`, strictly lower and 1 where nothing is forgotten,

    scores = (q_t . q_s) W_ts        a = scores v + q S        S' = S + q v^T

and for the gradients da of a and dS' of S', with ds = (da v^T) W, which is what the scores' gradient leaves of itself,

    dq = (ds + ds^T) q + da S^T + v dS'^T        dv = scores^T da + q dS'        dS = dS' + q da^T

Only the lower blocks of the scores are computed.
"""

from typing import NamedTuple

import torch

from bdh.ops.attention import DecayWeights, sum_dtype, weighted

# Rows of the scores that are computed at once, up to the last of them: a smaller one wastes less of the upper half, a
# larger one is the better matrix product.
SCORE_ROWS = 128


class Scores(NamedTuple):
    """What the backward pass of a block wants again."""

    weighted: torch.Tensor  # (G, C, C), times ``factor``
    queries: torch.Tensor  # (N, G, C)
    keys: torch.Tensor  # (N, G, C)
    query_scale: torch.Tensor | None  # (G, C, 1): what float16's queries were divided by; None elsewhere
    key_scale: torch.Tensor | None  # (G, 1, 1)

    @property
    def factor(self) -> torch.Tensor | None:
        """(G, C, 1): left out of the scores."""
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
    """``a`` (G, C, D), in the dtype of sums, from q (N, G, C), v (G, C, D) and the state (G, N, D) before the block.

    ``kept`` are the weighted scores of an earlier call; not for float16, whose scores have factors.
    """
    scores = _scores(q, weights) if kept is None else Scores(kept, q, q, None, None)
    a = torch.bmm(scores.weighted, v).to(sum_dtype(q.dtype))
    if scores.factor is not None:
        a *= scores.factor
    if state is not None:
        read = _read(q.permute(1, 2, 0), state)
        a += read if weights is None else weighted(read, weights.from_state[:, 0])
    return a, scores


def learn_block(
    q: torch.Tensor, v: torch.Tensor, state: torch.Tensor | None, weights: DecayWeights | None
) -> torch.Tensor:
    """The state (G, N, D) behind the block."""
    learned = _product(_keys_to_end(q, weights).permute(1, 0, 2), v, q.dtype)
    if state is None:
        return learned
    return learned.add_(state if weights is None else weighted(state, weights.through[:, 0]))


class Gradients(NamedTuple):
    q: torch.Tensor  # (N, G, C), possibly a view of another order
    state: torch.Tensor | None  # (G, N, D): of the state before the block; None where there was none


def read_block_backward(
    grad_a: torch.Tensor,
    grad_v: torch.Tensor,
    grad_state: torch.Tensor | None,
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None,
    scores: Scores,
    weights: DecayWeights | None,
) -> Gradients:
    """The gradients of :func:`read_block` and :func:`learn_block` together; that of v is added to ``grad_v``.

    Args:
        grad_a: (G, C, D), in the dtype of sums.
        grad_v: (G, C, D), in the dtype of sums.
        grad_state: (G, N, D), of the state behind the block; None where nothing reads it.
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
        recalled = _read(_keys_to_end(q, weights).permute(1, 2, 0), grad_state)
        grad_v += recalled
        grad_q = grad_q + (learned if weights is None else learned * weights.to_end[:, 0].transpose(1, 2))
    if state is None:
        return Gradients(grad_q.permute(1, 0, 2), None)
    grad_read = grad_a if weights is None else weighted(grad_a, weights.from_state[:, 0])
    grad_q = grad_q + _product(state, grad_read.transpose(1, 2), dtype)
    before = _product(q.permute(1, 0, 2), grad_read, dtype)
    if grad_state is not None:
        before += grad_state if weights is None else weighted(grad_state, weights.through[:, 0])
    return Gradients(grad_q.permute(1, 0, 2), before)


def _scores(q: torch.Tensor, weights: DecayWeights | None) -> Scores:
    _, G, C = q.shape
    queries = keys = q
    query_scale = key_scale = None
    if q.dtype == torch.float16:
        queries, keys, query_scale, key_scale = _scaled_for_float16(q)
    columns = keys.permute(1, 0, 2)  # (G, N, C)
    if C <= SCORE_ROWS:
        scores = torch.bmm(queries.permute(1, 2, 0), columns)
    else:
        scores = q.new_zeros(G, C, C)
        for first in range(0, C, SCORE_ROWS):
            last = min(C, first + SCORE_ROWS)
            scores[:, first:last, :last] = torch.bmm(queries[:, :, first:last].permute(1, 2, 0), columns[:, :, :last])
    scores = scores.tril_(-1) if weights is None else scores * weights.between[:, 0].to(q.dtype)
    return Scores(scores, queries, keys, query_scale, key_scale)


def _scaled_for_float16(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys whose scores and sums stay in range; why these scales do, :mod:`bdh.ops.attention` says."""
    wide = q.float()
    norms = torch.linalg.vector_norm(wide, dim=0).clamp_min_(1e-6)  # (G, C)
    largest = norms.amax(dim=1, keepdim=True)  # (G, 1)
    query_scale = norms * q.shape[2] ** 0.5
    queries, keys = (wide / query_scale).half(), (wide / largest).half()
    return queries, keys, query_scale[..., None], largest[..., None]


def _keys_to_end(q: torch.Tensor, weights: DecayWeights | None) -> torch.Tensor:
    return q if weights is None else q * weights.to_end[:, 0, :, 0].to(q.dtype)


def _read(q: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """(G, C, N) times a sum over the text (G, N, D)."""
    return _product(q, state, q.dtype)


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A product with, or for, a state, in the dtype of sums.

    bfloat16 multiplies as such; float16 has no room for the sums of a text, so the product is a wide one.
    """
    wide = sum_dtype(dtype)
    factors = dtype if dtype == torch.bfloat16 else wide
    return torch.bmm(left.to(factors), right.to(factors)).to(wide)
