"""The reference implementation of the model, against which every fast form is tested.

Plain functions on plain tensors that follow the equations (arXiv 2509.26507; ``docs/model.md`` has a table of the
symbols). Nothing here is optimized, and only tests and benchmarks use it.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

LAYER_NORM_EPS = 1e-5
ROPE_THETA = 2.0**16


class Weights(NamedTuple):
    """The five weights of a model, in the layout of the published reference code."""

    embed: torch.Tensor  # (V, D)
    encoder: torch.Tensor  # (H, D, N)
    encoder_v: torch.Tensor  # (H, D, N)
    decoder: torch.Tensor  # (H * N, D)
    lm_head: torch.Tensor  # (D, V)


def layer_norm(v: torch.Tensor, eps: float = LAYER_NORM_EPS) -> torch.Tensor:
    """Normalizes the last dimension to mean 0 and variance 1, without parameters."""
    mean = v.mean(-1, keepdim=True)
    variance = ((v - mean) ** 2).mean(-1, keepdim=True)
    return (v - mean) / torch.sqrt(variance + eps)


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float = ROPE_THETA) -> torch.Tensor:
    """Applies rotary positions: rotates the pairs of neurons (2i, 2i + 1) of ``x`` (..., T, N).

    Each token rotates pair i by theta^(-2i/N) / (2 pi) of a full turn.

    Args:
        x: (..., T, N).
        positions: (T,), the position of each token.
        theta: the base of the frequencies.
    """
    N = x.shape[-1]
    pair = torch.arange(N // 2, dtype=torch.float64, device=x.device)
    turns_per_token = theta ** (-2 * pair / N) / (2 * math.pi)
    turns = (positions[:, None].double() * turns_per_token) % 1  # (T, N/2)
    cos = torch.cos(2 * math.pi * turns).to(x.dtype)
    sin = torch.sin(2 * math.pi * turns).to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    rotated = torch.empty_like(x)
    rotated[..., 0::2] = a * cos - b * sin
    rotated[..., 1::2] = b * cos + a * sin
    return rotated


def attention(
    q: torch.Tensor, v: torch.Tensor, *, window: int | None = None, half_lives: torch.Tensor | None = None
) -> torch.Tensor:
    """Linear attention: for each token, the sum of the values of all earlier tokens, weighted by their scores.

    The queries are also the keys. A token does not attend to itself, and there is no softmax and no scale.

    Args:
        q: (B, H, T, N), with rotary positions.
        v: (B, T, D), the values, which the heads share.
        window: if given, a token attends only to the ``window - 1`` tokens before it, so that the prediction after it
            depends on ``window`` tokens.
        half_lives: (H,), in tokens: the weight of an earlier token halves with this distance. None for no decay.

    Returns:
        (B, H, T, D).
    """
    scores = (q @ q.transpose(-1, -2)).tril(-1)  # (B, H, T, T)
    if window is not None:
        scores = scores.triu(1 - window)
    if half_lives is not None:
        position = torch.arange(q.shape[2], device=q.device)
        distance = (position[:, None] - position - 1).clamp_min(0)
        scores = scores * 0.5 ** (distance / half_lives[:, None, None])
    return scores @ v[:, None]


def attention_by_state(
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    starts: torch.Tensor | None = None,
    half_lives: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes :func:`attention` token by token with a state. Defines the meaning of documents, decay and padding.

    Args:
        q: (B, H, T, N), with rotary positions.
        v: (B, T, D).
        state: (B, H, N, D), the state of the preceding text; None for zeros.
        starts: bool (B, T): where True, the sequence's state is set to zero before the token.
        half_lives: (H,), in tokens: the half-life of each head's state.
        mask: bool (B, T): where False, the token does not change the state.

    Returns:
        The attention output (B, H, T, D), and the state after the last token.
    """
    B, H, T, N = q.shape
    state = q.new_zeros(B, H, N, v.shape[-1]) if state is None else state
    read = []
    for t in range(T):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0, state)
        read.append(q[:, :, t, None] @ state)  # (B, H, 1, D)
        kept = state if half_lives is None else state * 0.5 ** (1 / half_lives)[:, None, None]
        after = kept + q[:, :, t, :, None] * v[:, None, t, None]
        state = after if mask is None else torch.where(mask[:, t, None, None, None], after, state)
    return torch.cat(read, 2), state


def layer_step(
    v: torch.Tensor,
    weights: Weights,
    positions: torch.Tensor,
    *,
    theta: float = ROPE_THETA,
    eps: float = LAYER_NORM_EPS,
    dropout_mask: torch.Tensor | None = None,
    half_lives: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Applies the layer once to ``v`` (B, T, D), and returns v after the layer step.

    Args:
        v: (B, T, D), the residual stream.
        weights: the weights of the model.
        positions: (T,), the position of each token.
        theta: the base of the rotary frequencies.
        eps: added to the variance in the layer norms.
        dropout_mask: (B, H, T, N), 0 or 1 divided by the keep probability; None for no dropout.
        half_lives: (H,), in tokens: the half-life of each head's state; None for no decay.
        window: as in :func:`attention`; None for the whole text.
    """
    x = torch.relu(v[:, None] @ weights.encoder)  # (B, H, T, N)
    q = rope(x, positions, theta)
    if half_lives is None or window is not None:
        a = attention(q, v, window=window, half_lives=half_lives)  # (B, H, T, D)
    else:
        a = attention_by_state(q, v, half_lives=half_lives)[0]
    y = torch.relu(layer_norm(a, eps) @ weights.encoder_v)  # (B, H, T, N)
    z = x * y
    if dropout_mask is not None:
        z = z * dropout_mask
    B, H, T, N = z.shape
    z = z.transpose(1, 2).reshape(B, T, H * N)
    return layer_norm(v + layer_norm(z @ weights.decoder, eps), eps)


def forward(
    tokens: torch.Tensor,
    weights: Weights,
    num_layer_steps: int,
    *,
    theta: float = ROPE_THETA,
    eps: float = LAYER_NORM_EPS,
    half_lives: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    window: int | None = None,
    first_position: int = 0,
    dropout_masks: Sequence[torch.Tensor | None] = (),
) -> torch.Tensor:
    """Returns the logits (B, T, V) of ``tokens`` (B, T).

    Args:
        tokens: (B, T), token ids.
        weights: the weights of the model.
        num_layer_steps: L.
        theta: the base of the rotary frequencies.
        eps: added to the variance in the layer norms.
        half_lives: (H,), in tokens: the half-life of each head's state; None for no decay.
        starts: bool (B, T): True where a document starts. Each document is computed separately.
        window: as in :func:`attention`, in every layer step; None for the whole text.
        first_position: the position of each text's first token.
        dropout_masks: the mask of each layer step, as in :func:`layer_step`. Cannot be combined with ``starts``.
    """
    if starts is not None:
        alone = partial(
            forward,
            weights=weights,
            num_layer_steps=num_layer_steps,
            theta=theta,
            eps=eps,
            half_lives=half_lives,
            window=window,
            first_position=first_position,
        )
        rows = [_documents(row, at.tolist()) for row, at in zip(tokens, starts, strict=True)]
        return torch.stack([torch.cat([alone(document[None])[0] for document in row]) for row in rows])
    v = layer_norm(weights.embed[tokens], eps)  # (B, T, D)
    positions = first_position + torch.arange(tokens.shape[1], device=tokens.device)
    step = partial(layer_step, theta=theta, eps=eps, half_lives=half_lives, window=window)
    for mask in dropout_masks or [None] * num_layer_steps:
        v = step(v, weights, positions, dropout_mask=mask)
    return v @ weights.lm_head


def _documents(row: torch.Tensor, starts: list[bool]) -> list[torch.Tensor]:
    bounds = [0, *(t for t in range(1, len(row)) if starts[t]), len(row)]
    return [row[start:end] for start, end in pairwise(bounds)]
