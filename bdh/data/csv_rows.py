"""The lines and rows of .csv and .tsv files, as the ``csv`` module reads them: strictly."""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bdh.data.readers import file_chunks, not_utf8, text_start

_MAX_FIELD_CHARACTERS = 1 << 28
_BACKSLASHES = re.compile(r'(?<!\\)\\+(?!["\\])')  # those that escape no quote
_QUOTED = re.compile(r' *"(?:[^"]|"")*"')
_SEPARATOR = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)


@dataclass(frozen=True)
class Format:
    """How the fields of a file are written."""

    delimiter: str
    has_quoting: bool = True
    """Whether quotes enclose fields."""
    has_spaces: bool = False
    """Whether there may be spaces before an opening quote, which are not part of the field."""
    has_escapes: bool = False
    """Whether quotes in a field are written ``\\"``. Other backslashes are characters like any other."""


class MalformedRowError(csv.Error):
    """A quote that is not closed, or not doubled."""

    def __init__(self, error: csv.Error, lines: list[str]):
        super().__init__(str(error))
        self.lines = lines
        """Those of the row that have been read."""
        self.is_unfinished = "unexpected end of data" in str(error)


class Lines:
    """The lines of a file, decoded, each with its end; and how far they have been read.

    A first line ``sep=;``, with which Excel is told the delimiter, and the last byte 0x1A of a DOS file are left out.
    """

    def __init__(self, path: Path, encoding_errors: str, position: tuple[int, int] | None = None):
        """
        Args:
            position: offset in bytes and number of lines from which to go on.
        """
        self.path = path
        self.offset, self.number = position or (text_start(path), 0)
        self.has_ended = False
        self.separator: str | None = None
        """What the line ``sep=`` says."""
        self._encoding_errors = encoding_errors

    def __iter__(self) -> Iterator[str]:
        lines = map(self._decoded, self._encoded())
        if self.number == 0:
            first = next(lines, "")
            if match := _SEPARATOR.fullmatch(first):
                self.separator = match[1]
            elif first:
                yield first
        yield from lines
        self.has_ended = True

    def _encoded(self) -> Iterator[bytes]:
        pending: list[bytes] = []
        for chunk in file_chunks(self.path, self.offset):
            pending.append(chunk)
            # The last line may go on in the next chunk, if only by the \n of its \r\n.
            if b"\n" in chunk or b"\r" in chunk or pending[0].endswith(b"\r"):
                *lines, last = b"".join(pending).splitlines(keepends=True)
                pending = [last]
                yield from lines
        if last := b"".join(pending).removesuffix(b"\x1a"):
            yield last

    def _decoded(self, line: bytes) -> str:
        try:
            text = line.decode("utf-8", self._encoding_errors)
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, self.offset + error.start, line[error.start]) from error
        self.offset += len(line)
        self.number += 1
        return text


def parsed(lines: Iterable[str], format: Format) -> Iterator[tuple[list[str], list[str]]]:
    """The lines of each row, and its fields: none if the line is blank.

    Raises:
        MalformedRowError: a quote is not closed, or not doubled.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD_CHARACTERS))  # 128 KiB by default, of the whole process
    row: list[str] = []

    def noted() -> Iterator[str]:
        for line in lines:
            row.append(line)
            yield _BACKSLASHES.sub(r"\g<0>\g<0>", line) if format.has_escapes else line

    reader = csv.reader(
        noted(),
        strict=True,
        delimiter=format.delimiter,
        quoting=csv.QUOTE_MINIMAL if format.has_quoting else csv.QUOTE_NONE,
        skipinitialspace=format.has_spaces,
        escapechar="\\" if format.has_escapes else None,
    )
    while True:
        row.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise MalformedRowError(error, row) from error
        if fields is None:
            return
        if len(fields) == 1 and not "".join(row).strip():
            fields = []
        yield row[:], _with_spaces("".join(row), fields, format.delimiter) if format.has_spaces else fields


def rows(lines: Lines, format: Format) -> Iterator[tuple[int, list[str], list[str]]]:
    """The rows from where the lines are, each with the number of its first line, its lines and its fields.

    Blank lines are none.

    Raises:
        ValueError: a quote is not closed, or not doubled; or as of the lines.
    """
    iterator = parsed(lines, format)
    while True:
        try:
            found = next(iterator, None)
        except MalformedRowError as error:
            raise _malformed(lines, error) from error
        if found is None:
            return
        if found[1]:
            yield lines.number + 1 - len(found[0]), *found


def _with_spaces(row: str, fields: list[str], delimiter: str) -> list[str]:
    """The fields with the spaces that were skipped, except before quotes."""
    position = 0
    for index in range(len(fields)):
        quoted = _QUOTED.match(row, position)
        end = row.find(delimiter, quoted.end() if quoted else position)
        if quoted is None:
            fields[index] = row[position:end] if end >= 0 else row[position:].rstrip("\r\n")
        position = end + 1
    return fields


def _malformed(lines: Lines, error: MalformedRowError) -> ValueError:
    line = lines.number + 1 - len(error.lines)
    if lines.has_ended or "field limit" in str(error):
        what = f"{lines.path}, line {line}: a quote is opened in the row that begins here, and never closed"
    else:
        what = (
            f"{lines.path}, line {lines.number}: text follows the closing quote of a field ({error}): a quote in it must "
            "be doubled"
        )
    if any('\\"' in each for each in error.lines):
        what += '. The row has quotes that are written \\", which is read only if all of the first rows fit so'
    return ValueError(f"{what}. Where quotes are characters like any other, set data.csv_quoting=false")
