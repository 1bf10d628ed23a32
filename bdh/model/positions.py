"""Where each token of a batch stands in its document: padding takes up no place, a document starts at 0."""

import torch


def token_positions(
    num_tokens: int,
    *,
    before: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        before: int64 (B,): tokens of the document that the row goes on with. None for a fresh text in each row.
        mask: bool (B, T): False for padding.
        starts: bool (B, T): a document starts there, or, if that is padding, with the next token.

    Returns:
        The position of each token, int64 (B, T), or (1, T) where all rows are alike; and the position of the token
        that comes next, (B,) or (1,).
    """
    if mask is None:
        seen = torch.arange(num_tokens, device=device)[None]
        total = torch.full((1,), num_tokens, device=device)
    else:
        seen = mask.long().cumsum(1) - mask.long()  # (B, T): tokens before each one
        total = mask.sum(1)
    if before is None:
        before = torch.zeros(1, dtype=torch.int64, device=device)
    if starts is None:
        return seen + before[:, None], total + before
    # The tokens before the newest start, which counts as position 0. They never grow fewer, so the largest is it.
    at_start = torch.where(starts, seen, -before[:, None]).cummax(1).values  # (B, T)
    return seen - at_start, total - at_start[:, -1]
