"""The interface of a corpus: a tokenized text with a training and a validation part."""

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
"""Called with the name of the stage, the bytes of text processed, and the total, or None if it is unknown."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationPart:
    """Sequences for validation, each of which is read with an empty state.

    Attributes:
        name: the name of the source, or "" if there is only one.
        bytes_per_token: the mean number of UTF-8 bytes of a token that counts.
    """

    name: str
    batch: Batch
    bytes_per_token: float


class Corpus(ABC):
    """A tokenized text with a training and a validation part.

    ``facts`` describes it as plain data. ``fingerprint`` changes with the data, but not with their location.
    ``val_bytes_per_token`` converts a loss per token to one per byte of text.
    """

    facts: dict[str, Any]
    fingerprint: str
    val_bytes_per_token: float
    block_size: int
    is_chat: bool = False
    """Whether it contains conversations."""
    no_tokens_because: str = ""
    """Why it has no single array of tokens; empty if it has one."""

    def fingerprint_before(self, loader_state: dict[str, Any]) -> str:
        """Returns the fingerprint of the text that a loader had read. It does not depend on the text after it."""
        return self.fingerprint

    @abstractmethod
    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        """Returns a loader of training sequences.

        Args:
            batch_size: the number of sequences in the global batch. Each process gets ``batch_size / world_size``
                consecutive ones; together they get the sequences that a single process would.
            seed: the seed of the draws.
            rank: the rank of this process.
            world_size: the number of processes.
            carry_state: whether each sequence continues in the next step where it ended. Batches then mark the starts
                of documents.

        Raises:
            ValueError: the sequences cannot be divided evenly among the processes, or the text is too short for so
                many.
        """

    def train_tokens(self) -> np.ndarray:
        """Returns the tokens of the training part, as a read-only memory map of a file.

        Raises:
            ValueError: the corpus has no single array of tokens: a stream, a mix or conversations.
        """
        raise ValueError(self.no_tokens_because)

    def validation_tokens(self) -> np.ndarray:
        """Returns the tokens of the validation part; of a stream, those collected. Raises as :meth:`train_tokens`."""
        raise ValueError(self.no_tokens_because)

    def validation_windows(self, num_windows: int) -> torch.Tensor:
        """Returns windows that are evenly spaced over the validation part, the same in each call.

        Returns:
            Token ids, int64 (n, block_size + 1). n is ``num_windows``, or less if that many would overlap by more than
            one token, the last target of a window and the first input of the next.
        """
        windows = sliding_window_view(self.validation_tokens(), self.block_size + 1)
        last_start = len(windows) - 1
        starts = np.linspace(0, last_start, min(num_windows, last_start // self.block_size + 1)).astype(np.int64)
        return torch.from_numpy(windows[starts].astype(np.int64))

    def validation_parts(self, num_windows: int, document_end: int | None = None) -> list[ValidationPart]:
        """Returns the sequences on which training is evaluated, the same in each call.

        Args:
            num_windows: as for :meth:`validation_windows`.
            document_end: the token that ends a document, if tokens must not attend across documents.
        """
        tokens = self.validation_windows(num_windows)
        starts = None if document_end is None else starts_after(tokens, document_end)
        batch = Batch(tokens) if starts is None else Batch.of_documents(tokens, starts)
        return [ValidationPart("", batch, self.val_bytes_per_token)]


def check_long_enough(config: DataConfig, train_tokens: int, val_tokens: int, block_size: int) -> None:
    """Raises ``ValueError`` if a part is shorter than one sequence, unless ``block_size`` is 0."""
    parts = (
        ("training", train_tokens, "a lower train.block_size"),
        ("validation", val_tokens, "a higher data.val_fraction, data.val_source, or a lower train.block_size"),
    )
    for part, num_tokens, remedy in parts:
        if block_size > 0 and num_tokens < block_size + 1:
            raise ValueError(
                f"data.source {config.source!r}: the {part} part has {counted(num_tokens, 'token')}, but one sequence of "
                f"block_size {block_size} needs {block_size + 1}: use more text, or {remedy}"
            )


def left_out(while_reading: dict[str, int], *sources: Source | None) -> Skipped:
    """Returns what was skipped when sources were looked up and when they were read."""
    skipped = Skipped(while_reading)
    for source in filter(None, sources):
        skipped.update(source.skipped)
    return skipped


def announce(config: DataConfig, skipped: Skipped) -> None:
    if skipped:
        _logger.warning("data.source %r%s", config.source, skipped)
