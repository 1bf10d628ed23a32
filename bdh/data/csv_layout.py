"""How the fields of a .csv or .tsv file are written, which column holds the text, and its lines and rows.

The ``csv`` module reads them, strictly.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from bdh.data.files import compression, file_chunks, not_utf8, text_start
from bdh.data.reading import PEEKED_ROWS, ColumnError, choose_column

_DELIMITERS = (",", ";", "\t", "|")
_SAMPLE_CHARACTERS = 1 << 17
_MAX_SAMPLE_CHARACTERS = 1 << 26
_MAX_FIELD_CHARACTERS = 1 << 28
_NAME = re.compile(r"[A-Za-z_][\w./:-]{,63}", re.ASCII)
_USUAL_NAMES = ("text", "texts", "content", "body", "document", "sentence", "word")
_BACKSLASHES = re.compile(r'(?<!\\)\\+(?!["\\])')  # those that escape no quote
_QUOTED = re.compile(r' *"(?:[^"]|"")*"')
_SEPARATOR = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)


@dataclass(frozen=True)
class CsvSettings:
    """What the section ``data`` says about .csv files; None is found out."""

    delimiter: str | None = None
    quoting: bool | None = None
    header: bool | None = None
    bad_rows: str = "error"

    @classmethod
    def of(cls, config: Any) -> "CsvSettings":
        """
        Args:
            config: a ``DataConfig``.
        """
        delimiter = "\t" if config.csv_delimiter == "tab" else config.csv_delimiter
        return cls(delimiter, config.csv_quoting, config.csv_header, config.csv_bad_rows)


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


@dataclass(frozen=True)
class Layout:
    """How one file is written, and where its text is."""

    format: Format
    names: list[str]
    """Of the columns; "1", "2", ... where there is no header."""
    column: int
    """The one that holds the text."""
    has_header: bool
    has_trailing_delimiter: bool
    """Whether each row ends with one more delimiter than the header."""
    number_columns: tuple[int, ...]
    """Those that hold numbers."""
    first_text: str

    @property
    def width(self) -> int:
        """The number of fields of a row."""
        return len(self.names) + self.has_trailing_delimiter

    def fits(self, fields: list[str]) -> bool:
        return len(fields) == self.width and not (self.has_trailing_delimiter and fields[-1])

    def may_be_rows(self, lines: list[str]) -> bool:
        """Whether each of the lines of a row may be a row of its own, if the quote that joins them encloses nothing.

        Between tabs, those with as many fields as a row may be. Other delimiters are common in texts: the fields must also
        begin without a space, and be numbers in the columns that hold numbers.
        """
        format = self.format
        filled = [line for line in lines if line.strip()]
        if len(filled) < 2 or any(line.count(format.delimiter) + 1 != self.width for line in filled):
            return False
        if format.delimiter == "\t":
            return True
        split = [line.rstrip("\r\n").split(format.delimiter) for line in filled]
        has_spaces = any(field.startswith(" ") for fields in split for field in fields[1:])
        are_numbers = all(_is_number(fields[index]) for fields in split for index in self.number_columns)
        return self.width > 1 and are_numbers and (format.has_spaces or not has_spaces)

    def __str__(self) -> str:
        facts = [f"{self.column + 1} of {len(self.names)}", f"separated by {self.format.delimiter!r}"]
        facts += [] if self.has_header else ["no header"]
        facts += [] if self.format.has_quoting else ["no quoting"]
        facts += ['quotes written \\"'] if self.format.has_escapes else []
        return f"the text is column {self.names[self.column]!r} ({', '.join(facts)})"


def find_layout(path: Path, wanted: str | None, encoding_errors: str, settings: CsvSettings) -> Layout | None:
    """How a file is written, from its first lines; None if it has no rows.

    Args:
        wanted: ``data.text_column``.

    Raises:
        ColumnError: the column of the text is not there or cannot be guessed, the first line may be a row as well as a
            header, or what separates the fields cannot be told.
        ValueError: as of :func:`csv_texts`, in the first rows.
    """
    sample, format = _find_format(path, encoding_errors, wanted, settings)
    found = list(islice(rows(Lines(path, encoding_errors), format), 1 + PEEKED_ROWS))
    if not found:
        return None
    has_header = settings.header is not False
    data = [fields for _, _, fields in found[has_header:]]
    width = len(found[0][2]) if has_header else _usual_width(data)
    names = _stripped(found[0][2]) if has_header else [str(number) for number in range(1, width + 1)]
    is_longer = _is_longer(width, data)
    if is_longer and width == 1 and settings.delimiter is None:
        texts = [
            lines[0] for _, lines, fields in found[has_header:] if len(fields) == 2 and not lines[0].startswith('"')
        ]
        if texts:
            raise ColumnError(
                f"{path}: it cannot be told whether the {format.delimiter!r} at the end of {texts[0].strip()!r:.60} is part of "
                f"the text: set data.csv_delimiter=tab if it is, or data.csv_delimiter={format.delimiter!r} if it separates fields"
            )
    fitting = [fields for fields in data if len(fields) == width + is_longer]
    columns = {  # of two with one name, the last
        name: [fields[index] for fields in fitting or data if index < len(fields)] for index, name in enumerate(names)
    }
    are_names = all(map(_is_name, names)) and not (settings.header is None and _is_unknown_column(names))
    if not data and (wanted in names or (wanted is None and are_names)):
        return None
    first_line = next(filter(None, map(str.strip, sample)), "")
    asks = (
        f"If its first line, {first_line!r:.60}, is a row, set data.csv_header=false, which calls the columns 1, 2, ..."
    )
    others = [
        repr(each) for each in _DELIMITERS if len(names) == 1 and each in first_line and settings.delimiter is None
    ]
    separated = f". If its fields are separated by {' or '.join(others)}, set data.csv_delimiter" if others else ""
    try:
        name = choose_column({name: {_type(values)} for name, values in columns.items()}, wanted, str(path))
    except ColumnError as error:
        is_sure = not has_header or settings.header or (wanted is None and all(map(_is_name, names)))
        raise error if is_sure else ColumnError(f"{error}. {asks}{separated}") from None
    if names.count(name) > 1:
        raise ColumnError(f"{path}: {names.count(name)} columns have the name {name!r}: it must be one only")
    if wanted is None and settings.header is None and _may_be_row(names, name, columns[name]):
        raise ColumnError(
            f"{path}: it cannot be told whether its first line, {first_line!r:.60}, is a header or a row. Set "
            f"data.text_column, to {name!r} if that is the name of a column; or data.csv_header=false, which calls the "
            f"columns 1, 2, ...{separated}"
        )
    first_text = next((text for text in columns[name] if text), "")
    numbers = tuple(index for index, each in enumerate(names) if _type(columns[each]) is float)
    return Layout(format, names, names.index(name), has_header, is_longer, numbers, first_text)


def _find_format(
    path: Path, encoding_errors: str, wanted: str | None, settings: CsvSettings
) -> tuple[list[str], Format]:
    """The first lines of the file, and the format in which the most of them are in rows as long as the header.

    Raises:
        ColumnError: several formats do equally well.
    """
    size, has_header = _SAMPLE_CHARACTERS, settings.header is not False
    while True:
        sample, separator, is_whole = _sample(path, encoding_errors, size)
        delimiters = tuple(filter(None, (settings.delimiter or separator,))) or _DELIMITERS
        if delimiters == _DELIMITERS and path.name.lower().removesuffix(compression(path)).endswith(".tsv"):
            delimiters = ("\t",)
        # One that is nowhere separates nothing.
        delimiters = delimiters[:1] + tuple(each for each in delimiters[1:] if any(each in line for line in sample))
        tried = {each: _tried(sample, each, is_whole, settings) for each in delimiters}
        lacks_rows = any(
            each.is_unfinished and not each.rows[has_header:] for found in tried.values() for each in found
        )
        if is_whole or not lacks_rows or size >= _MAX_SAMPLE_CHARACTERS:
            break
        size *= 4
    # The first of those that do best: quotes enclose fields, if that does as well.
    candidates = [max(found, key=lambda each: each.share) for found in tried.values()]
    several = [each for each in candidates if each.width > 1 and each.share > 0]
    if has_header:
        several = [each for each in several if wanted in each.names] or several
    best = [each for each in several if each.share == max(each.share for each in several)] or candidates[:1]
    if len(best) > 1 or (lacks_rows and not is_whole and not several and len(delimiters) > 1):
        possible = " or ".join(repr(each.format.delimiter) for each in (best if len(best) > 1 else candidates))
        raise ColumnError(
            f"{path}: set data.csv_delimiter, as the fields may be separated by {possible}: the first line is "
            f"{sample[0].strip()!r:.80}"
        )
    for rival in tried[best[0].format.delimiter]:
        if rival.share == best[0].share > 0 and not rival.format.has_quoting and rival.rows != best[0].rows:
            line = next(each for each in sample if '"' in each)
            raise ColumnError(
                f"{path}: it cannot be told whether quotes enclose fields, as in {line.strip()!r:.60}. Set "
                "data.csv_quoting=true if they do; or data.csv_quoting=false if they are characters like any other"
            )
    return sample, best[0].format


def _tried(sample: list[str], delimiter: str, is_whole: bool, settings: CsvSettings) -> "list[_Candidate]":
    """The formats that a file with this delimiter may have, the likelier one first."""

    def tried(format: Format) -> _Candidate:
        return _Candidate(sample, format, is_whole, settings.header is not False)

    plain = Format(delimiter)
    found = []
    if settings.quoting is not False:
        found = [tried(plain)]
        before_quotes = re.compile(rf'^ +"|{re.escape(delimiter)} +"')
        if any(before_quotes.search(line) for line in sample if ' "' in line):
            spaced = tried(replace(plain, has_spaces=True))
            if not spaced.is_malformed and spaced.share >= found[0].share:
                found = [spaced]
        if any('\\"' in line for line in sample):
            escaped = tried(replace(plain, has_escapes=True))
            if not escaped.is_malformed and escaped.share > found[0].share:
                found = [escaped]
    # Between tabs, quotes are often characters like any other.
    if settings.quoting is False or (settings.quoting is None and delimiter == "\t"):
        found.append(tried(replace(plain, has_quoting=False)))
    return found


class _Candidate:
    """A format that is tried on the first lines of a file."""

    def __init__(self, sample: list[str], format: Format, is_whole: bool, has_header: bool):
        self.format = format
        self.rows: list[list[str]] = []
        """Up to the first one that is malformed."""
        self.is_malformed = self.is_unfinished = False
        """Whether a row is malformed; and whether the last one may continue after the sample."""
        num_row_lines, num_blank = [], 0
        try:
            for lines, fields in parsed(sample, format):
                if fields:
                    self.rows.append(fields)
                    num_row_lines.append(len(lines))
                else:
                    num_blank += 1
        except MalformedRowError as error:
            self.is_unfinished = error.is_unfinished and not is_whole
            self.is_malformed = not self.is_unfinished
        data = self.rows[has_header:]
        self.names = _stripped(self.rows[0]) if self.rows else []
        self.width = len(self.names) if has_header else _usual_width(data)
        """The number of columns."""
        width = self.width + _is_longer(self.width, data)
        num_fitting = sum(
            lines for lines, fields in zip(num_row_lines[has_header:], data, strict=True) if len(fields) == width
        )
        num_lines = len(sample) - sum(num_row_lines[:has_header])
        self.share = (num_fitting + num_blank) / num_lines if num_lines > 0 else 1.0
        """Of the lines, those in rows that are as long as the others; up to the first row that is malformed."""
        if not format.has_quoting:
            quotes = [field for fields in self.rows for field in fields if field.startswith('"')]
            if 2 * sum(len(field) > 1 and field.endswith('"') for field in quotes) > len(quotes):
                self.share = 0.0


def _is_longer(width: int, data: list[list[str]]) -> bool:
    """Whether most rows have one more field, which is empty, than the header."""
    num_longer = sum(len(fields) == width + 1 and not fields[-1] for fields in data)
    return num_longer > sum(len(fields) == width for fields in data)


def _usual_width(data: list[list[str]]) -> int:
    return Counter(map(len, data)).most_common(1)[0][0] if data else 0


def _sample(path: Path, encoding_errors: str, max_characters: int) -> tuple[list[str], str | None, bool]:
    """The first lines of a file, what its line ``sep=`` says, and whether these are all lines."""
    sample, size, lines = [], 0, Lines(path, encoding_errors)
    for line in lines:
        sample.append(line)
        size += len(line)
        if size >= max_characters:
            break
    return sample, lines.separator, lines.has_ended


def _stripped(fields: list[str]) -> list[str]:
    return [field.strip() for field in fields]


def _type(values: list[str]) -> type:
    """What a column holds: nothing, numbers (or true and false), or text."""
    filled = [value for value in values if value.strip()]
    if all(_is_number(value) or value.lower() in ("true", "false") for value in filled):
        return float if filled else type(None)
    return str


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_name(field: str) -> bool:
    return _NAME.fullmatch(field) is not None


def _may_be_row(names: list[str], name: str, values: list[str]) -> bool:
    """Whether what looks like a header may be the first row of a file without one.

    ``name`` is that of the column of the text. Of the other names the first may be empty, as an index's is, and the last.
    """
    if _is_unknown_column(names):
        return True
    others = names[not names[0] : len(names) - (not names[-1])]
    if not _is_name(name) or len(set(names)) < len(names) or any(not each or _is_number(each) for each in others):
        return True
    filled = [value for value in values if value]
    return name.lower() not in _USUAL_NAMES and 2 * sum(map(_is_name, filled)) > len(filled)


def _is_unknown_column(names: list[str]) -> bool:
    """Whether there is but one column, with a name that any line of a text may be."""
    return len(names) - (not names[-1]) == 1 and names[0].lower() not in _USUAL_NAMES


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
            position: offset in bytes and number of lines from which to continue.
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
            # The last line may continue in the next chunk, if only by the \n of its \r\n.
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
