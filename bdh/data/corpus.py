"""A corpus that is ready to train on: its tokens, its split, its loader."""

import logging
from abc import ABC, abstractmethod
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from bdh.data.config import DataConfig
from bdh.data.parts import Skipped
from bdh.data.progress import ProgressCallback, no_progress
from bdh.data.source import Source, training_source, validation_source
from bdh.data.split import count_if_single, cut, num_kept
from bdh.data.token_cache import TokenCache, TokenMeta, TokenWriter
from bdh.data.windows import WindowLoader, check_rows, evenly_spaced_windows
from bdh.tokenizer.encoding import TextEncoder

_logger = logging.getLogger(__name__)


class Loader(Protocol):
    """An endless supply of training rows, whose position can be stored."""

    def next(self) -> torch.Tensor:
        """(rows, block_size + 1) token ids, int64."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position: numbers, strings, lists and tensors."""
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

    @abstractmethod
    def train_loader(self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Loader:
        """Rows to train on.

        Args:
            batch_size: rows of the global batch, of which each process gets ``batch_size / world_size`` in a row:
                together they get what one process alone would.

        Raises:
            ValueError: the processes cannot share the rows evenly.
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


def prepare_corpus(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    *,
    progress: ProgressCallback | None = None,
) -> Corpus:
    """Reads, tokenizes, splits and caches a text; or, with ``streaming``, gets ready to do so while training.

    Args:
        block_size: tokens that a row predicts.
        progress: see :data:`bdh.data.progress.ProgressCallback`.

    Raises:
        FileNotFoundError: a file is missing, or the hub does not give the data set.
        ValueError: settings that do not go together, text that cannot be read, or too little of it. Nothing has
            been written then.
        OSError: the cache cannot be written.
    """
    encoder = TextEncoder(tokenizer)
    if config.streaming:
        from bdh.data.streaming import StreamingCorpus

        return StreamingCorpus(config, encoder, block_size, progress or no_progress)
    return MapCorpus(config, encoder, block_size, progress or no_progress)


class MapCorpus(Corpus):
    """A corpus that was tokenized as a whole, in a map of a file; see :mod:`bdh.data.token_cache`."""

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self.block_size = block_size
        validation = validation_source(config)
        training = training_source(config)
        cache = TokenCache(config.cache_dir, _cache_key(config, training, validation, encoder))
        meta = cache.load()
        is_cached = meta is not None
        if meta is None:
            meta = cache.build(
                lambda writer: _tokenize(config, training, validation, encoder, block_size, writer, progress)
            )
        check_long_enough(config, meta.num_train_tokens, meta.num_tokens - meta.num_train_tokens, block_size)
        tokens = cache.tokens(meta)
        self._train, self._validation = tokens[: meta.num_train_tokens], tokens[meta.num_train_tokens :]
        self.fingerprint = meta.content_hash
        self.val_bytes_per_token = (meta.num_bytes - meta.num_train_bytes) / len(self._validation)
        self.train_bytes_per_token = meta.num_train_bytes / len(self._train)
        self.facts = {
            "source": config.source,
            "streaming": False,
            "documents": meta.num_documents,
            "val_documents": meta.num_val_documents,
            "train_tokens": len(self._train),
            "val_tokens": len(self._validation),
            "train_bytes": meta.num_train_bytes,
            "val_bytes": meta.num_bytes - meta.num_train_bytes,
            "dtype": meta.dtype,
            "skipped": meta.skipped,
            "fingerprint": self.fingerprint,
            "cache": str(cache.folder),
            "was_cached": is_cached,
        }

    def train_loader(self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> WindowLoader:
        rows = check_rows(batch_size, rank, world_size)
        return WindowLoader(self._train, self.block_size, batch_size, rows, seed)

    def train_tokens(self) -> np.ndarray:
        return self._train

    def validation_tokens(self) -> np.ndarray:
        return self._validation


def check_long_enough(config: DataConfig, train_tokens: int, val_tokens: int, block_size: int) -> None:
    """
    Raises:
        ValueError: a part is shorter than one row.
    """
    parts = (
        ("training", train_tokens, "a lower train.block_size"),
        ("validation", val_tokens, "a higher data.val_fraction, data.val_source, or a lower train.block_size"),
    )
    for part, num_tokens, remedy in parts:
        if num_tokens < block_size + 1:
            raise ValueError(
                f"data.source {config.source!r}: the {part} part has {num_tokens} tokens, but one row of "
                f"block_size {block_size} needs {block_size + 1}: more text or {remedy} would do"
            )


def _cache_key(config: DataConfig, training: Source, validation: Source | None, encoder: TextEncoder) -> list[Any]:
    return [
        training.identity,
        validation.identity if validation else config.val_fraction,
        config.text_column,
        config.encoding_errors,
        encoder.hash,
    ]


def _tokenize(
    config: DataConfig,
    training: Source,
    validation: Source | None,
    encoder: TextEncoder,
    block_size: int,
    writer: TokenWriter,
    progress: ProgressCallback,
) -> TokenMeta:
    skipped = Skipped()
    total = training.num_bytes
    if validation is not None:
        total = None if total is None or validation.num_bytes is None else total + validation.num_bytes

    def advance(num_bytes: int) -> None:
        progress("tokenizing", num_bytes, total)

    single_bytes = None if validation is not None else count_if_single(training)
    train_tokens = train_bytes = 0
    if single_bytes is not None:  # one document, or none
        parts = cut(iter(training.open(skipped)), num_kept(single_bytes, config.val_fraction))
        for is_behind, group in groupby(parts, key=lambda pair: pair[1]):
            writer.append((part for part, _ in group), encoder, advance)
            if not is_behind:
                train_tokens, train_bytes = writer.num_tokens, writer.num_bytes
        val_documents = 0
    elif validation is not None:
        writer.append(training.open(skipped), encoder, advance)
        train_tokens, train_bytes, documents = writer.num_tokens, writer.num_bytes, writer.num_documents
        writer.append(validation.open(skipped), encoder, advance)
        val_documents = writer.num_documents - documents
    else:
        ends = writer.append(training.open(skipped), encoder, advance)
        kept = num_kept(len(ends), config.val_fraction)
        train_tokens, train_bytes = (int(number) for number in ends[kept - 1])
        val_documents = len(ends) - kept
        del ends
    for source in (training, validation):
        for what, number in source.skipped.counts.items() if source else ():
            skipped.add(what, number)
    if writer.num_bytes == 0:
        raise ValueError(f"data.source {config.source!r} holds no text" + describe(skipped))
    announce(config, skipped)
    check_long_enough(config, train_tokens, writer.num_tokens - train_tokens, block_size)
    return writer.finish(encoder, train_tokens, train_bytes, val_documents, skipped.counts)


def announce(config: DataConfig, skipped: Skipped) -> None:
    if skipped.counts:
        _logger.warning("data.source %r%s", config.source, describe(skipped))


def describe(skipped: Skipped) -> str:
    if not skipped.counts:
        return ""
    return ": left out " + ", ".join(f"{what} ({number:,})" for what, number in skipped.counts.items())
