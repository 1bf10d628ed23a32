"""Rows that go on from step to step, so that a state can be carried over: each is a stream of its own."""

from typing import Any

import numpy as np
import torch

from bdh.data.batch import Batch
from bdh.data.documents import batch_of_documents
from bdh.data.parts import Part, from_plain, to_plain
from bdh.data.shuffled import ShuffledParts, encode_parts
from bdh.data.windows import check_state
from bdh.tokenizer.encoding import TextEncoder


class ContinuedLoader:
    """Rows that read on through a tokenized text: row i of the next step begins where row i of this one ended.

    The text is a circle, which the rows enter at equal distances from a point that the seed chooses. So where row i
    of step s begins depends on (seed, s, i) alone, not on how many processes share the rows, and when each row has
    come to where the next one entered, every token was predicted once. A document starts behind each
    ``document_end``, and at the beginning of the text.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        rows: slice,
        seed: int,
        document_end: int | None,
    ):
        """
        Raises:
            ValueError: the rows would read the same text at the same time.
        """
        distance = len(tokens) // batch_size
        if distance <= block_size:
            raise ValueError(
                f"train.carry_state lets {batch_size} rows read on through {len(tokens):,} training tokens, each "
                f"{distance:,} tokens behind the next: must be more than a block, {block_size}; a lower "
                "train.batch_size or train.block_size, or more text would do"
            )
        self._tokens = tokens
        self._block_size = block_size
        self._document_end = document_end
        self._seed = seed
        self._step = 0
        offset = int(np.random.Generator(np.random.Philox(key=seed)).integers(len(tokens)))
        self._entries = (offset + np.arange(batch_size) * distance)[rows]

    def next(self) -> Batch:
        """The rows of the next step; ``starts`` marks where the state and the position begin anew."""
        T = self._block_size
        first = self._entries + self._step * T
        index = (first[:, None] + np.arange(-1, T + 1)) % len(self._tokens)  # with the token before the row
        tokens = torch.from_numpy(self._tokens[index].astype(np.int64))
        starts = torch.from_numpy(index == 0)
        if self._document_end is not None:
            starts[:, 1:] |= tokens[:, :-1] == self._document_end
        self._step += 1
        return batch_of_documents(tokens[:, 1:], starts[:, 1:])

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "continued windows", "step": self._step, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another kind of loader, or of another seed.
        """
        check_state(state, "continued windows", seed=self._seed)
        self._step = state["step"]


class ContinuedStreamLoader:
    """Rows that read on through documents: each takes the next one of a shuffled supply when its own is used up.

    A document here is a part of the supply, at most 256 KiB of text. Which row takes which depends on the seed and the
    text alone: every process reads everything, keeps what all rows have waiting, and gives out its own rows.
    """

    def __init__(self, parts: ShuffledParts, encoder: TextEncoder, block_size: int, batch_size: int, rows: slice):
        self._parts = parts
        self._encoder = encoder
        self._block_size = block_size
        self._rows = rows
        # Of each row of the global batch, what is tokenized and not behind it yet.
        self._tokens = [np.empty(0, dtype=encoder.dtype) for _ in range(batch_size)]
        self._starts = [np.empty(0, dtype=bool) for _ in range(batch_size)]
        self._round: list[Part] = []  # drawn for rows that lack tokens, and not given to them yet

    @property
    def epoch(self) -> int:
        """How often the source has been read to its end."""
        return self._parts.epoch

    def next(self) -> Batch:
        """The rows of the next step; ``starts`` marks where the state and the position begin anew."""
        self._fill()
        T = self._block_size
        tokens = np.stack([row[: T + 1] for row in self._tokens[self._rows]]).astype(np.int64)
        starts = np.stack([row[: T + 1] for row in self._starts[self._rows]])
        # The last token of a row is the last target of this step and the first input of the next.
        self._tokens = [row[T:] for row in self._tokens]
        self._starts = [row[T:] for row in self._starts]
        return batch_of_documents(torch.from_numpy(tokens), torch.from_numpy(starts))

    def _fill(self) -> None:
        """Gives each row at least a block and a token, in rounds in which each row that lacks them draws once."""
        tokens, starts = [[row] for row in self._tokens], [[row] for row in self._starts]
        lengths = [len(row) for row in self._tokens]
        try:
            while lacking := [row for row, length in enumerate(lengths) if length <= self._block_size]:
                while len(self._round) < len(lacking):
                    self._round += self._parts.draw(1)
                encoded, is_start = encode_parts(self._round, self._encoder)
                self._round = []
                bounds = np.flatnonzero(is_start)[1:]
                pieces = zip(np.split(encoded, bounds), np.split(is_start, bounds), strict=True)
                for row, (piece, starts_of_piece) in zip(lacking, pieces, strict=False):
                    tokens[row].append(piece)
                    starts[row].append(starts_of_piece)
                    lengths[row] += len(piece)
        finally:  # text that cannot be read leaves the loader where it can be read on
            self._tokens = [np.concatenate(row) for row in tokens]
            self._starts = [np.concatenate(row) for row in starts]

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "continued stream",
            "tokens": torch.from_numpy(np.concatenate(self._tokens).astype(np.int64)),
            "starts": torch.from_numpy(np.concatenate(self._starts)),
            "lengths": [len(row) for row in self._tokens],
            "round": to_plain(self._round),
            **self._parts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another kind of loader, or of another seed.
        """
        check_state(state, "continued stream", seed=self._parts.seed)
        self._parts.load_state_dict(state)
        bounds = np.cumsum(state["lengths"])[:-1]
        self._tokens = np.split(state["tokens"].numpy().astype(self._encoder.dtype), bounds)
        self._starts = np.split(state["starts"].numpy(), bounds)
        self._round = from_plain(state.get("round", []))
