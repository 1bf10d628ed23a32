"""Attention to the last tokens only, from a ring that holds their keys and values.

With a window of W, token t sees the W - 1 tokens before it:

    a_t = sum_{t - W < s < t} (q_t . k_s) v_s

so what is predicted after t follows, in one layer step, from the last W tokens, t included: what a block of W tokens from
nothing gives its last token. That is why W counts the token itself: a model trained on blocks of W tokens has met no
distance above W - 1. Positions are absolute, but since queries and keys are turned alike, a score depends on t - s only.
In later layer steps the values are those of tokens that saw their own windows, so L of them see back L (W - 1) tokens.

The ring has W - 1 columns, and token s stands in column s mod (W - 1), where the token that leaves the window stood. The
keys are kept neuron by neuron, a row of columns for each, as the state of the recurrence is with its D columns: the
scores of a token are its query times that matrix, and only the rows of neurons that fire count.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from bdh.ops.attention import sum_dtype

COLUMNS_AT_ONCE = 16
"""The columns of a ring are filled up with empty ones to a multiple of this: what processors read in one piece."""


class Ring(NamedTuple):
    """The last tokens of a sequence, as one layer step sees them. All is 0 where there is no token."""

    keys: torch.Tensor
    """(H, N, C), C the columns; float32 (float64 for a float64 model)."""
    fired: torch.Tensor
    """uint8 (H, W - 1, ceil(N / 16)): which pairs of neurons fire in each column, 8 pairs to a byte, the lowest bit
    first. Where a bit is 0, so are the keys: the kernels need not look."""
    values: torch.Tensor
    """(W - 1, D), of the dtype of the keys."""


def ring_shapes(
    window: int, H: int, N: int, D: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a ring, for a model of ``dtype``."""
    length = window - 1
    columns = -(-length // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
    return {
        "keys": (sum_dtype(dtype), (H, N, columns)),
        "fired": (torch.uint8, (H, length, -(-N // 16))),
        "values": (sum_dtype(dtype), (length, D)),
    }


def attend_window(
    q: torch.Tensor, v: torch.Tensor, ring: Ring, position: int, *, half_lives: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of the next tokens of a sequence to each other and to the ring, which stays as it is.

    All scores of the tokens are made at once: feed long texts in pieces.

    Args:
        q: (H, T, N), rotated by the absolute positions.
        v: (T, D).
        position: of the first of the tokens.
        half_lives: (H,) tokens in which what a head keeps of another halves.

    Returns:
        ``a`` (H, T, D) in the dtype of the ring.
    """
    length, T = ring.values.shape[0], q.shape[1]
    q, v = q.to(ring.keys.dtype), v.to(ring.keys.dtype)
    if length == 0:
        return q.new_zeros(*q.shape[:2], v.shape[1])
    tokens = torch.arange(position, position + T, device=q.device)
    columns = torch.arange(length, device=q.device)
    # In each column stands the newest token before this position whose number has that remainder.
    standing = position - 1 - (position - 1 - columns) % length  # (W - 1,)
    scores = torch.cat([(q @ ring.keys)[..., :length], q @ q.transpose(1, 2)], dim=2)  # (H, T, W - 1 + T)
    distance = tokens[:, None] - torch.cat([standing, tokens])
    scores = torch.where((distance >= 1) & (distance <= length), scores, 0)
    if half_lives is not None:
        scores = scores * torch.exp2(-(distance - 1).clamp(0, length) / half_lives[:, None, None]).to(scores.dtype)
    return scores @ torch.cat([ring.values, v])


def take_in(q: torch.Tensor, v: torch.Tensor, ring: Ring, position: int) -> None:
    """Puts the next tokens of a sequence, q (H, T, N) and v (T, D), into the ring, as far as they stay there."""
    length, T = ring.values.shape[0], q.shape[1]
    if length == 0:
        return
    newest = slice(-min(length, T), None)
    q, v = q[:, newest].to(ring.keys.dtype), v[newest].to(ring.keys.dtype)
    columns = torch.arange(position, position + T, device=q.device)[newest] % length
    ring.keys[:, :, columns] = q.transpose(1, 2)
    ring.values[columns] = v
    pairs = (q.unflatten(-1, (-1, 2)) != 0).any(-1)  # (H, T, N/2)
    missing = ring.fired.shape[-1] * 8 - pairs.shape[-1]
    octets = F.pad(pairs, (0, missing)).unflatten(-1, (-1, 8))
    bits = 2 ** torch.arange(8, device=q.device)
    ring.fired[:, columns] = (octets * bits).sum(-1).to(torch.uint8)
