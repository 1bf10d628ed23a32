"""What a token still sees of the ones before it: nothing beyond its document's start, and less with the distance.

Both are weights on the recurrence of :mod:`bdh.ops.attention`. Before token t the state is cleared where t starts a
document, and behind it

    S_{t+1} = g S_t + k_t v_t^T        g = 2^(-1 / half-life), one for each head

so token s < t of the same document reaches token t with the weight g^(t - 1 - s): the nearest with 1. Such a fixed
decay for each head is that of RetNet (arXiv 2307.08621, eq. 5), and the multiplicative relative of ALiBi's bias
(arXiv 2108.12409). Weights are powers of differences of positions, never quotients of powers, so that none overflows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Reach(NamedTuple):
    """The three facts that weigh the past of T tokens. None leaves a fact out.

    Attributes:
        starts: bool (B, T): the first tokens of documents.
        half_lives: (H,): tokens after which what a head keeps has halved; inf never forgets.
        mask: bool (B, T): False for padding, which is no token to count in the distance.
    """

    starts: torch.Tensor | None = None
    half_lives: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def split(self, num_tokens: int, chunk_size: int) -> Iterator["Reach"]:
        """The reach of each chunk, where the state is handed from chunk to chunk."""
        for start in range(0, num_tokens, chunk_size):
            columns = slice(start, start + chunk_size)
            starts, mask = (None if part is None else part[:, columns] for part in (self.starts, self.mask))
            yield Reach(starts, self.half_lives, mask)

    def part(self, rows: slice, head: int, columns: slice) -> "Reach":
        """That of one head, some sequences and some tokens, to which a state is handed."""
        starts, mask = (None if part is None else part[rows, columns] for part in (self.starts, self.mask))
        return Reach(starts, None if self.half_lives is None else self.half_lives[head : head + 1], mask)

    def weights(self, num_tokens: int, device: torch.device) -> "Weights":
        """The weights among ``num_tokens`` tokens."""
        T = num_tokens
        clock = torch.arange(T, device=device)[None]  # tokens before each one
        total = torch.full((1,), T, device=device)
        if self.mask is not None and self.half_lives is not None:
            clock = self.mask.long().cumsum(1) - self.mask.long()
            total = self.mask.sum(1)
        clock, total = clock[:, None], total[:, None, None]  # (B or 1, 1, T), (B or 1, 1, 1)
        is_before = torch.ones(T, T, dtype=torch.bool, device=device).tril(-1)
        between = self._decayed(clock[..., :, None] - clock[..., None, :] - 1) * is_before
        to_end = self._decayed(total - clock - 1)
        from_state, through = self._decayed(clock), self._decayed(total)
        if self.starts is not None:
            document = self.starts.long().cumsum(1)[:, None]  # (B, 1, T): 0 goes on from the state
            between = between * (document[..., :, None] == document[..., None, :])
            to_end = to_end * (document == document[..., -1:])
            from_state = from_state * (document == 0)
            through = through * (document[..., -1:] == 0)
        return Weights(between, from_state[..., None], to_end[..., None], through[..., None])

    def _decayed(self, distance: torch.Tensor) -> torch.Tensor:
        """The weights at distances (..., H or 1, T) or (..., H or 1, T, T)."""
        if self.half_lives is None:
            return torch.ones_like(distance, dtype=torch.float32)
        half_lives = self.half_lives.view(-1, *[1] * (distance.ndim - 2))
        # Distances below 0 are those of later tokens and of padding, which count for nothing.
        return torch.exp2(-distance.clamp_min(0) / half_lives)


class Weights(NamedTuple):
    """What tokens count for each other, and for the states before and behind them; 1 where nothing is lost.

    B and H may be 1, where rows or heads are alike.
    """

    between: torch.Tensor  # (B, H, T, T): of each earlier token for each token
    from_state: torch.Tensor  # (B, H, T, 1): of the state before for each token
    to_end: torch.Tensor  # (B, H, T, 1): of each token in the state behind
    through: torch.Tensor  # (B, H, 1, 1): of the state before in the state behind


def weighted(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``values`` times ``weights``, and 0 for a weight of 0, whatever the value: not even infinity passes."""
    return torch.where(weights == 0, 0.0, values * weights.to(values.dtype))
