"""A corpus that was tokenized as a whole, read from the map of a file."""

from itertools import groupby
from typing import Any

import numpy as np

from bdh.data.columns import show_columns
from bdh.data.config import DataConfig
from bdh.data.continued import ContinuedLoader
from bdh.data.corpus import Corpus, Loader, announce, check_long_enough, left_out
from bdh.data.parts import Skipped, describe
from bdh.data.progress import ProgressCallback
from bdh.data.source import Source, training_source, validation_source
from bdh.data.split import count_if_single, cut, num_kept
from bdh.data.token_cache import TokenCache, TokenMeta, TokenWriter
from bdh.data.windows import WindowLoader, check_rows
from bdh.tokenizer.encoding import TextEncoder


class MapCorpus(Corpus):
    """A corpus whose tokens lie in the cache; see :mod:`bdh.data.token_cache`."""

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self.block_size = block_size
        self._eos_token_id = encoder.eos_token_id
        self._packs_documents = config.pack == "documents"
        validation = validation_source(config)
        training = training_source(config)
        show_columns(config, training, validation)
        cache = TokenCache(config.cache_dir, _cache_key(config, training, validation, encoder))
        meta = cache.load()
        is_cached = meta is not None
        if meta is None:
            meta = cache.build(
                lambda writer: _tokenize(config, training, validation, encoder, block_size, writer, progress)
            )
        skipped = left_out(meta.skipped, training, validation)
        announce(config, skipped)
        check_long_enough(config, meta.num_train_tokens, meta.num_tokens - meta.num_train_tokens, block_size)
        tokens = cache.tokens(meta)
        self._train, self._validation = tokens[: meta.num_train_tokens], tokens[meta.num_train_tokens :]
        self.fingerprint = meta.content_hash
        self.val_bytes_per_token = (meta.num_bytes - meta.num_train_bytes) / max(1, len(self._validation))
        self.train_bytes_per_token = meta.num_train_bytes / max(1, len(self._train))
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
            "skipped": skipped.counts,
            "fingerprint": self.fingerprint,
            "cache": str(cache.folder),
            "was_cached": is_cached,
        }

    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        rows = check_rows(batch_size, rank, world_size)
        if carry_state:
            return ContinuedLoader(self._train, self.block_size, batch_size, rows, seed, self._eos_token_id)
        document_end = self._eos_token_id if self._packs_documents else None
        return WindowLoader(self._train, self.block_size, batch_size, rows, seed, document_end)

    def train_tokens(self) -> np.ndarray:
        return self._train

    def validation_tokens(self) -> np.ndarray:
        return self._validation


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
    if writer.num_bytes == 0:
        found = left_out(skipped.counts, training, validation)
        raise ValueError(f"data.source {config.source!r} holds no text" + describe(found))
    check_long_enough(config, train_tokens, writer.num_tokens - train_tokens, block_size)
    return writer.finish(encoder.dtype, train_tokens, train_bytes, val_documents, skipped.counts)
