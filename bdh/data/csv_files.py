"""Tables in .csv and .tsv files: how their fields are written, which column holds the text, and a reader of the rows.

The ``csv`` module reads them, strictly. Every row must have as many fields as the header: neither is a column ever
taken for an index, nor a field cut off. Where the header lacks it, rows may end with one more delimiter, if all do.
"""

import csv
import logging
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.data.parts import NO_TEXT, Part, Skipped, split_document
from bdh.data.readers import State, compression, file_chunks, not_utf8, text_start
from bdh.data.tables import PEEKED_ROWS, ColumnError, choose_column

if TYPE_CHECKING:
    from bdh.data.config import DataConfig

CSV_TYPES = (".csv", ".tsv")
BAD_ROWS = "rows with another number of fields than the header"

_DELIMITERS = (",", ";", "\t", "|")
_SAMPLE_CHARACTERS = 1 << 17
_MAX_FIELD_CHARACTERS = 1 << 28
_MAX_COUNTED_BYTES = 1 << 26
_MAX_SHOWN_FILES = 3
_SHOWN_CHARACTERS = 60
_NAME = re.compile(r"[A-Za-z_][\w./:-]{,63}", re.ASCII)
_USUAL_NAMES = ("text", "texts", "content", "body", "document", "sentence", "word")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CsvSettings:
    """What the section ``data`` says about .csv files; None is found out."""

    delimiter: str | None = None
    quoting: bool | None = None
    header: bool | None = None
    bad_rows: str = "error"

    @classmethod
    def of(cls, config: "DataConfig") -> "CsvSettings":
        delimiter = "\t" if config.csv_delimiter == "tab" else config.csv_delimiter
        return cls(delimiter, config.csv_quoting, config.csv_header, config.csv_bad_rows)


@dataclass(frozen=True)
class Layout:
    """How one file is written, and where its text is."""

    format: dict[str, Any]
    """Arguments of ``csv.reader``."""
    names: list[str]
    """Of the columns; "1", "2", ... where there is no header."""
    column: int
    """The one that holds the text."""
    has_header: bool
    has_trailing_delimiter: bool
    """Whether each row ends with one more delimiter than the header."""
    first_text: str

    def fits(self, fields: list[str]) -> bool:
        if self.has_trailing_delimiter:
            return len(fields) == len(self.names) + 1 and not fields[-1]
        return len(fields) == len(self.names)

    def __str__(self) -> str:
        facts = [f"{self.column + 1} of {len(self.names)}", f"separated by {self.format['delimiter']!r}"]
        facts += [] if self.has_header else ["no header"]
        facts += [] if self.format["quoting"] == csv.QUOTE_MINIMAL else ["no quoting"]
        return f"the text is column {self.names[self.column]!r} ({', '.join(facts)})"


class CsvReader:
    """The rows of a .csv or .tsv file, one document each."""

    def __init__(
        self,
        path: Path,
        layout: Layout,
        settings: CsvSettings,
        encoding_errors: str,
        skipped: Skipped,
        state: State | None = None,
    ):
        self._path = path
        self._layout = layout
        self._skips_bad_rows = settings.bad_rows == "skip"
        self._skipped = skipped
        self._lines = _Lines(path, encoding_errors, (state["offset"], state["line"]) if state else None)
        self._position = (self._lines.offset, self._lines.number)  # after the last row that was right
        self._pending = deque(Part(text.encode(), ends) for text, ends in state["pending"]) if state else deque[Part]()

    @property
    def offset(self) -> int:
        """Bytes of the file that have been read."""
        return self._lines.offset

    def state(self) -> State:
        return {
            "offset": self._position[0],
            "line": self._position[1],
            "pending": [[part.utf8.decode(), part.ends_document] for part in self._pending],
        }

    def __iter__(self) -> Iterator[Part]:
        """Raises as :meth:`texts`."""
        texts = self.texts()
        while True:
            while self._pending:
                yield self._pending.popleft()
            text = next(texts, None)
            if text is None:
                return
            if text:
                self._pending.extend(split_document(text.encode()))
            else:
                self._skipped.add(NO_TEXT)

    def texts(self) -> Iterator[str]:
        """The text of each row, also where it is empty.

        Raises:
            ValueError: a row has another number of fields than the header, or quotes that are not closed or not doubled;
                or the file is not UTF-8, damaged or cut off.
        """
        layout = self._layout
        begins = self._lines.number == 0
        rows = _rows(self._lines, layout.format)
        if begins and layout.has_header:
            next(rows, None)
        for line, fields in rows:
            fits = layout.fits(fields)
            if not fits and not self._skips_bad_rows:
                raise self._misfit(line, fields)
            self._position = (self._lines.offset, self._lines.number)
            if fits:
                yield fields[layout.column]
            else:
                self._skipped.add(BAD_ROWS)

    def _misfit(self, line: int, fields: list[str]) -> ValueError:
        layout, delimiter = self._layout, self._layout.format["delimiter"]
        expected = f"the header has {len(layout.names)} ({', '.join(layout.names)})"
        if not layout.has_header:
            expected = f"the first row has {len(layout.names)}"
        if layout.has_trailing_delimiter:
            expected += f", and the rows before it {len(layout.names) + 1}, of which the last is empty"
        return ValueError(
            f"{self._path}, line {line}: the row has {len(fields)} fields, but {expected}: {delimiter.join(fields)!r:.80}. "
            f"A field that holds {delimiter!r} must be in quotes; data.csv_bad_rows=skip leaves such rows out and counts "
            "them"
        )


def show_columns(files: Iterable[Path], config: "DataConfig") -> None:
    """Says of each file which column holds the text, how many rows there are, and how the first text begins.

    The rows of the first files are counted, up to 64 MiB of text.

    Raises:
        ValueError: as of :func:`find_layout`; and of :meth:`CsvReader.texts` in the counted rows.
    """
    settings, num_shown, num_bytes, further = CsvSettings.of(config), 0, 0, Counter[str]()
    for path in files:
        layout = find_layout(path, config.text_column, config.encoding_errors, settings)
        if layout is None:
            continue
        if num_shown == _MAX_SHOWN_FILES:
            further[layout.names[layout.column]] += 1
            continue
        reader = CsvReader(path, layout, settings, config.encoding_errors, Skipped())
        num_rows, is_all, texts = 0, False, reader.texts()
        while num_bytes + reader.offset < _MAX_COUNTED_BYTES and not is_all:
            is_all = next(texts, None) is None
            num_rows += not is_all
        num_shown, num_bytes = num_shown + 1, num_bytes + reader.offset
        rows = f"{num_rows:,} row{'s' * (num_rows != 1)}" if is_all else f"more than {num_rows:,} rows"
        _logger.warning(
            "%s: %s; %s, the first text begins %r", path, layout, rows, layout.first_text[:_SHOWN_CHARACTERS]
        )
    if further:
        columns = ", ".join(f"{name!r} in {number:,}" for name, number in further.items())
        _logger.warning("%s further tables: the text is column %s", f"{further.total():,}", columns)


def find_layout(path: Path, wanted: str | None, encoding_errors: str, settings: CsvSettings) -> Layout | None:
    """How a file is written, from its first lines; None if it has no rows.

    Args:
        wanted: ``data.text_column``.

    Raises:
        ColumnError: the column of the text is not there or cannot be guessed, the first line may be a row as well as a
            header, or what separates the fields cannot be told.
        ValueError: as of :meth:`CsvReader.texts`, in the first rows.
    """
    sample = _sample(path, encoding_errors)
    format = _find_format(path, sample, wanted, settings)
    rows = [fields for _, fields in islice(_rows(_Lines(path, encoding_errors), format), 1 + PEEKED_ROWS)]
    if not rows:
        return None
    has_header = settings.header is not False
    names = _stripped(rows[0]) if has_header else [str(number) for number in range(1, len(rows[0]) + 1)]
    data = rows[1:] if has_header else rows
    is_longer = bool(data) and len(data[0]) == len(names) + 1 and not data[0][-1]
    fitting = [fields for fields in data if len(fields) == len(names) + is_longer]
    columns = {  # of two with one name, the last
        name: [fields[index] for fields in fitting or data if index < len(fields)] for index, name in enumerate(names)
    }
    if not data and (wanted in names or (wanted is None and all(map(_is_name, names)))):
        return None
    first_line = next(filter(None, map(str.strip, sample)), "")
    asks = (
        f"If its first line, {first_line!r:.60}, is a row, set data.csv_header=false, which calls the columns 1, 2, ..."
    )
    try:
        name = choose_column({name: {_type(values)} for name, values in columns.items()}, wanted, str(path))
    except ColumnError as error:
        is_sure = not has_header or settings.header or (wanted is None and all(map(_is_name, names)))
        raise error if is_sure else ColumnError(f"{error}. {asks}") from None
    if names.count(name) > 1:
        raise ColumnError(f"{path}: {names.count(name)} columns have the name {name!r}: it must be one only")
    if wanted is None and settings.header is None and _may_be_row(names, name, columns[name]):
        raise ColumnError(
            f"{path}: it cannot be told whether its first line, {first_line!r:.60}, is a header or a row. Set "
            f"data.text_column, to {name!r} if that is the name of a column; or data.csv_header=false, which calls the "
            "columns 1, 2, ..."
        )
    first_text = next((text for text in columns[name] if text), "")
    return Layout(format, names, names.index(name), has_header, is_longer, first_text)


def _find_format(path: Path, sample: list[str], wanted: str | None, settings: CsvSettings) -> dict[str, Any]:
    """Arguments of ``csv.reader`` with which the most lines of the sample give rows as long as the header.

    Raises:
        ColumnError: several delimiters do equally well.
    """
    delimiters = _DELIMITERS if settings.delimiter is None else (settings.delimiter,)
    if settings.delimiter is None and path.name.lower().removesuffix(compression(path)).endswith(".tsv"):
        delimiters = ("\t",)
    candidates = []
    for delimiter in delimiters:
        # Between tabs, quotes are often characters like any other.
        quotings = (True, False) if settings.quoting is None and delimiter == "\t" else (settings.quoting is not False,)
        for has_quoting in quotings:
            quoting = csv.QUOTE_MINIMAL if has_quoting else csv.QUOTE_NONE
            candidates.append(_Candidate(sample, {"delimiter": delimiter, "quoting": quoting}))
            if candidates[-1].share == 1:
                break
    several = [each for each in candidates if len(each.names) > 1 and each.share > 0]
    if settings.header is not False:
        several = [each for each in several if wanted in each.names] or several
    if not several:  # a single column
        return candidates[0].format
    most = max(each.share for each in several)
    best = [each for each in several if each.share == most]
    possible = sorted({each.format["delimiter"] for each in best}, key=delimiters.index)
    if len(possible) > 1:
        raise ColumnError(
            f"{path}: set data.csv_delimiter, as the fields may be separated by {' or '.join(map(repr, possible))}: the "
            f"first line is {sample[0].strip()!r:.80}"
        )
    return {**best[0].format, "skipinitialspace": _has_spaces(sample, best[0].format)}


def _has_spaces(sample: list[str], format: dict[str, Any]) -> bool:
    """Whether delimiters are followed by spaces that do not count: all of the header are, or some before quotes."""

    def read(**further: Any) -> tuple[list[str], set[str]]:
        header: list[str] = []
        found: set[str] = set()
        with suppress(csv.Error):  # what comes after it does not count
            for fields in csv.reader(sample, strict=True, **format, **further):
                header = header or fields[1:]
                found |= {field for field in fields if field.startswith(" ") and field.lstrip(" ").startswith('"')}
        return header, found

    header, before_quotes = read()
    return all(name.startswith(" ") for name in header) or bool(before_quotes - read(skipinitialspace=True)[1])


class _Candidate:
    """A format that is tried on the first lines of a file."""

    def __init__(self, sample: list[str], format: dict[str, Any]):
        self.format = format
        self.names: list[str] = []
        """The fields of the first row."""
        self.share = 0.0
        """Of the lines, those in rows that are as long as it; up to the first row that is malformed."""
        reader = csv.reader(sample, strict=True, **format)
        num_fitting = num_header_lines = end = width = num_quotes = num_enclosed = 0
        try:
            for fields in reader:
                begin, end = end, reader.line_num
                if not fields:
                    num_fitting += 1
                elif not self.names:
                    self.names = _stripped(fields)
                    num_header_lines = end
                    if len(fields) == 1:
                        return
                else:
                    width = width or len(self.names) + (len(fields) == len(self.names) + 1 and not fields[-1])
                    num_fitting += (end - begin) * (len(fields) == width)
                    quotes = [field for field in fields if field.startswith('"')]
                    num_quotes += len(quotes)
                    num_enclosed += sum(len(field) > 1 and field.endswith('"') for field in quotes)
        except csv.Error:
            pass  # what comes after it does not count
        num_lines = len(sample) - num_header_lines
        self.share = num_fitting / num_lines if num_lines > 0 else 1.0
        if format["quoting"] == csv.QUOTE_NONE and 2 * num_enclosed > num_quotes:
            self.share = 0.0


class _Lines:
    """The lines of a file, decoded, each with its end; and how far they have been read."""

    def __init__(self, path: Path, encoding_errors: str, position: tuple[int, int] | None = None):
        """
        Args:
            position: offset in bytes and number of lines from which to go on.
        """
        self.path = path
        self.offset, self.number = position or (text_start(path), 0)
        self.has_ended = False
        self._encoding_errors = encoding_errors

    def __iter__(self) -> Iterator[str]:
        pending = b""
        for chunk in file_chunks(self.path, self.offset):
            # The last line may go on in the next chunk, if only by the \n of its \r\n.
            *lines, pending = (pending + chunk).splitlines(keepends=True)
            for line in lines:
                yield self._decoded(line)
        if pending:
            yield self._decoded(pending)
        self.has_ended = True

    def _decoded(self, line: bytes) -> str:
        try:
            text = line.decode("utf-8", self._encoding_errors)
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, self.offset + error.start, line[error.start]) from error
        self.offset += len(line)
        self.number += 1
        return text


def _rows(lines: _Lines, format: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """The rows from where the lines are, each with the number of its first line. Empty lines are none."""
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD_CHARACTERS))  # 128 KiB by default, of the whole process
    reader = csv.reader(iter(lines), strict=True, **format)
    while True:
        line = lines.number + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _malformed(lines, line, error) from error
        if fields is None:
            return
        if fields:
            yield line, fields


def _malformed(lines: _Lines, line: int, error: csv.Error) -> ValueError:
    if lines.has_ended or "field limit" in str(error):
        what = f"{lines.path}, line {line}: a quote is opened in the row that begins here, and never closed"
    else:
        what = f"{lines.path}, line {lines.number}: text follows the closing quote of a field ({error}): a quote in it must be doubled"
    return ValueError(f"{what}. Where quotes are characters like any other, set data.csv_quoting=false")


def _sample(path: Path, encoding_errors: str) -> list[str]:
    sample, size = [], 0
    for line in _Lines(path, encoding_errors):
        sample.append(line)
        size += len(line)
        if size >= _SAMPLE_CHARACTERS:
            break
    return sample


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
    others = names[not names[0] : len(names) - (not names[-1])]
    if not _is_name(name) or len(set(names)) < len(names) or any(not each or _is_number(each) for each in others):
        return True
    filled = [value for value in values if value]
    return name.lower() not in _USUAL_NAMES and 2 * sum(map(_is_name, filled)) > len(filled)
