"""Training straight from a source: read, shuffled, tokenized and packed as it goes, nothing on disk.

Memory holds the shuffle buffer (``shuffle_buffer_documents`` parts of documents, 64 MiB of text at most), the
tokens of about 1 MiB of text, the collected validation tokens, and what ``datasets`` reads at a time.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from bdh.data.batch import Batch
from bdh.data.columns import show_columns
from bdh.data.config import DataConfig
from bdh.data.continued import ContinuedStreamLoader
from bdh.data.corpus import Corpus, Loader, announce, check_long_enough, left_out
from bdh.data.documents import batch_of_documents
from bdh.data.parts import Part, describe
from bdh.data.progress import ProgressCallback
from bdh.data.readers import State
from bdh.data.shuffled import ShuffledParts, encode_parts
from bdh.data.source import training_source, validation_source
from bdh.data.split import stream_split
from bdh.data.windows import check_rows, check_state, take_windows
from bdh.tokenizer.encoding import TextEncoder

_ENCODED_BYTES = 1 << 20  # of text that is tokenized at a time
_MAX_READ_BYTES = 1 << 28  # of text in search of validation tokens


class StreamingCorpus(Corpus):
    """A corpus that is read while training.

    Without a validation source of its own, every ``round(1 / val_fraction)``-th part of it is held out: a part is
    a document, or 256 KiB of a longer one. (A source of not more parts is split as it is without streaming, see
    :func:`bdh.data.split.stream_split`.) Of the held-out text, the first ``val_tokens`` tokens are kept to
    validate on; the search for them ends after 256 MiB of text.
    """

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self.block_size = block_size
        self._config = config
        self._encoder = encoder
        validation = validation_source(config)
        self._source = training_source(config)
        show_columns(config, self._source, validation)
        self._split = None if validation is not None else stream_split(self._source, config.val_fraction)

        skipped = left_out({}, self._source, validation)
        collector = _Collector(config, encoder, block_size, progress)
        if validation is not None:
            collector.read(((part, True) for part in validation.open(skipped)), needs_training=False)
            collector.read(((part, False) for part in self._source.open(skipped)), needs_validation=False)
        else:
            assert self._split is not None
            marked = self._split.marked(self._source.open(skipped))
            collector.read((part, held_out) for part, held_out, _ in marked)
        if collector.num_read_bytes == 0:
            raise ValueError(f"data.source {config.source!r} holds no text" + describe(skipped))
        announce(config, skipped)
        self._validation = collector.tokens()
        check_long_enough(config, collector.num_train_tokens, len(self._validation), block_size)

        self.val_bytes_per_token = collector.num_val_bytes / max(1, len(self._validation))
        identity: list[Any] = [validation.fingerprint() if validation else config.val_fraction]
        if self._split is not None and self._split.unit != "parts":
            identity.append(self._split)
        self._identity = [*identity, config.text_column, config.encoding_errors, encoder.hash]
        self.fingerprint = self._fingerprint(None)
        self.facts = {
            "source": config.source,
            "streaming": True,
            "documents": None,
            "train_tokens": None,
            "val_tokens": len(self._validation),
            "val_bytes": collector.num_val_bytes,
            "dtype": encoder.dtype.name,
            "skipped": skipped.counts,
            "fingerprint": self.fingerprint,
        }

    def fingerprint_before(self, loader_state: dict[str, Any]) -> str:
        return self._fingerprint(loader_state["reader"])

    def _fingerprint(self, until: State | None) -> str:
        identity = [self._source.fingerprint(until), *self._identity]
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]

    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        rows = check_rows(batch_size, rank, world_size)
        parts = ShuffledParts(self._source, self._split, self._config.shuffle_buffer_documents, seed)
        if carry_state:
            return ContinuedStreamLoader(parts, self._encoder, self.block_size, batch_size, rows)
        apart = self._config.pack == "documents"
        return StreamLoader(parts, self._encoder, self.block_size, batch_size, rows, documents_apart=apart)

    def train_tokens(self) -> np.ndarray:
        raise ValueError("a streaming corpus is never tokenized as a whole: set data.streaming=false")

    def validation_tokens(self) -> np.ndarray:
        return self._validation


class StreamLoader:
    """Packs the tokens of shuffled parts into rows.

    Each row is ``block_size + 1`` tokens, and its last one is also the first of the next row: every token is
    predicted once. Each process reads everything and takes its rows. With ``documents_apart`` the batches say where
    documents start, and those first tokens are not predicted.
    """

    def __init__(
        self,
        parts: ShuffledParts,
        encoder: TextEncoder,
        block_size: int,
        batch_size: int,
        rows: slice,
        *,
        documents_apart: bool = False,
    ):
        self._parts = parts
        self._encoder = encoder
        self._block_size = block_size
        self._batch_size = batch_size
        self._rows = rows
        self._documents_apart = documents_apart
        self._tokens = np.empty(0, dtype=encoder.dtype)  # tokenized, and not yet behind us
        self._starts = np.empty(0, dtype=bool)  # of these, the first tokens of documents

    @property
    def epoch(self) -> int:
        """How often the source has been read to its end."""
        return self._parts.epoch

    def next(self) -> Batch:
        """The rows of the next step."""
        num_new = self._batch_size * self._block_size
        pieces, starts, num_tokens = [self._tokens], [self._starts], len(self._tokens)
        try:
            while num_tokens < num_new + 1:
                # A token is a byte at least, so this is never much too much: a small source is not read far ahead.
                missing = num_new + 1 - num_tokens
                encoded, is_start = encode_parts(self._parts.draw(min(missing, _ENCODED_BYTES)), self._encoder)
                pieces.append(encoded)
                starts.append(is_start)
                num_tokens += len(encoded)
        finally:  # text that cannot be read leaves the loader where it can be read on
            self._tokens, self._starts = np.concatenate(pieces), np.concatenate(starts)
        all_tokens, all_starts = self._tokens, self._starts
        self._tokens, self._starts = all_tokens[num_new:].copy(), all_starts[num_new:].copy()
        first = np.arange(self._batch_size)[self._rows] * self._block_size
        tokens = torch.from_numpy(take_windows(all_tokens, first, self._block_size + 1))
        if not self._documents_apart:
            return Batch(tokens)
        marks = torch.from_numpy(take_windows(all_starts, first, self._block_size + 1)).bool()
        return batch_of_documents(tokens, marks)

    def state_dict(self) -> dict[str, Any]:
        tokens = torch.from_numpy(self._tokens.astype(np.int64))
        starts = torch.from_numpy(self._starts.copy())
        return {"kind": "stream", "tokens": tokens, "starts": starts, **self._parts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another kind of loader, or of another seed.
        """
        check_state(state, "stream", seed=self._parts.seed)
        self._parts.load_state_dict(state)
        self._tokens = state["tokens"].numpy().astype(self._encoder.dtype)
        # Older checkpoints stored no starts, and had no use for them.
        self._starts = state["starts"].numpy() if "starts" in state else np.zeros(len(self._tokens), dtype=bool)


class _Collector:
    """Reads a source until there are validation tokens, and enough to train on for a single row."""

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self._max_tokens = max(config.val_tokens, block_size + 1)
        self._block_size = block_size
        self._encoder = encoder
        self._progress = progress
        self._pieces: list[np.ndarray] = []
        self._num_val_tokens = 0
        self.num_val_bytes = 0
        self.num_train_tokens = 0
        self.num_read_bytes = 0

    def read(
        self, parts: Iterable[tuple[Part, bool]], needs_training: bool = True, needs_validation: bool = True
    ) -> None:
        """
        Args:
            parts: each with whether it is held out.
        """
        for part, held_out in parts:
            self.num_read_bytes += len(part.utf8)
            if held_out and self._num_val_tokens < self._max_tokens:
                self._keep(part)
            elif not held_out and self.num_train_tokens <= self._block_size:
                self.num_train_tokens += len(encode_parts([part], self._encoder)[0])
            self._progress("collecting validation text", self.num_read_bytes, None)
            lacks_training = needs_training and self.num_train_tokens <= self._block_size
            wanted = self._block_size + 1 if self.num_read_bytes > _MAX_READ_BYTES else self._max_tokens
            lacks_validation = needs_validation and self._num_val_tokens < wanted
            if not lacks_training and not lacks_validation:
                return

    def _keep(self, part: Part) -> None:
        tokens, _ = encode_parts([part], self._encoder)
        self._pieces.append(tokens)
        self._num_val_tokens += len(tokens)
        self.num_val_bytes += len(part.utf8)

    def tokens(self) -> np.ndarray:
        return np.concatenate(self._pieces) if self._pieces else np.empty(0, dtype=self._encoder.dtype)
