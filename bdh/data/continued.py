"""Rows that go on from step to step, so that a state can be carried over: each is a stream of its own."""

from typing import Any

import numpy as np
import torch

from bdh.data.batch import Batch
from bdh.data.documents import batch_of_documents
from bdh.data.windows import check_state


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

    def prepare(self) -> None:
        pass

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
