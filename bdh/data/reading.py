"""Reading text: the bytes and lines of files, chunks of documents, and resumable readers.

Text is read in chunks of at most ``CHUNK_BYTES`` bytes of UTF-8, so that no document has to fit in memory. Most
documents are a single chunk; longer ones are split, at line ends if possible. The ``state()`` of a reader is plain
data. A new reader with this state continues after the last chunk that was returned, even if the previous reader ended
with an error.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from bdh.text_files import MARK_BYTES, mark_length

CHUNK_BYTES = 1 << 18
PEEKED_ROWS = 100
# The kinds of skipped items, which are counted.
NO_TEXT = "rows without text"
EMPTY_FILES = "empty files"
COMPRESSED = (".gz", ".zst")

_COMPRESSED_CHUNK_BYTES = 1 << 14
_SPACES = b" \t\n\v\f\r"
_MAX_LINE_ENDS = 64  # line ends that are tried for the best cut; a file of empty lines has none
_MAX_SHORT_BYTES = 1 << 28  # a stream with more text counts as long, and is not read further

State = dict[str, Any]


class Chunk(NamedTuple):
    """The text of a document, or of a part of a long one."""

    utf8: bytes
    """Text, never empty."""
    ends_document: bool
    """Whether it is the last chunk of its document."""


class Skipped(Counter[str]):
    """Counts what a source skipped, by kind, so that it can be reported."""

    def __str__(self) -> str:
        """Returns the end of a sentence about it; empty if nothing was skipped."""
        counted = ", ".join(f"{what} ({number:,})" for what, number in self.items())
        return f": left out {counted}" if counted else ""


class Reader(Protocol):
    def __iter__(self) -> Iterator[Chunk]:
        """Yields the chunks.

        Raises:
            ValueError: the source is not text, or not a table with texts.
            OSError: the source cannot be read.
        """

    def state(self) -> State:
        """Returns the position of the reader as plain data."""


OpenShard = Callable[[Skipped, State | None], Reader]


class DocumentReader:
    """Reads the chunks of documents that a function yields one by one."""

    def __init__(self, documents: Callable[[State], Iterable[tuple[bytes | None, State]]], state: State | None = None):
        """Creates a reader.

        Args:
            documents: yields the documents after a state, which is empty at first. Each comes with the state after it,
                and is None if it has no text.
            state: the position of another reader, from which to continue.
        """
        self._documents = documents
        self._after = dict(state or {})
        self._num_given: int = self._after.pop("parts", 0)  # chunks of the next document
        self._pending = from_plain(self._after.pop("pending", []))  # stored by version 0.1.0 for CSV files

    def state(self) -> State:
        pending = {"pending": to_plain(self._pending)} if self._pending else {}
        return {**self._after, "parts": self._num_given, **pending}

    def __iter__(self) -> Iterator[Chunk]:
        while self._pending:
            yield self._pending.pop(0)
        for utf8, after in self._documents(self._after):
            for chunk in list(split_document(utf8) if utf8 else ())[self._num_given :]:
                self._num_given += 1
                if chunk.ends_document:
                    self._after, self._num_given = after, 0
                yield chunk
            self._after = after


def listed(num_documents: int, get: Callable[[int], bytes | None], state: State | None = None) -> DocumentReader:
    """Returns a reader of documents by index; ``get`` returns None for a document that was skipped."""
    return DocumentReader(
        lambda after: ((get(i), {"document": i + 1}) for i in range(after.get("document", 0), num_documents)),
        state or {"document": 0},
    )


class ChainReader:
    """Reads several shards, one after the other."""

    def __init__(self, shards: Sequence[OpenShard], skipped: Skipped, state: State | None = None):
        """Creates a reader. Raises ``ValueError`` if the state is of a version that did not read shards one by one."""
        if state and "shard" not in state:
            raise ValueError("the position in the text was stored by an earlier version of bdh, and cannot be used")
        self._shards, self._skipped = shards, skipped
        self._shard: int = state["shard"] if state else 0
        self._inner_state: State | None = state["inner"] if state else None
        self._reader: Reader | None = None

    def state(self) -> State:
        return {"shard": self._shard, "inner": self._reader.state() if self._reader else self._inner_state}

    def __iter__(self) -> Iterator[Chunk]:
        while self._shard < len(self._shards):
            self._reader = self._shards[self._shard](self._skipped, self._inner_state)
            yield from self._reader
            self._shard += 1
            self._reader = self._inner_state = None


class TextFileReader:
    """Reads a plain or compressed text file, which is one document, in chunks."""

    def __init__(self, path: Path, encoding_errors: str, skipped: Skipped, state: State | None = None):
        self._path, self._encoding_errors, self._skipped = path, encoding_errors, skipped
        self._start = text_start(path)
        # Bytes of the (uncompressed) file that were given.
        self._offset: int = max(self._start, state["offset"] if state else 0)

    def state(self) -> State:
        return {"offset": self._offset}

    def __iter__(self) -> Iterator[Chunk]:
        pending = b""
        for chunk in file_chunks(self._path, self._offset):
            pending += chunk
            while len(pending) > CHUNK_BYTES:
                cut = cut_position(pending)
                yield self._chunk(pending[:cut], False)
                pending = pending[cut:]
        if pending:
            yield self._chunk(pending, True)
        elif self._offset == self._start:
            self._skipped[EMPTY_FILES] += 1

    def _chunk(self, raw: bytes, ends_document: bool) -> Chunk:
        utf8 = raw if raw.isascii() else decoded(raw, self._encoding_errors, self._path, self._offset).encode()
        self._offset += len(raw)
        return Chunk(utf8, ends_document)


def cut_position(utf8: bytes, limit: int = CHUNK_BYTES) -> int:
    """Returns where to split text that is longer than ``limit``: the size of its first chunk in bytes, 1 to ``limit``.

    The best place is a line end between two characters that are not white space, where tokenizers that split at white
    space give the same tokens as without the split. Otherwise it is any line end, any space, or any character.
    """
    end = limit
    for _ in range(_MAX_LINE_ENDS):
        end = utf8.rfind(b"\n", 1, end)
        if end < 0:
            break
        if utf8[end - 1] not in _SPACES and utf8[end + 1] not in _SPACES:
            return end + 1
    for separator in (b"\n", b" "):
        end = utf8.rfind(separator, 0, limit)
        if end >= 0:
            return end + 1
    return _character_start(utf8, limit) or limit


def split_document(utf8: bytes) -> Iterator[Chunk]:
    """Yields the chunks of a document that is completely in memory."""
    start = 0
    while len(utf8) - start > CHUNK_BYTES:
        end = start + cut_position(utf8[start : start + CHUNK_BYTES + 1])
        yield Chunk(utf8[start:end], False)
        start = end
    yield Chunk(utf8[start:], True)


def to_plain(chunks: Iterable[Chunk]) -> list[Any]:
    """Converts a few chunks to plain data, for the state of a reader."""
    return [[chunk.utf8.decode(), chunk.ends_document] for chunk in chunks]


def from_plain(plain: list[Any]) -> list[Chunk]:
    return [Chunk(text.encode(), ends_document) for text, ends_document in plain]


@dataclass(frozen=True)
class Split:
    """The rule by which chunks of a source are held out for validation."""

    unit: Literal["parts", "documents", "bytes"]
    """The unit that is counted from the start of the source; parts are chunks."""
    number: int
    """With chunks, every ``number``-th is held out; with documents or bytes, those after the first ``number``."""

    def __repr__(self) -> str:  # fingerprints include it, with the name of earlier versions
        return f"StreamSplit(unit={self.unit!r}, number={self.number!r})"

    def marked(self, chunks: Iterable[Chunk], position: int = 0) -> Iterator[tuple[Chunk, bool, int]]:
        """Determines for each chunk whether it is held out.

        Args:
            chunks: the chunks.
            position: the position of the first chunk, in units.

        Yields:
            Each chunk, or both sides of one that is cut; whether it is held out; and the position after it.
        """
        for chunk in chunks:
            if self.unit == "parts":
                position += 1
                yield chunk, position % self.number == 0, position
            elif self.unit == "documents":
                is_after, position = position >= self.number, position + chunk.ends_document
                yield chunk, is_after, position
            else:
                length, left = len(chunk.utf8), self.number - position
                at = _character_start(chunk.utf8, left) if 0 < left < length else 0
                if at:
                    yield Chunk(chunk.utf8[:at], False), False, position + at
                position += length
                yield Chunk(chunk.utf8[at:], chunk.ends_document), left < length, position


def split_of(open_source: Callable[[], Iterable[Chunk]], val_fraction: float, *, streaming: bool) -> Split:
    """Returns the split that holds out the last documents, or the last bytes of a single one. Reads the source once.

    Args:
        open_source: returns the chunks of the source.
        val_fraction: the fraction to hold out.
        streaming: whether to hold out every ``round(1 / val_fraction)``-th chunk instead, since the end of a stream is
            far. (A fraction above one half holds out every second chunk: no more than half can be held out.) A source
            with no more chunks than that is split as without streaming, since otherwise nothing, or only the rest of a
            document, would be held out.
    """
    every = max(2, round(1 / val_fraction))
    num_documents = num_bytes = 0
    for number, chunk in enumerate(open_source()):
        num_documents += chunk.ends_document
        num_bytes += len(chunk.utf8)
        if streaming and (number == every or num_bytes > _MAX_SHORT_BYTES):
            return Split("parts", every)
    if num_documents <= 1:
        return Split("bytes", num_kept(num_bytes, val_fraction))
    return Split("documents", num_kept(num_documents, val_fraction))


def num_kept(number: int, val_fraction: float) -> int:
    """Returns how many of the documents or bytes are for training, from the start; at least one each, if possible."""
    kept = int(number * (1 - val_fraction))
    return min(max(kept, 1), number - 1) if number > 1 else number


def _character_start(utf8: bytes, position: int) -> int:
    """Returns where the character begins to which the byte at ``position`` belongs; at the end of the text, the end."""
    while 0 < position < len(utf8) and utf8[position] & 0xC0 == 0x80:
        position -= 1
    return position


class ColumnError(ValueError):
    """The column with the text is missing, or cannot be guessed."""


class TextColumn(NamedTuple):
    """The column of a table that contains the text."""

    name: str
    strings: frozenset[str] | None = None
    """For a guessed column of a JSON file, the fields that contained a string in the first rows. No other field may
    contain one later."""


def choose_column(types: Mapping[str, set[type]], wanted: str | None, where: str) -> str:
    """Returns the name of the column with the text of a table.

    Args:
        types: the known types of values in each column.
        wanted: ``data.text_column``.
        where: the name of the table, for error messages.

    Raises:
        ColumnError: the wanted column does not exist; or none is given, and not exactly one column has strings.
    """
    names = ", ".join(types)
    if wanted is not None:
        if wanted not in types:
            raise ColumnError(f"data.text_column is {wanted!r}, but {where} has no such column: it has {names}")
        return wanted
    nothing = type(None)
    # Preferably a column of strings only. Otherwise one with some strings, whose other rows are faults, or else an
    # empty one: its rows have no text.
    strings = (
        [name for name, found in types.items() if str in found and found <= {str, nothing}]
        or [name for name, found in types.items() if str in found]
        or [name for name, found in types.items() if found == {nothing}]
    )
    if len(strings) == 1:
        return strings[0]
    found = f"{len(strings)} columns hold strings ({', '.join(strings)})" if strings else "no column holds strings"
    raise ColumnError(f"{where}: set data.text_column, as {found}; its columns are {names}")


def row_text(text: Any, column: str, where: str, encoding_errors: str, skipped: Skipped) -> bytes | None:
    """Returns the text of a table's row in UTF-8. If it is empty, null or missing, counts this and returns None.

    Raises:
        ValueError: the value is not text.
    """
    if text is None or text == "":
        skipped[NO_TEXT] += 1
        return None
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {column!r} holds {text!r:.80} ({type(text).__name__}): it must be text")
    return to_utf8(text, encoding_errors, where)


def to_utf8(text: str, encoding_errors: str, where: str) -> bytes:
    """Encodes text in UTF-8.

    Raises:
        ValueError: the text contains half of a surrogate pair, which is not a character, and ``encoding_errors`` is
            strict.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        if encoding_errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        raise ValueError(
            f"{where}: character {error.start} of the text is U+{ord(text[error.start]):04X}, half of a surrogate "
            "pair, which UTF-8 cannot hold; data.encoding_errors=replace continues"
        ) from error


def decoded(utf8: bytes, encoding_errors: str, path: Path, offset: int, line: int | None = None) -> str:
    """Decodes the bytes at ``offset`` of a file.

    Raises:
        ValueError: the bytes are not UTF-8, and ``encoding_errors`` is strict.
    """
    try:
        return utf8.decode("utf-8", encoding_errors)
    except UnicodeDecodeError as error:
        number = utf8.count(b"\n", 0, error.start)
        where = f", in line {line + number}" if line else ""
        raise ValueError(
            f"{path} is not UTF-8: byte {offset + error.start} is 0x{utf8[error.start]:02X}{where}. Convert the file, or set "
            "data.encoding_errors=replace to put U+FFFD in the place of such bytes"
        ) from error


class Line(NamedTuple):
    """A line of a file that is not blank."""

    number: int
    """The number of the line, from 1."""
    text: str
    end: int
    """The offset of the next line in the (uncompressed) file, in bytes."""


def text_lines(path: Path, encoding_errors: str, offset: int = 0, number: int = 1) -> Iterator[Line]:
    """Yields the lines of a file that are not blank, without a byte order mark.

    Args:
        path: the file.
        encoding_errors: ``data.encoding_errors``.
        offset: the number of bytes of the (uncompressed) file to skip, up to the end of a line.
        number: the number of the line at the offset.

    Raises:
        ValueError: a line is not UTF-8, or the compressed file is damaged.
    """
    offset = max(offset, text_start(path))
    for line in encoded_lines(path, offset):
        start, offset = offset, offset + len(line)
        if not line.isspace():
            yield Line(number, decoded(line, encoding_errors, path, start, number), offset)
        number += 1


def encoded_lines(path: Path, offset: int) -> Iterator[bytes]:
    r"""Yields the lines of a file from ``offset`` on, each with its line end, which can be ``\n``, ``\r`` or both."""
    pending: list[bytes] = []
    for chunk in file_chunks(path, offset):
        pending.append(chunk)
        # The last line may continue in the next chunk, if only by the \n of its \r\n.
        if b"\n" in chunk or b"\r" in chunk or pending[0].endswith(b"\r"):
            *lines, last = b"".join(pending).splitlines(keepends=True)
            pending = [last]
            yield from lines
    yield from filter(None, [b"".join(pending)])


def compression(path: Path) -> str:
    """Returns the suffix of a file's name in lower case if it is that of a compressed file, otherwise ""."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def text_start(path: Path) -> int:
    """Returns the offset of the text in the uncompressed bytes of a file, after the byte order mark if there is one.

    Raises:
        ValueError: the byte order mark is that of another encoding than UTF-8, or the compressed file is damaged or
            truncated.
    """
    beginning = b""
    for chunk in file_chunks(path):
        beginning += chunk
        if len(beginning) >= MARK_BYTES:
            break
    return mark_length(beginning, path)


def file_chunks(path: Path, offset: int = 0) -> Iterator[bytes]:
    """Yields the bytes of a file from ``offset`` on, uncompressed if its name ends in .gz or .zst.

    Raises:
        ValueError: the compressed file is damaged or truncated.
        OSError: the file cannot be read; the error contains its name.
    """
    try:
        if not compression(path):
            with path.open("rb") as file:
                file.seek(offset)
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
            return
        for chunk in _gzip_chunks(path) if compression(path) == ".gz" else _zstd_chunks(path):
            if offset < len(chunk):
                yield chunk[offset:]
            offset = max(0, offset - len(chunk))
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Decompresses without the library's own reader, which takes a truncated file for a complete one."""
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
        raise ValueError(f"{path} is cut off: its last zstandard frame is incomplete")
