"""Cross-entropy over a vocabulary, without logits of all tokens at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    *,
    tokens_per_chunk: int,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy in nats, over chunks of tokens whose logits are recomputed for the backward pass.

    At most ``tokens_per_chunk`` x V logits exist at any time, in the forward and in the backward pass.

    Args:
        hidden: (tokens, D), the inputs of the head.
        head: maps (tokens, D) to logits (tokens, V).
        targets: (tokens,) int64; :data:`IGNORE_INDEX` is not counted.
        num_items: divides the sum instead of the number of counted targets.
    """
    total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    for hidden_chunk, target_chunk in zip(hidden.split(tokens_per_chunk), targets.split(tokens_per_chunk), strict=True):
        total = total + checkpoint(
            _summed_loss, hidden_chunk, target_chunk, head, use_reentrant=False, preserve_rng_state=False
        )
    return total / _divisor(targets, num_items)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean cross-entropy in nats of ``logits`` (tokens, V) against ``targets`` (tokens,)."""
    total = F.cross_entropy(_widened(logits), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / _divisor(targets, num_items)


def _summed_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    return F.cross_entropy(_widened(head(hidden)), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _widened(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _divisor(targets: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor | int:
    return (targets != IGNORE_INDEX).sum() if num_items is None else num_items
