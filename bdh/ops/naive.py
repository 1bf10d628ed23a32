"""The model in its slow and obvious form: the ground truth that every fast form is tested against.

Plain functions on plain tensors, written as the equations are (arXiv 2509.26507; the symbols are those of
the table in ``docs/model.md``). Nothing here is tuned, nothing is fused, and nothing else in the package
computes with it: tests and benchmarks do.
"""

import math
from typing import NamedTuple

import torch

LAYER_NORM_EPS = 1e-5
ROPE_THETA = 2.0**16


class Weights(NamedTuple):
    """The five tensors of a model, in the layout of the published reference code."""

    embed: torch.Tensor  # (V, D)
    encoder: torch.Tensor  # (H, D, N)
    encoder_v: torch.Tensor  # (H, D, N)
    decoder: torch.Tensor  # (H * N, D)
    lm_head: torch.Tensor  # (D, V)


def layer_norm(v: torch.Tensor, eps: float = LAYER_NORM_EPS) -> torch.Tensor:
    """Normalises the last dimension to mean 0 and variance 1; there are no parameters."""
    mean = v.mean(-1, keepdim=True)
    variance = ((v - mean) ** 2).mean(-1, keepdim=True)
    return (v - mean) / torch.sqrt(variance + eps)


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float = ROPE_THETA) -> torch.Tensor:
    """Rotates the pairs of neurons (2i, 2i + 1) of ``x`` (..., T, N) by their token's position (T,).

    Pair i turns by theta^(-2i/N) / (2 pi) of a full turn for each token.
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


def attention(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Sums, for each token, the values of all earlier ones, weighted by the score of their keys.

    The keys are the queries ``q`` (B, H, T, N); ``v`` (B, T, D) is shared by the heads. A token does not see
    itself; there is no softmax and no scale. Returns (B, H, T, D).
    """
    scores = (q @ q.transpose(-1, -2)).tril(-1)  # (B, H, T, T)
    return scores @ v[:, None]


def layer_pass(
    v: torch.Tensor,
    weights: Weights,
    positions: torch.Tensor,
    *,
    theta: float = ROPE_THETA,
    eps: float = LAYER_NORM_EPS,
    dropout_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """One pass of ``v`` (B, T, D) through the layer.

    Args:
        dropout_mask: (B, H, T, N), already divided by the keep probability; None keeps everything.
    """
    x = torch.relu(v[:, None] @ weights.encoder)  # (B, H, T, N)
    a = attention(rope(x, positions, theta), v)  # (B, H, T, D)
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
    num_passes: int,
    *,
    theta: float = ROPE_THETA,
    eps: float = LAYER_NORM_EPS,
) -> torch.Tensor:
    """Logits (B, T, V) of ``tokens`` (B, T), positions counted from 0, without dropout."""
    v = layer_norm(weights.embed[tokens], eps)  # (B, T, D)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    for _ in range(num_passes):
        v = layer_pass(v, weights, positions, theta=theta, eps=eps)
    return v @ weights.lm_head
