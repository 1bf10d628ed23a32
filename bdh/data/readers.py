"""Readers: each gives the parts of one shard (a file, a table, a list of documents) and knows where it is.

A reader's ``state()`` is plain data; a new reader made with it goes on behind the last part that was given, also
where the one before ended with an error.
"""

import gzip
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from bdh.data.parts import (
    EMPTY_FILES,
    NO_TEXT,
    PART_BYTES,
    Part,
    Skipped,
    cut_position,
    from_plain,
    split_document,
    to_plain,
    to_utf8,
)
from bdh.text_files import MARK_BYTES, mark_length

COMPRESSED = (".gz", ".zst")
_COMPRESSED_CHUNK_BYTES = 1 << 14

State = dict[str, Any]


class Reader(Protocol):
    def __iter__(self) -> Iterator[Part]: ...

    def state(self) -> State:
        """Where the reader is, of plain data only."""
        ...


class TextFileReader:
    """A plain or compressed text file: one document, read in parts."""

    def __init__(self, path: Path, encoding_errors: str, skipped: Skipped, state: State | None = None):
        self._path = path
        self._encoding_errors = encoding_errors
        self._skipped = skipped
        self._start = text_start(path)
        # Bytes of the (uncompressed) file that were given.
        self._offset: int = max(self._start, state["offset"] if state else 0)

    def state(self) -> State:
        return {"offset": self._offset}

    def __iter__(self) -> Iterator[Part]:
        """
        Raises:
            ValueError: the bytes are not UTF-8, or the compressed file is damaged.
        """
        pending = b""
        for chunk in file_chunks(self._path, self._offset):
            pending += chunk
            while len(pending) > PART_BYTES:
                cut = cut_position(pending)
                yield self._part(pending[:cut], False)
                pending = pending[cut:]
        if pending:
            yield self._part(pending, True)
        elif self._offset == self._start:
            self._skipped.add(EMPTY_FILES)

    def _part(self, raw: bytes, ends_document: bool) -> Part:
        try:
            utf8 = raw if raw.isascii() else raw.decode("utf-8", self._encoding_errors).encode()
        except UnicodeDecodeError as error:
            raise not_utf8(self._path, self._offset + error.start, raw[error.start]) from error
        self._offset += len(raw)
        return Part(utf8, ends_document)


class DocumentsReader:
    """Documents that can be fetched by their number; ``get`` gives None for one that it had to skip."""

    def __init__(self, num_documents: int, get: Callable[[int], bytes | None], state: State | None = None):
        self._num_documents = num_documents
        self._get = get
        self._next: int = state["document"] if state else 0
        self._num_given: int = state["parts"] if state else 0  # parts of that document

    def state(self) -> State:
        return {"document": self._next, "parts": self._num_given}

    def __iter__(self) -> Iterator[Part]:
        while self._next < self._num_documents:
            utf8 = self._get(self._next)
            parts = list(split_document(utf8)) if utf8 else []
            for part in parts[self._num_given :]:
                self._num_given += 1
                if part.ends_document:
                    self._next, self._num_given = self._next + 1, 0
                yield part
            if not parts:
                self._next += 1


class TableReader:
    """The rows of a ``datasets`` table, one document each."""

    def __init__(
        self,
        rows: Any,
        column: str,
        where: str,
        encoding_errors: str,
        skipped: Skipped,
        explain: Callable[[Exception], Exception],
        state: State | None = None,
    ):
        """
        Args:
            rows: a ``datasets.IterableDataset``.
            where: the name of the table, for errors.
            explain: makes an error of the reading library into one for the reader of the message.
        """
        self._rows = rows
        self._column = column
        self._where = where
        self._encoding_errors = encoding_errors
        self._skipped = skipped
        self._explain = explain
        self._num_rows: int = state["num_rows"] if state else 0
        self._is_lost = False  # whether the table's own state is past a row that could not be read
        self._pending = deque(from_plain(state["pending"]) if state else ())
        self._num_passed = 0  # rows to read over
        if state and state["rows"] is not None:
            self._rows.load_state_dict(state["rows"])
        elif state:
            self._num_passed = self._num_rows

    def state(self) -> State:
        return {
            "rows": self._rows.state_dict() if self._num_rows and not self._is_lost else None,
            "num_rows": self._num_rows,
            "pending": to_plain(self._pending),
        }

    def __iter__(self) -> Iterator[Part]:
        """
        Raises:
            ValueError: a row cannot be read, or its column holds something else than text.
        """
        rows = islice(self._rows, self._num_passed, None)
        while True:
            while self._pending:
                yield self._pending.popleft()
            self._is_lost = True
            try:
                row = next(rows, None)
            except Exception as error:  # pyarrow, pandas, fsspec and datasets each raise their own
                raise self._explain(error) from error
            if row is None:
                self._is_lost = False
                return
            where = f"{self._where}, row {self._num_rows + 1}"
            utf8 = row_text(row.get(self._column), self._column, where, self._encoding_errors, self._skipped)
            self._num_rows, self._is_lost = self._num_rows + 1, False
            if utf8:
                self._pending.extend(split_document(utf8))


class ChainReader:
    """Several shards, one after the other."""

    def __init__(self, shards: Sequence[Callable[[State | None], Reader]], state: State | None = None):
        """
        Raises:
            ValueError: the state was stored before the shards were read one by one.
        """
        if state and "shard" not in state:
            raise ValueError("the position in the text was stored by an earlier version of bdh, and cannot be used")
        self._shards = shards
        self._shard: int = state["shard"] if state else 0
        self._inner_state: State | None = state["inner"] if state else None
        self._reader: Reader | None = None

    def state(self) -> State:
        inner = self._inner_state if self._reader is None else self._reader.state()
        return {"shard": self._shard, "inner": inner}

    def __iter__(self) -> Iterator[Part]:
        while self._shard < len(self._shards):
            self._reader = self._shards[self._shard](self._inner_state)
            yield from self._reader
            self._shard += 1
            self._reader = self._inner_state = None


def compression(path: Path) -> str:
    """The last suffix of a file's name in small letters, if it is one of ``COMPRESSED``; else nothing."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def text_start(path: Path) -> int:
    """Where the text of a file begins in its uncompressed bytes: after the byte order mark, if there is one.

    Raises:
        ValueError: the mark is that of another encoding than UTF-8, or the compressed file is damaged or cut off.
    """
    beginning = b""
    for chunk in file_chunks(path):
        beginning += chunk
        if len(beginning) >= MARK_BYTES:
            break
    return mark_length(beginning, path)


def row_text(text: Any, column: str, where: str, encoding_errors: str, skipped: Skipped) -> bytes | None:
    """The text of a table's row in UTF-8; None, counted, where there is none: an empty one, null, or no such field.

    Raises:
        ValueError: it is something else than text.
    """
    if text is None or text == "":
        skipped.add(NO_TEXT)
        return None
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {column!r} holds {text!r:.80} ({type(text).__name__}): it must be text")
    return to_utf8(text, encoding_errors, where)


def file_chunks(path: Path, offset: int = 0) -> Iterator[bytes]:
    """The bytes of a file from ``offset`` on, uncompressed if its name ends in .gz or .zst.

    Raises:
        ValueError: the compressed file is damaged or cut off.
        OSError: the file cannot be read; the error has its name.
    """
    try:
        yield from _chunks(path, offset)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _chunks(path: Path, offset: int) -> Iterator[bytes]:
    if not compression(path):
        with path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(PART_BYTES):
                yield chunk
        return
    for chunk in _gzip_chunks(path) if compression(path) == ".gz" else _zstd_chunks(path):
        if offset < len(chunk):
            yield chunk[offset:]
        offset = max(0, offset - len(chunk))


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while True:
            try:
                chunk = file.read(PART_BYTES)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is damaged or cut off: {error}") from error
            if not chunk:
                return
            yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """By hand, as the library's own reader takes a file that is cut off for one that is complete."""
    import zstandard

    frame = None
    with path.open("rb") as file:
        while chunk := file.read(_COMPRESSED_CHUNK_BYTES):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise ValueError(f"{path} is damaged: {error}") from error
                chunk = b""
                if frame.eof:
                    chunk, frame = frame.unused_data, None
    if frame is not None:
        raise ValueError(f"{path} is cut off: its last zstandard frame has no end")


def not_utf8(path: Path, offset: int, byte: int, line: int | None = None) -> ValueError:
    where = f", in line {line}" if line else ""
    return ValueError(
        f"{path} is not UTF-8: byte {offset} is 0x{byte:02X}{where}. Convert the file, or set "
        "data.encoding_errors=replace to put U+FFFD in the place of such bytes"
    )
