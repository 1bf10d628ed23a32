"""What a text leaves in the residual stream: one vector for all of it."""

import numpy as np
import torch


class Residuals:
    """Sums up v after the last layer step over the tokens of one sequence, while they are read.

    The sum is taken in float64, one token after the other, so that it has the same bits however the tokens are cut.

    Attributes:
        num_tokens: read so far.
        last: v of the last of them, float32 (D,).
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.last: np.ndarray | None = None
        self._sum: np.ndarray | None = None

    def add(self, v: torch.Tensor | np.ndarray) -> None:
        """The next tokens, (T, D)."""
        rows = v.detach().float().cpu().numpy() if isinstance(v, torch.Tensor) else v
        total = np.zeros(rows.shape[1]) if self._sum is None else self._sum.copy()
        for row in rows:
            total += row
        self._sum, self.last = total, np.array(rows[-1], np.float32)
        self.num_tokens += len(rows)

    @property
    def mean(self) -> np.ndarray:
        """Float32, (D,).

        Raises:
            ValueError: nothing has been read.
        """
        if self._sum is None:
            raise ValueError("no token has been read: there is no mean residual of none")
        return (self._sum / self.num_tokens).astype(np.float32)
