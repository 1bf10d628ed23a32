"""The token cache: a corpus tokenized once, as one flat stream of integers on disk.

    <cache_dir>/tokens/<key>/tokens.bin   training tokens, and behind them the validation tokens
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
from pathlib import Path
from typing import IO, Any

import numpy as np

from bdh.data.parts import Part
from bdh.locks import Lock
from bdh.storage import DiskFullError, atomic_dir, recover_dir
from bdh.tokenizer.encoding import TextEncoder

_FORMAT = 2
_BATCH_BYTES = 1 << 22
_logger = logging.getLogger(__name__)


@dataclass
class TokenMeta:
    """What a stream of tokens holds."""

    dtype: str
    num_tokens: int
    num_train_tokens: int
    """The split: validation tokens follow behind these."""
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
    """Tokenizes parts, batch by batch, on all cores, and appends them to a file."""

    def __init__(self, file: IO[bytes], folder: Path):
        self._file = file
        self._folder = folder
        self.num_tokens = 0
        self.num_bytes = 0
        self.num_documents = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def append(
        self, parts: Iterable[Part], encoder: TextEncoder, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Writes the tokens of the parts, with ``<eos>`` behind each document where the tokenizer has one.

        Args:
            progress: called with the bytes of text written so far by this writer.

        Returns:
            For each document that ended, the tokens and the bytes up to its end, counted from the writer's
            beginning: (documents, 2), a map of a file.
        """
        with (self._folder / "documents.bin").open("wb") as ends:
            for batch in _batches(parts):
                arrays = encoder.encode_utf8([part.utf8 for part in batch])
                pieces: list[np.ndarray] = []
                positions = []
                for part, tokens in zip(batch, arrays, strict=True):
                    pieces.append(tokens)
                    self.num_tokens += len(tokens)
                    self.num_bytes += len(part.utf8)
                    if part.ends_document:
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


def _batches(parts: Iterable[Part]) -> Iterable[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.utf8)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
