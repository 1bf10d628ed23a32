"""What a corpus offers to training and evaluation, and what both kinds of corpus share."""

import logging
from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
import torch

from bdh.data.batch import Batch, ValidationPart
from bdh.data.config import DataConfig
from bdh.data.documents import batch_of_documents, starts_behind
from bdh.data.parts import Skipped, describe
from bdh.data.source import Source
from bdh.data.windows import evenly_spaced_windows

_logger = logging.getLogger(__name__)


class Loader(Protocol):
    """An endless supply of training rows, whose position can be stored."""

    def prepare(self) -> None:
        """Reads what the next step needs, as :meth:`next` does unless it is done before, and raises the same errors.

        It takes nothing: the state before a call and after it are of the same place in the text.
        """
        ...

    def next(self) -> Batch:
        """The rows of the next step that this process gets.

        Raises:
            ValueError: the text cannot be read. The loader, and its state, can go on from there once it can.
            OSError: the same of a file.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position: numbers, strings, lists and tensors. Of several processes, those of all are stored as one.

        See :func:`bdh.data.streaming.join_states`.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Corpus(ABC):
    """A tokenized text in two parts, one to train on and one to validate on.

    ``facts`` is plain data about it; ``fingerprint`` is another where the data are others, and the same where the
    same data lie in another place; ``val_bytes_per_token`` turns a loss per token into one per byte of text.
    """

    facts: dict[str, Any]
    fingerprint: str
    val_bytes_per_token: float
    block_size: int
    is_chat: bool = False
    """Whether there are conversations in it."""

    def fingerprint_before(self, loader_state: dict[str, Any]) -> str:
        """As ``fingerprint``, of what a loader had read alone: the same where the text after it has been changed."""
        return self.fingerprint

    @abstractmethod
    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        """Rows to train on.

        Args:
            batch_size: rows of the global batch, of which each process gets ``batch_size / world_size`` in a row:
                together they get what one process alone would.
            carry_state: each row goes on in the next step where it ended, and the batches say where a document
                starts.

        Raises:
            ValueError: the processes cannot share the rows evenly, or there is too little text for so many rows.
        """

    @abstractmethod
    def train_tokens(self) -> np.ndarray:
        """The training part, a read-only map of a file.

        Raises:
            ValueError: the corpus is streaming, and so has no such thing.
        """

    @abstractmethod
    def validation_tokens(self) -> np.ndarray:
        """The validation part; of a streaming corpus what was collected of it."""

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        """The same windows each time, evenly spaced over the validation part.

        Returns:
            (n, block_size + 1) token ids, int64. n is ``num_windows``, or less where so many would overlap by
            more than the one token that is the last target of a window and the first input of the next.
        """
        return evenly_spaced_windows(self.validation_tokens(), self.block_size, num_windows)

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """The rows that training is measured on, the same each time; see :meth:`validation_windows`.

        Args:
            document_end: a token behind which nothing is seen of what was before.
        """
        batch = Batch(self.validation_windows(num_windows))
        if document_end is not None:
            batch = batch_of_documents(batch.tokens, starts_behind(batch.tokens, document_end))
        return [ValidationPart("", batch, self.val_bytes_per_token)]


def check_long_enough(config: DataConfig, train_tokens: int, val_tokens: int, block_size: int) -> None:
    """
    Raises:
        ValueError: a part is shorter than one row, and ``block_size`` is not 0.
    """
    parts = (
        ("training", train_tokens, "a lower train.block_size"),
        ("validation", val_tokens, "a higher data.val_fraction, data.val_source, or a lower train.block_size"),
    )
    for part, num_tokens, remedy in parts:
        if block_size > 0 and num_tokens < block_size + 1:
            raise ValueError(
                f"data.source {config.source!r}: the {part} part has {num_tokens} tokens, but one row of "
                f"block_size {block_size} needs {block_size + 1}: more text or {remedy} would do"
            )


def left_out(read: dict[str, int], *sources: Source | None) -> Skipped:
    """What was left out when sources were looked up, and when they were read."""
    skipped = Skipped(dict(read))
    for source in sources:
        if source is not None:
            skipped.include(source.skipped)
    return skipped


def announce(config: DataConfig, skipped: Skipped) -> None:
    if skipped.counts:
        _logger.warning("data.source %r%s", config.source, describe(skipped))
