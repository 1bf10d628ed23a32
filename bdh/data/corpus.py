"""What training and evaluation get from the data: a tokenized text in two parts."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from bdh.data.batches import Batch, Loader, starts_after
from bdh.data.config import DataConfig
from bdh.data.reading import Skipped
from bdh.data.sources import Source
from bdh.words import counted

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with the step's name, the bytes of text done so far, and how many there are, or None if that is unknown."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationPart:
    """Sequences to validate on, each of which is read from nothing.

    Attributes:
        name: of the source, where there are several; else "".
        bytes_per_token: UTF-8 text of a token that counts, in the mean.
    """

    name: str
    batch: Batch
    bytes_per_token: float


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
    no_tokens_because: str = ""
    """Why it has no single text of tokens, where it has none."""

    def fingerprint_before(self, loader_state: dict[str, Any]) -> str:
        """As ``fingerprint``, of what a loader had read alone: the same where the text after it has been changed."""
        return self.fingerprint

    @abstractmethod
    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        """Sequences to train on.

        Args:
            batch_size: sequences of the global batch, of which each process gets ``batch_size / world_size`` in a row:
                together they get what one process alone would.
            carry_state: each sequence continues in the next step where it ended, and the batches say where a document
                starts.

        Raises:
            ValueError: the processes cannot share the sequences evenly, or there is too little text for so many.
        """

    def train_tokens(self) -> np.ndarray:
        """The training part, a read-only map of a file.

        Raises:
            ValueError: there is no such thing, as of a stream, a mix or conversations.
        """
        raise ValueError(self.no_tokens_because)

    def validation_tokens(self) -> np.ndarray:
        """The validation part; of a stream what was collected of it. Raises as :meth:`train_tokens`."""
        raise ValueError(self.no_tokens_because)

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        """The same windows each time, evenly spaced over the validation part.

        Returns:
            (n, block_size + 1) token ids, int64. n is ``num_windows``, or less where so many would overlap by
            more than the one token that is the last target of a window and the first input of the next.
        """
        windows = sliding_window_view(self.validation_tokens(), self.block_size + 1)
        last_start = len(windows) - 1
        starts = np.linspace(0, last_start, min(num_windows, last_start // self.block_size + 1)).astype(np.int64)
        return torch.from_numpy(windows[starts].astype(np.int64))

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """The sequences that training is measured on, the same each time; see :meth:`validation_windows`.

        Args:
            document_end: a token after which nothing is seen of what was before it.
        """
        tokens = self.validation_windows(num_windows)
        starts = None if document_end is None else starts_after(tokens, document_end)
        batch = Batch(tokens) if starts is None else Batch.of_documents(tokens, starts)
        return [ValidationPart("", batch, self.val_bytes_per_token)]


def check_long_enough(config: DataConfig, train_tokens: int, val_tokens: int, block_size: int) -> None:
    """Raises ValueError: a part is shorter than one sequence, and ``block_size`` is not 0."""
    parts = (
        ("training", train_tokens, "a lower train.block_size"),
        ("validation", val_tokens, "a higher data.val_fraction, data.val_source, or a lower train.block_size"),
    )
    for part, num_tokens, remedy in parts:
        if block_size > 0 and num_tokens < block_size + 1:
            raise ValueError(
                f"data.source {config.source!r}: the {part} part has {counted(num_tokens, 'token')}, but one sequence of "
                f"block_size {block_size} needs {block_size + 1}: more text or {remedy} would do"
            )


def left_out(while_reading: dict[str, int], *sources: Source | None) -> Skipped:
    """What was left out when sources were looked up, and when they were read."""
    skipped = Skipped(while_reading)
    for source in filter(None, sources):
        skipped.update(source.skipped)
    return skipped


def announce(config: DataConfig, skipped: Skipped) -> None:
    if skipped:
        _logger.warning("data.source %r%s", config.source, skipped)
