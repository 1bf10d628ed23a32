"""A text that is tokenized once, as one flat stream of integers on disk, and read from the map of a file.

    <cache_dir>/tokens/<key>/tokens.bin   training tokens, and after them the validation tokens
    <cache_dir>/tokens/<key>/meta.json    what they are

An entry appears complete, by the renaming of its folder, or not at all.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from bdh.data.config import DataConfig
from bdh.data.corpus import (
    Batch,
    Corpus,
    Loader,
    ProgressCallback,
    StepLoader,
    announce,
    batch_of_documents,
    check_long_enough,
    check_rows,
    left_out,
    starts_after,
    step_generator,
    take_windows,
)
from bdh.data.reading import Chunk, Skipped, Split, count_if_single, num_kept
from bdh.data.sources import Source, show_columns, training_source, validation_source
from bdh.locks import Lock
from bdh.storage import DiskFullError, atomic_dir, recover_dir
from bdh.tokenizer.plain import TextEncoder

_FORMAT = 2
_BATCH_BYTES = 1 << 22
_logger = logging.getLogger(__name__)


@dataclass
class TokenMeta:
    """What a stream of tokens holds."""

    dtype: str
    num_tokens: int
    num_train_tokens: int
    """The split: validation tokens follow these."""
    num_bytes: int
    """UTF-8 text of all tokens; the ends of documents add tokens, but no bytes."""
    num_train_bytes: int
    num_documents: int
    num_val_documents: int
    content_hash: str
    """Of the tokens and the split."""
    skipped: dict[str, int]
    """What was left out when the source was read, by kind; not what was when it was looked up, which each start does."""


def default_cache_dir() -> Path:
    return Path(os.environ.get("BDH_CACHE") or "~/.cache/bdh").expanduser()


class TokenCache:
    """One entry of the cache."""

    def __init__(self, cache_dir: str | None, key: Any):
        """
        Args:
            key: plain data that is another wherever the tokens may be others.
        """
        root = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.folder = root / "tokens" / hashlib.sha256(f"{_FORMAT}{json.dumps(key)}".encode()).hexdigest()[:32]

    def load(self) -> TokenMeta | None:
        """What the entry holds, or None if there is none. One that is not whole is reported, and is none."""
        recover_dir(self.folder)
        try:
            meta = TokenMeta(**json.loads((self.folder / "meta.json").read_text(encoding="utf-8")))
            size = (self.folder / "tokens.bin").stat().st_size
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            _logger.warning("the token cache %s cannot be read (%s): it is built again", self.folder, error)
            return None
        if size != meta.num_tokens * np.dtype(meta.dtype).itemsize:
            _logger.warning("the token cache %s is not complete: it is built again", self.folder)
            return None
        return meta

    def tokens(self, meta: TokenMeta) -> np.ndarray:
        """All tokens, as a read-only map of the file."""
        return np.memmap(self.folder / "tokens.bin", dtype=meta.dtype, mode="r", shape=(meta.num_tokens,))

    def build(self, write: Callable[["TokenWriter"], TokenMeta]) -> TokenMeta:
        """Makes the entry, unless another process has just done so.

        Args:
            write: writes the tokens. An error that it raises leaves nothing behind.

        Raises:
            DiskFullError: there is no room for it.
            OSError: the folder cannot be written.
        """
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with Lock(parent / f"{self.folder.name}.building", f"the token cache {self.folder}", wait=True):
                return self.load() or self._build(write)
        except DiskFullError as error:
            raise DiskFullError(f"{error}: make room, or choose another disk with data.cache_dir") from error
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno == errno.EROFS:
                raise PermissionError(
                    error.errno,
                    f"the token cache cannot be written ({os.strerror(error.errno or 0)}): choose another folder "
                    "with data.cache_dir or BDH_CACHE",
                    str(parent),
                ) from error
            raise

    def _build(self, write: Callable[["TokenWriter"], TokenMeta]) -> TokenMeta:
        with atomic_dir(self.folder) as temporary:
            with (temporary / "tokens.bin").open("wb") as file:
                meta = write(TokenWriter(file, temporary))
            (temporary / "meta.json").write_text(json.dumps(asdict(meta), indent=2), encoding="utf-8")
        return meta


class TokenWriter:
    """Tokenizes chunks, batch by batch, on all cores, and appends them to a file."""

    def __init__(self, file: IO[bytes], folder: Path):
        self._file = file
        self._folder = folder
        self.num_tokens = 0
        self.num_bytes = 0
        self.num_documents = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def append(
        self, chunks: Iterable[Chunk], encoder: TextEncoder, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Writes the tokens of the chunks, with ``<eos>`` after each document where the tokenizer has one.

        Args:
            progress: called with the bytes of text written so far by this writer.

        Returns:
            For each document that ended, the tokens and the bytes up to its end, counted from the writer's
            beginning: (documents, 2), a map of a file.
        """
        with (self._folder / "documents.bin").open("wb") as ends:
            for batch in _batches(chunks):
                arrays = encoder.encode_utf8([chunk.utf8 for chunk in batch])
                pieces: list[np.ndarray] = []
                positions = []
                for chunk, tokens in zip(batch, arrays, strict=True):
                    pieces.append(tokens)
                    self.num_tokens += len(tokens)
                    self.num_bytes += len(chunk.utf8)
                    if chunk.ends_document:
                        if encoder.eos_token_id is not None:
                            pieces.append(np.array([encoder.eos_token_id], dtype=encoder.dtype))
                            self.num_tokens += 1
                        positions.append((self.num_tokens, self.num_bytes))
                self.num_documents += len(positions)
                data = np.concatenate(pieces).tobytes()
                self._file.write(data)
                self._hash.update(data)
                ends.write(np.array(positions, dtype=np.int64).tobytes())
                if progress is not None:
                    progress(self.num_bytes)
        path = self._folder / "documents.bin"
        if path.stat().st_size == 0:
            return np.empty((0, 2), dtype=np.int64)
        return np.memmap(path, dtype=np.int64, mode="r").reshape(-1, 2)

    def append_encoded(self, tokens: np.ndarray, num_bytes: int) -> tuple[int, int]:
        """Writes the tokens of a document, which stand for so many bytes of text; returns all so far of both."""
        data = tokens.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.num_tokens += len(tokens)
        self.num_bytes += num_bytes
        self.num_documents += 1
        return self.num_tokens, self.num_bytes

    def finish(
        self, dtype: np.dtype, train_tokens: int, train_bytes: int, val_documents: int, skipped: dict[str, int]
    ) -> TokenMeta:
        (self._folder / "documents.bin").unlink(missing_ok=True)
        self._hash.update(f"{dtype} {train_tokens}".encode())
        return TokenMeta(
            dtype=dtype.name,
            num_tokens=self.num_tokens,
            num_train_tokens=train_tokens,
            num_bytes=self.num_bytes,
            num_train_bytes=train_bytes,
            num_documents=self.num_documents,
            num_val_documents=val_documents,
            content_hash=self._hash.hexdigest(),
            skipped=skipped,
        )


def _batches(chunks: Iterable[Chunk]) -> Iterable[list[Chunk]]:
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.utf8)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class TokenizedCorpus(Corpus):
    """A corpus whose tokens lie in the cache."""

    def __init__(
        self,
        config: DataConfig,
        sources: tuple[Source, Source | None],
        key: list[Any],
        write: Callable[[TokenWriter], TokenMeta],
    ):
        """
        Args:
            sources: what is trained on and what is validated on; None where that is a share of the first.
            key: what the tokens depend on besides the sources.
        """
        training, validation = sources
        identity = [training.identity, validation.identity if validation else config.val_fraction]
        settings = [config.text_column, config.encoding_errors]
        cache = TokenCache(config.cache_dir, [*key[:-1], *identity, *settings, key[-1]])
        found = cache.load()
        meta = found or cache.build(write)
        skipped = left_out(meta.skipped, training, validation)
        announce(config, skipped)
        self._cache, self._meta = cache, meta
        self.fingerprint = meta.content_hash
        self.facts = {
            "source": config.source,
            "streaming": False,
            "documents": meta.num_documents,
            "val_documents": meta.num_val_documents,
            "train_tokens": meta.num_train_tokens,
            "val_tokens": meta.num_tokens - meta.num_train_tokens,
            "train_bytes": meta.num_train_bytes,
            "val_bytes": meta.num_bytes - meta.num_train_bytes,
            "dtype": meta.dtype,
            "skipped": skipped.counts,
            "fingerprint": self.fingerprint,
            "cache": str(cache.folder),
            "was_cached": found is not None,
        }

    @cached_property
    def _streams(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens to train on, and those to validate on."""
        tokens = self._cache.tokens(self._meta)
        return tokens[: self._meta.num_train_tokens], tokens[self._meta.num_train_tokens :]


class TextCorpus(TokenizedCorpus):
    """A text that is tokenized as a whole before the training."""

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self.block_size = block_size
        self._eos_token_id = encoder.eos_token_id
        self._packs_documents = config.pack == "documents"
        validation = validation_source(config)
        training = training_source(config)
        show_columns(config, training, validation)
        super().__init__(
            config,
            (training, validation),
            [encoder.hash],
            lambda writer: _tokenize(config, training, validation, encoder, block_size, writer, progress),
        )
        check_long_enough(config, self.facts["train_tokens"], self.facts["val_tokens"], block_size)
        self.val_bytes_per_token = self.facts["val_bytes"] / max(1, self.facts["val_tokens"])

    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        own = check_rows(batch_size, rank, world_size)
        if carry_state:
            return self._continued_loader(batch_size, own, seed)
        text, length = self.train_tokens(), self.block_size + 1

        def windows(step: int) -> Batch:
            """Windows at random starts: where that of sequence i begins is the i-th draw of the step."""
            starts = step_generator(seed, 0, 0, 0, step).integers(len(text) - length + 1, size=batch_size)[own]
            tokens = torch.from_numpy(take_windows(text, starts, length))
            if not self._packs_documents or self._eos_token_id is None:
                return Batch(tokens)
            return batch_of_documents(tokens, starts_after(tokens, self._eos_token_id))

        return StepLoader("windows", seed, windows)

    def _continued_loader(self, batch_size: int, own: slice, seed: int) -> Loader:
        """Sequences that read on from step to step, so that a state can be carried.

        The text is a circle, which they enter at equal distances from a point that the seed chooses. When each has come
        to where the next one entered, every token was predicted once. A document starts after each <eos>, and at the
        beginning of the text.

        Raises:
            ValueError: they would read the same text at the same time.
        """
        T, text = self.block_size, self.train_tokens()
        distance = len(text) // batch_size
        if distance <= T:
            raise ValueError(
                f"train.carry_state lets {batch_size} rows read on through {len(text):,} training tokens, each "
                f"{distance:,} tokens behind the next: must be more than a block, {T}; a lower "
                "train.batch_size or train.block_size, or more text would do"
            )
        entries = (int(step_generator(seed, 0, 0, 0, 0).integers(len(text))) + np.arange(batch_size) * distance)[own]

        def next_blocks(step: int) -> Batch:
            index = (entries[:, None] + step * T + np.arange(-1, T + 1)) % len(text)  # with the token before
            tokens = torch.from_numpy(text[index].astype(np.int64))
            starts = torch.from_numpy(index == 0)
            if self._eos_token_id is not None:
                starts[:, 1:] |= tokens[:, :-1] == self._eos_token_id
            return batch_of_documents(tokens[:, 1:], starts[:, 1:])

        return StepLoader("continued windows", seed, next_blocks)

    def train_tokens(self) -> np.ndarray:
        return self._streams[0]

    def validation_tokens(self) -> np.ndarray:
        return self._streams[1]


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

    single_bytes = None if validation is not None else count_if_single(training.open)
    train_tokens = train_bytes = 0
    if single_bytes is not None:  # one document, or none
        marked = Split("bytes", num_kept(single_bytes, config.val_fraction)).marked(training.open(skipped))
        for is_held_out, group in groupby(marked, key=lambda each: each[1]):
            writer.append((chunk for chunk, *_ in group), encoder, advance)
            if not is_held_out:
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
        raise ValueError(f"data.source {config.source!r} holds no text{found}")
    check_long_enough(config, train_tokens, writer.num_tokens - train_tokens, block_size)
    return writer.finish(encoder.dtype, train_tokens, train_bytes, val_documents, skipped.counts)
