"""What a loader gives for a training step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_NOT_COUNTED = -100  # PyTorch's and transformers' label of what the loss leaves out


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and which of them count.

    Attributes:
        tokens: int64 (rows, T + 1): each token but the last is an input, each but the first a target.
        is_target: bool (rows, T): whether the loss counts ``tokens[:, 1:]``; None where it counts all of them.
        starts: bool (rows, T): whether a document starts at ``tokens[:, :-1]``: it sees nothing of what is before,
            and stands at position 0. None where rows are read through, whatever they hold.
    """

    tokens: torch.Tensor
    is_target: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    @classmethod
    def stack(cls, batches: Sequence["Batch"]) -> "Batch":
        """The rows of several batches, in order. Where one marks nothing, all its tokens count, and none is a start."""
        return cls(
            torch.cat([batch.tokens for batch in batches]),
            _cat([batch.is_target for batch in batches], batches, fill=True),
            _cat([batch.starts for batch in batches], batches, fill=False),
        )

    @property
    def input_ids(self) -> torch.Tensor:
        """(rows, T)."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """(rows, T): the token behind each, or -100 where it does not count."""
        following = self.tokens[:, 1:]
        return following if self.is_target is None else following.masked_fill(~self.is_target, _NOT_COUNTED)

    @property
    def num_targets(self) -> int:
        """How many tokens the loss counts."""
        return self.tokens[:, 1:].numel() if self.is_target is None else int(self.is_target.sum())

    def split(self, num_rows: int) -> Iterator["Batch"]:
        """Batches of ``num_rows`` rows, in order."""
        for start in range(0, len(self.tokens), num_rows):
            yield self[start : start + num_rows]

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(*(None if part is None else part[rows] for part in self._parts()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "Batch":
        moved = (None if part is None else part.to(device, non_blocking=True) for part in self._parts())
        return Batch(*moved)  # type: ignore[arg-type]

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.tokens, self.is_target, self.starts


@dataclass(frozen=True)
class ValidationPart:
    """Rows to validate on, each of which is read from nothing.

    Attributes:
        name: of the source, where there are several; else "".
        bytes_per_token: UTF-8 text of a token that counts, in the mean.
    """

    name: str
    batch: Batch
    bytes_per_token: float


def _cat(parts: Sequence[torch.Tensor | None], batches: Sequence[Batch], *, fill: bool) -> torch.Tensor | None:
    if all(part is None for part in parts):
        return None
    return torch.cat(
        [
            torch.full_like(batch.input_ids, fill, dtype=torch.bool) if part is None else part
            for part, batch in zip(parts, batches, strict=True)
        ]
    )
