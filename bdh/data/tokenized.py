"""A corpus that is tokenized once. Its tokens are stored as one array, which is read through a memory map.

    <cache_dir>/tokens/<key>/tokens.bin   training tokens, followed by validation tokens
    <cache_dir>/tokens/<key>/meta.json    the description of the tokens

The folder of an entry is renamed into place when it is complete.
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

from bdh.data.batches import Loader, check_sequences, continued_loader, window_loader
from bdh.data.config import DataConfig
from bdh.data.corpus import Corpus, ProgressCallback, announce, check_long_enough, left_out
from bdh.data.reading import Chunk, Skipped, Split, num_kept
from bdh.data.sources import Source, show_columns, training_source, validation_source
from bdh.locks import Lock
from bdh.storage import DiskFullError, atomic_dir, recover_dir
from bdh.tokenizer.plain import TextEncoder, batches_of_bytes

_FORMAT = 2
_logger = logging.getLogger(__name__)


@dataclass
class TokenMeta:
    """The description of stored tokens."""

    dtype: str
    num_tokens: int
    num_train_tokens: int
    """The number of training tokens, which the validation tokens follow."""
    num_bytes: int
    """The size of the text in bytes of UTF-8. Ends of documents add tokens, but no bytes."""
    num_train_bytes: int
    num_documents: int
    num_val_documents: int
    content_hash: str
    """The hash of the tokens and of the split."""
    skipped: dict[str, int]
    """What was skipped when the source was read, by kind. It excludes what was skipped when the source was looked up,
    which happens at each start."""


def cache_root(cache_dir: str | None) -> Path:
    """Returns the folder of the token cache: ``cache_dir``, or else $BDH_CACHE, or else ``~/.cache/bdh``."""
    return Path(cache_dir or os.environ.get("BDH_CACHE") or "~/.cache/bdh").expanduser()


class TokenCache:
    """An entry of the token cache."""

    def __init__(self, cache_dir: str | None, key: Any):
        """Creates an entry, without reading or writing files.

        Args:
            cache_dir: the setting ``data.cache_dir``.
            key: plain data that differ whenever the tokens may differ.
        """
        self.folder = (
            cache_root(cache_dir) / "tokens" / hashlib.sha256(f"{_FORMAT}{json.dumps(key)}".encode()).hexdigest()[:32]
        )

    def load(self) -> TokenMeta | None:
        """Returns the description of the tokens, or None if there is no complete entry. Damaged entries are logged."""
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
        """Returns all tokens, as a read-only memory map of the file."""
        return np.memmap(self.folder / "tokens.bin", dtype=meta.dtype, mode="r", shape=(meta.num_tokens,))

    def build(self, write: Callable[["TokenWriter"], TokenMeta]) -> TokenMeta:
        """Builds the entry, unless another process has just built it.

        Args:
            write: writes the tokens. If it raises an exception, nothing is left on disk.

        Raises:
            DiskFullError: there is not enough space.
            OSError: the folder cannot be written.
        """
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with Lock(parent / f"{self.folder.name}.building", f"the token cache {self.folder}", wait=True):
                if (meta := self.load()) is None:
                    with atomic_dir(self.folder) as temporary:
                        with (temporary / "tokens.bin").open("wb") as file:
                            meta = write(TokenWriter(file, temporary / "documents.bin"))
                        (temporary / "meta.json").write_text(json.dumps(asdict(meta), indent=2), encoding="utf-8")
                return meta
        except DiskFullError as error:
            raise DiskFullError(
                f"{error}: free some space, or choose another disk with data.cache_dir or $BDH_CACHE"
            ) from error
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno == errno.EROFS:
                raise PermissionError(
                    error.errno,
                    f"the token cache cannot be written ({os.strerror(error.errno or 0)}): choose another folder "
                    "with data.cache_dir or BDH_CACHE",
                    str(parent),
                ) from error
            raise


class TokenWriter:
    """Appends tokens to the file of an entry, and counts them."""

    def __init__(self, file: IO[bytes], ends: Path):
        """Creates a writer.

        Args:
            file: the open file for the tokens.
            ends: the path of a temporary file for the ends of documents.
        """
        self._file, self._ends = file, ends
        self._hash = hashlib.blake2b(digest_size=16)
        self.num_tokens = self.num_bytes = self.num_documents = 0

    def write(self, tokens: np.ndarray, num_bytes: int, num_documents: int) -> None:
        """Writes the tokens of ``num_bytes`` bytes of text, in which ``num_documents`` documents end."""
        data = tokens.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.num_tokens += len(tokens)
        self.num_bytes += num_bytes
        self.num_documents += num_documents

    def append(self, chunks: Iterable[Chunk], encoder: TextEncoder, progress: Callable[[int], None]) -> np.ndarray:
        """Tokenizes chunks in batches, on all cores. Adds ``<eos>`` after each document if the tokenizer has it.

        Args:
            chunks: the chunks.
            encoder: encodes the text.
            progress: called with the number of bytes of text that this writer has written so far.

        Returns:
            The numbers of tokens and bytes up to the end of each document that ended, counted from the start of the
            writer: (documents, 2), a memory map of a file.
        """
        end = [] if encoder.eos_token_id is None else [np.array([encoder.eos_token_id], dtype=encoder.dtype)]
        with self._ends.open("wb") as ends:
            for batch in batches_of_bytes(chunks, lambda chunk: len(chunk.utf8)):
                pieces: list[np.ndarray] = []
                lengths = []
                for chunk, tokens in zip(batch, encoder.encode_utf8([chunk.utf8 for chunk in batch]), strict=True):
                    new = [tokens, *end] if chunk.ends_document else [tokens]
                    pieces += new
                    lengths.append((sum(map(len, new)), len(chunk.utf8)))
                positions = np.cumsum([(self.num_tokens, self.num_bytes), *lengths], axis=0)[1:]
                positions = positions[[chunk.ends_document for chunk in batch]]
                ends.write(positions.astype(np.int64).tobytes())
                self.write(np.concatenate(pieces), sum(size for _, size in lengths), len(positions))
                progress(self.num_bytes)
        if self._ends.stat().st_size == 0:
            return np.empty((0, 2), dtype=np.int64)
        return np.memmap(self._ends, dtype=np.int64, mode="r").reshape(-1, 2)

    def finish(
        self, dtype: np.dtype, train_tokens: int, train_bytes: int, val_documents: int, skipped: dict[str, int]
    ) -> TokenMeta:
        """Returns the description of the tokens, all of which must have been written."""
        self._ends.unlink(missing_ok=True)
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


class TokenizedCorpus(Corpus):
    """A corpus whose tokens are stored in the cache."""

    def __init__(
        self,
        config: DataConfig,
        sources: tuple[Source, Source | None],
        key: list[Any],
        write: Callable[[TokenWriter], TokenMeta],
    ):
        """Loads the tokens from the cache, or writes them to it.

        Args:
            config: the settings.
            sources: the training source and the validation source. The latter is None if validation text is split off
                the training source.
            key: what the tokens depend on besides the sources and the settings for reading them.
            write: writes the tokens, as for :meth:`TokenCache.build`.
        """
        training, validation = sources
        identity = [training.identity, validation.identity if validation else config.val_fraction]
        settings = [config.text_column, config.encoding_errors]
        self._cache = TokenCache(config.cache_dir, [*key[:-1], *identity, *settings, key[-1]])
        found = self._cache.load()
        self._meta = meta = found or self._cache.build(write)
        skipped = left_out(meta.skipped, training, validation)
        announce(config, skipped)
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
            "skipped": dict(skipped),
            "fingerprint": self.fingerprint,
            "cache": str(self._cache.folder),
            "was_cached": found is not None,
        }

    @cached_property
    def _streams(self) -> tuple[np.ndarray, np.ndarray]:
        """The training tokens and the validation tokens."""
        tokens = self._cache.tokens(self._meta)
        return tokens[: self._meta.num_train_tokens], tokens[self._meta.num_train_tokens :]


class TextCorpus(TokenizedCorpus):
    """A text that is tokenized as a whole before training."""

    def __init__(self, config: DataConfig, encoder: TextEncoder, block_size: int, progress: ProgressCallback):
        self.block_size = block_size
        self._eos_token_id, self._packs_documents = encoder.eos_token_id, config.pack == "documents"
        validation, training = validation_source(config), training_source(config)
        show_columns(config, training, validation)

        def write(writer: TokenWriter) -> TokenMeta:
            return _tokenize(config, training, validation, encoder, block_size, writer, progress)

        super().__init__(config, (training, validation), [encoder.hash], write)
        check_long_enough(config, self.facts["train_tokens"], self.facts["val_tokens"], block_size)
        self.val_bytes_per_token = self.facts["val_bytes"] / max(1, self.facts["val_tokens"])

    def train_loader(
        self, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, carry_state: bool = False
    ) -> Loader:
        own, end = check_sequences(batch_size, rank, world_size), self._eos_token_id
        if carry_state:
            return continued_loader(self.train_tokens(), self.block_size, batch_size, own, seed, end)
        end = end if self._packs_documents else None
        return window_loader(self.train_tokens(), self.block_size, batch_size, own, seed, end)

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

    single_bytes = None if validation is not None else _count_if_single(training.open())
    train_tokens = train_bytes = val_documents = 0
    if single_bytes is not None:  # one document, or none
        marked = Split("bytes", num_kept(single_bytes, config.val_fraction)).marked(training.open(skipped))
        for is_held_out, group in groupby(marked, key=lambda each: each[1]):
            writer.append((chunk for chunk, *_ in group), encoder, advance)
            if not is_held_out:
                train_tokens, train_bytes = writer.num_tokens, writer.num_bytes
    else:
        ends = writer.append(training.open(skipped), encoder, advance)
        kept = len(ends) if validation is not None else num_kept(len(ends), config.val_fraction)
        train_tokens, train_bytes = ends[kept - 1].tolist() if kept else (0, 0)
        del ends
        if validation is not None:
            writer.append(validation.open(skipped), encoder, advance)
        val_documents = writer.num_documents - kept
    if writer.num_bytes == 0:
        found = left_out(skipped, training, validation)
        raise ValueError(f"data.source {config.source!r} holds no text{found}")
    check_long_enough(config, train_tokens, writer.num_tokens - train_tokens, block_size)
    return writer.finish(encoder.dtype, train_tokens, train_bytes, val_documents, dict(skipped))


def _count_if_single(chunks: Iterable[Chunk]) -> int | None:
    """Returns the size of a text in bytes, or None if it has several documents. Reads no further than the second."""
    num_bytes, has_ended = 0, False
    for chunk in chunks:
        if has_ended:
            return None
        num_bytes += len(chunk.utf8)
        has_ended = chunk.ends_document
    return num_bytes
