"""Tables in .csv and .tsv files: detects their format and the column that holds the text, and reads their rows.

The ``csv`` module parses them strictly. Every row must have as many fields as the header, so that no column is taken
for an index, and no field is cut off. Rows may end with a delimiter that the header lacks, if all of them do.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bdh.data.config import DataConfig
from bdh.data.reading import (
    NO_TEXT,
    PEEKED_ROWS,
    ColumnError,
    DocumentReader,
    Skipped,
    State,
    choose_column,
    compression,
    decoded,
    encoded_lines,
    text_start,
)
from bdh.words import counted

_DELIMITERS = (",", ";", "\t", "|")
_SAMPLE_CHARACTERS = 1 << 17
_MAX_SAMPLE_CHARACTERS = 1 << 26
_MAX_FIELD_CHARACTERS = 1 << 28
_BAD_ROWS = "rows with another number of fields than the header"
_NAME = re.compile(r"[A-Za-z_][\w./:-]{,63}", re.ASCII)
_USUAL_NAMES = ("text", "texts", "content", "body", "document", "sentence", "word")
_BACKSLASHES = re.compile(r'(?<!\\)\\+(?!["\\])')  # those that do not escape a quote
_QUOTED = re.compile(r' *"(?:[^"]|"")*"')
_SEPARATOR = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)


def csv_settings(config: DataConfig) -> dict[str, Any]:
    """Returns the settings for .csv files. None stands for what is detected."""
    settings = {name: getattr(config, f"csv_{name}") for name in ("delimiter", "quoting", "header", "bad_rows")}
    return settings | ({"delimiter": "\t"} if config.csv_delimiter == "tab" else {})


@dataclass(frozen=True)
class Format:
    """How the fields of a file are written."""

    delimiter: str
    has_quoting: bool = True
    """Whether quotes enclose fields."""
    has_spaces: bool = False
    """Whether there can be spaces before an opening quote, which do not belong to the field."""
    has_escapes: bool = False
    """Whether quotes within a field are written ``\\"``. Other backslashes are ordinary characters."""


@dataclass(frozen=True)
class Layout:
    """The format of a file, and the location of its text."""

    format: Format
    names: list[str]
    """The names of the columns; "1", "2", ... if there is no header."""
    column: int
    """The index of the column that holds the text."""
    width: int
    """The number of fields in a row."""
    has_header: bool
    has_trailing_delimiter: bool
    """Whether each row ends with a delimiter that the header lacks."""
    number_columns: tuple[int, ...]
    """The indices of the columns that hold numbers."""
    first_text: str

    def may_be_rows(self, lines: list[str]) -> bool:
        """Whether the lines of a row could be rows themselves, if the quote that joins them does not enclose a field.

        Each line must have as many fields as a row. This suffices if tabs separate the fields. Other delimiters are
        common in texts, so fields must also be numbers in the columns that hold numbers, and must not begin with a
        space unless the format has such spaces.
        """
        delimiter = self.format.delimiter
        split = [line.rstrip("\r\n").split(delimiter) for line in lines if line.strip()]
        if len(split) < 2 or any(len(fields) != self.width for fields in split):
            return False
        if delimiter == "\t":
            return True
        has_spaces = any(field.startswith(" ") for fields in split for field in fields[1:])
        are_numbers = all(_is_number(fields[index]) for fields in split for index in self.number_columns)
        return self.width > 1 and are_numbers and (self.format.has_spaces or not has_spaces)

    def __str__(self) -> str:
        facts = [f"{self.column + 1} of {len(self.names)}", f"separated by {self.format.delimiter!r}"]
        facts += [] if self.has_header else ["no header"]
        facts += [] if self.format.has_quoting else ["no quoting"]
        facts += ['quotes written \\"'] if self.format.has_escapes else []
        return f"the text is column {self.names[self.column]!r} ({', '.join(facts)})"


def csv_reader(
    path: Path, layout: Layout, config: DataConfig, skipped: Skipped, state: State | None = None
) -> DocumentReader:
    """Returns a reader of the rows of a .csv or .tsv file, one document each. Iterating raises as :func:`csv_texts`."""

    def documents(after: State) -> Iterator[tuple[bytes | None, State]]:
        lines = Lines(path, config, (after["offset"], after["line"]) if after else None)
        for text in csv_texts(lines, layout, config):
            if not text:
                skipped[NO_TEXT if text is not None else _BAD_ROWS] += 1
            yield (text or "").encode(), {"offset": lines.offset, "line": lines.number}

    return DocumentReader(documents, state)


def csv_texts(lines: "Lines", layout: Layout, config: DataConfig) -> Iterator[str | None]:
    """Yields the text of each row, even if it is empty. Yields None for a row that is skipped for its number of fields.

    Raises:
        ValueError: a row has another number of fields than the header, or quotes that are not closed or not doubled; it
            is ambiguous what quotes or backslashes mean; or the file is not UTF-8, damaged or truncated.
    """
    format = layout.format
    checks_quotes = format.has_quoting and config.csv_quoting is None
    begins, found = lines.number == 0, rows(lines, format)
    if begins and layout.has_header:
        next(found, None)
    for line, row_lines, fields in found:
        where = f"{lines.path}, line {line}"
        if checks_quotes and len(row_lines) > 1 and layout.may_be_rows(row_lines):
            raise ValueError(
                f"{where}: it is unclear whether the {len(row_lines)} lines from {row_lines[0]!r:.60} on are "
                "one row with a field in quotes, or separate rows. Set data.csv_quoting=true if quotes enclose "
                "fields; or data.csv_quoting=false if they are ordinary characters"
            )
        if format.has_escapes and any(each.rstrip("\r\n").endswith("\\") for each in row_lines[:-1]):
            raise ValueError(
                f"{where}: a line in quotes ends with a backslash, and it is unclear whether that is "
                "part of the text, since this file escapes quotes with backslashes: double the quotes in fields instead"
            )
        fits = len(fields) == layout.width and not (layout.has_trailing_delimiter and fields[-1])
        if not fits and config.csv_bad_rows != "skip":
            raise ValueError(f"{where}: {_misfit(layout, fields)}")
        yield fields[layout.column] if fits else None


def _misfit(layout: Layout, fields: list[str]) -> str:
    delimiter = layout.format.delimiter
    expected = f"the header has {len(layout.names)} ({', '.join(layout.names)})"
    if not layout.has_header:
        expected = f"most of the first rows have {len(layout.names)}"
    if layout.has_trailing_delimiter:
        expected += f", and most of the first rows {layout.width}, of which the last is empty"
    ways = ["data.csv_bad_rows=skip leaves such rows out and counts them"]
    if len(fields) != layout.width and layout.format.has_quoting:
        held = repr(delimiter) if len(fields) > layout.width else "a line end"
        ways.insert(0, f"A field that holds {held} must be in quotes")
    if len(fields) > layout.width == 1:
        other = "tab" if delimiter != "\t" else "'|'"
        ways.insert(1, f"where lines are texts as they are, set data.csv_delimiter={other}")
    return (
        f"the row has {counted(len(fields), 'field')}, but {expected}: "
        f"{delimiter.join(fields)!r:.80}. {'; '.join(ways)}"
    )


def find_layout(path: Path, config: DataConfig) -> Layout | None:
    """Detects the format of a file from its first lines, and the column that holds the text. Returns None without rows.

    Raises:
        ColumnError: the column with the text does not exist or cannot be guessed, the first line could be either a row
            or a header, or the delimiter is ambiguous.
        ValueError: as :func:`csv_texts`, for the first rows.
    """
    wanted, delimiter = config.text_column, config.csv_delimiter
    sample, format = _find_format(path, config)
    found = list(islice(rows(Lines(path, config), format), 1 + PEEKED_ROWS))
    if not found:
        return None
    has_header = config.csv_header is not False
    data = [fields for _, _, fields in found[has_header:]]
    width = len(found[0][2]) if has_header else _usual_width(data)
    names = [field.strip() for field in found[0][2]] if has_header else [str(number) for number in range(1, width + 1)]
    is_longer = _is_longer(width, data)
    if is_longer and width == 1 and delimiter is None:
        for _, (line, *_), fields in found[has_header:]:
            if len(fields) == 2 and not line.startswith('"'):
                raise ColumnError(
                    f"{path}: it is unclear whether the {format.delimiter!r} at the end of {line.strip()!r:.60} is "
                    "part of the text: set data.csv_delimiter=tab if it is, or data.csv_delimiter="
                    f"{format.delimiter!r} if it separates fields"
                )
    width += is_longer
    fitting = [fields for fields in data if len(fields) == width] or data
    columns = {  # of several columns with the same name, only the last
        name: [fields[index] for fields in fitting if index < len(fields)] for index, name in enumerate(names)
    }
    are_names = all(map(_NAME.fullmatch, names))
    may_be_text = config.csv_header is None and _is_unknown_column(names)
    if not data and (wanted in names or (wanted is None and are_names and not may_be_text)):
        return None
    first_line = next(filter(None, map(str.strip, sample)), "")
    others = [repr(each) for each in _DELIMITERS if len(names) == 1 and each in first_line and delimiter is None]
    separated = f". If its fields are separated by {' or '.join(others)}, set data.csv_delimiter" if others else ""
    try:
        name = choose_column({name: {_type(values)} for name, values in columns.items()}, wanted, str(path))
    except ColumnError as error:
        is_sure = not has_header or config.csv_header or (wanted is None and are_names)
        if is_sure:
            raise
        raise ColumnError(
            f"{error}. If its first line, {first_line!r:.60}, is a row, set data.csv_header=false, which calls the columns "
            f"1, 2, ...{separated}"
        ) from None
    if names.count(name) > 1:
        raise ColumnError(f"{path}: {names.count(name)} columns are named {name!r}: must be only one")
    if wanted is None and config.csv_header is None and _may_be_row(names, name, columns[name]):
        raise ColumnError(
            f"{path}: it is unclear whether its first line, {first_line!r:.60}, is a header or a row. Set "
            f"data.text_column, to {name!r} if that is the name of a column; or data.csv_header=false, which calls the "
            f"columns 1, 2, ...{separated}"
        )
    first_text = next((text for text in columns[name] if text), "")
    numbers = tuple(index for index, each in enumerate(names) if _type(columns[each]) is float)
    return Layout(format, names, names.index(name), width, has_header, is_longer, numbers, first_text)


def _find_format(path: Path, config: DataConfig) -> tuple[list[str], Format]:
    """Returns the first lines of a file, and the format in which most of them are in rows as long as the header."""
    size, has_header, stated = _SAMPLE_CHARACTERS, config.csv_header is not False, csv_settings(config)["delimiter"]
    while True:
        lines, sample, num_characters = Lines(path, config), [], 0
        for line in lines:
            sample.append(line)
            num_characters += len(line)
            if num_characters >= size:
                break
        delimiters = tuple(filter(None, (stated or lines.separator,))) or _DELIMITERS
        if delimiters == _DELIMITERS and path.name.lower().removesuffix(compression(path)).endswith(".tsv"):
            delimiters = ("\t",)
        # A delimiter that does not occur separates nothing.
        delimiters = delimiters[:1] + tuple(each for each in delimiters[1:] if any(each in line for line in sample))
        tried = {each: _tried(sample, each, lines.has_ended, config) for each in delimiters}
        lacks_rows = any(
            each.is_unfinished and not each.rows[has_header:] for found in tried.values() for each in found
        )
        if lines.has_ended or not lacks_rows or size >= _MAX_SAMPLE_CHARACTERS:
            break
        size *= 4
    # Among the best formats, the first one: quotes enclose fields unless another format is better.
    candidates = [max(found, key=lambda each: each.share) for found in tried.values()]
    several = [each for each in candidates if each.width > 1 and each.share > 0]
    if has_header:
        several = [each for each in several if config.text_column in each.names] or several
    best = [each for each in several if each.share == max(each.share for each in several)] or candidates[:1]
    if len(best) > 1 or (lacks_rows and not lines.has_ended and not several and len(delimiters) > 1):
        possible = " or ".join(repr(each.format.delimiter) for each in (best if len(best) > 1 else candidates))
        raise ColumnError(
            f"{path}: set data.csv_delimiter, as the fields may be separated by {possible}: the first line is "
            f"{sample[0].strip()!r:.80}"
        )
    for rival in tried[best[0].format.delimiter]:
        if rival.share == best[0].share > 0 and not rival.format.has_quoting and rival.rows != best[0].rows:
            line = next(each for each in sample if '"' in each)
            raise ColumnError(
                f"{path}: it is unclear whether quotes enclose fields, as in {line.strip()!r:.60}. Set "
                "data.csv_quoting=true if they do; or data.csv_quoting=false if they are ordinary characters"
            )
    return sample, best[0].format


def _tried(sample: list[str], delimiter: str, is_whole: bool, config: DataConfig) -> "list[_Candidate]":
    """Returns the formats that a file with this delimiter could have, the most likely first."""

    def tried(**ways: bool) -> _Candidate:
        return _Candidate(sample, Format(delimiter, **ways), is_whole, config.csv_header is not False)

    found = []
    if config.csv_quoting is not False:
        found = [tried()]
        before_quotes = re.compile(rf'^ +"|{re.escape(delimiter)} +"')
        if any(before_quotes.search(line) for line in sample if ' "' in line):
            spaced = tried(has_spaces=True)
            if not spaced.is_malformed and spaced.share >= found[0].share:
                found = [spaced]
        if any('\\"' in line for line in sample):
            escaped = tried(has_escapes=True)
            if not escaped.is_malformed and escaped.share > found[0].share:
                found = [escaped]
    # In files with tabs, quotes are often ordinary characters.
    if config.csv_quoting is False or (config.csv_quoting is None and delimiter == "\t"):
        found.append(tried(has_quoting=False))
    return found


class _Candidate:
    """A format that is tried on the first lines of a file.

    Attributes:
        rows: the rows before the first malformed one.
        is_malformed: whether a row is malformed.
        is_unfinished: whether the last row may continue after the sample.
        width: the number of columns.
        share: the fraction of lines that are in rows as long as the others, before the first malformed row.
    """

    def __init__(self, sample: list[str], format: Format, is_whole: bool, has_header: bool):
        self.format = format
        self.rows: list[list[str]] = []
        self.is_malformed = self.is_unfinished = False
        num_row_lines, num_blank = [], 0
        try:
            for lines, fields in parsed(sample, format):
                if fields:
                    self.rows.append(fields)
                    num_row_lines.append(len(lines))
                else:
                    num_blank += 1
        except MalformedRowError as error:
            self.is_unfinished = "unexpected end of data" in str(error) and not is_whole
            self.is_malformed = not self.is_unfinished
        data = self.rows[has_header:]
        self.names = [field.strip() for field in self.rows[0]] if self.rows else []
        self.width = len(self.names) if has_header else _usual_width(data)
        width = self.width + _is_longer(self.width, data)
        num_fitting = sum(
            lines for lines, fields in zip(num_row_lines[has_header:], data, strict=True) if len(fields) == width
        )
        num_lines = len(sample) - sum(num_row_lines[:has_header])
        self.share = (num_fitting + num_blank) / num_lines if num_lines > 0 else 1.0
        if not format.has_quoting:
            quotes = [field for fields in self.rows for field in fields if field.startswith('"')]
            if 2 * sum(len(field) > 1 and field.endswith('"') for field in quotes) > len(quotes):
                self.share = 0.0


def _is_longer(width: int, data: list[list[str]]) -> bool:
    """Whether most rows have one more field than the header, and this field is empty."""
    num_longer = sum(len(fields) == width + 1 and not fields[-1] for fields in data)
    return num_longer > sum(len(fields) == width for fields in data)


def _usual_width(data: list[list[str]]) -> int:
    return Counter(map(len, data)).most_common(1)[0][0] if data else 0


def _type(values: list[str]) -> type:
    """Returns the type of a column: NoneType if it is empty, float for numbers and true or false, otherwise str."""
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


def _may_be_row(names: list[str], name: str, values: list[str]) -> bool:
    """Whether the supposed header could be the first row of a file without a header.

    ``name`` is the column that holds the text. In a header, only the first name, as of an index, and the last can be
    empty.
    """
    others = names[not names[0] : len(names) - (not names[-1])]
    filled = [value for value in values if value]
    num_like_names = len(list(filter(_NAME.fullmatch, filled)))
    return (
        _is_unknown_column(names)
        or not _NAME.fullmatch(name)
        or len(set(names)) < len(names)
        or any(not each or _is_number(each) for each in others)
        or (name.lower() not in _USUAL_NAMES and 2 * num_like_names > len(filled))
    )


def _is_unknown_column(names: list[str]) -> bool:
    """Whether there is only one column, whose name could be any line of a text."""
    return len(names) - (not names[-1]) == 1 and names[0].lower() not in _USUAL_NAMES


class MalformedRowError(csv.Error):
    """A row has a quote that is not closed or not doubled, in the lines that were read of it."""

    def __init__(self, error: csv.Error, lines: list[str]):
        super().__init__(str(error))
        self.lines = lines


class Lines:
    """The decoded lines of a file, each with its line end, and the position of reading.

    A first line ``sep=;``, which tells Excel the delimiter, is left out, and so is a last byte 0x1A, as in DOS files.
    """

    def __init__(self, path: Path, config: DataConfig, position: tuple[int, int] | None = None):
        """Creates an iterator over lines.

        Args:
            position: the offset in bytes and the number of lines from which to continue.
        """
        self.path, self._encoding_errors = path, config.encoding_errors
        self.offset, self.number = position or (text_start(path), 0)
        self.has_ended = False
        self.separator: str | None = None
        """The delimiter that the line ``sep=`` names."""

    def __iter__(self) -> Iterator[str]:
        for encoded in encoded_lines(self.path, self.offset):
            # Only the last line can end so.
            if not (line := encoded.removesuffix(b"\x1a")):
                break
            text = decoded(line, self._encoding_errors, self.path, self.offset)
            self.offset += len(line)
            self.number += 1
            if self.number == 1 and (match := _SEPARATOR.fullmatch(text)):
                self.separator = match[1]
            else:
                yield text
        self.has_ended = True


def parsed(lines: Iterable[str], format: Format) -> Iterator[tuple[list[str], list[str]]]:
    """Yields the lines of each row, and its fields. A blank line has no fields.

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
    try:
        for fields in reader:
            if len(fields) == 1 and not "".join(row).strip():
                fields = []
            yield row[:], _with_spaces("".join(row), fields, format.delimiter) if format.has_spaces else fields
            row.clear()
    except csv.Error as error:
        raise MalformedRowError(error, row) from error


def rows(lines: Lines, format: Format) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yields the number of the first line, the lines and the fields of each row that is not blank.

    Raises:
        ValueError: a quote is not closed, or not doubled.
    """
    try:
        for row_lines, fields in parsed(lines, format):
            if fields:
                yield lines.number + 1 - len(row_lines), row_lines, fields
    except MalformedRowError as error:
        if lines.has_ended or "field limit" in str(error):
            first = lines.number + 1 - len(error.lines)
            what = f"{lines.path}, line {first}: a quote is opened in the row that begins here, and never closed"
        else:
            what = (
                f"{lines.path}, line {lines.number}: text follows the closing quote of a field ({error}): a quote in it "
                "must be doubled"
            )
        if any('\\"' in each for each in error.lines):
            what += '. The row has quotes written as \\", a form that is used only if all of the first rows fit it'
        raise ValueError(f"{what}. If quotes are ordinary characters, set data.csv_quoting=false") from error


def _with_spaces(row: str, fields: list[str], delimiter: str) -> list[str]:
    """Returns the fields with the spaces that were skipped, except for spaces before quotes."""
    position = 0
    for index in range(len(fields)):
        quoted = _QUOTED.match(row, position)
        end = row.find(delimiter, quoted.end() if quoted else position)
        if quoted is None:
            fields[index] = row[position:end] if end >= 0 else row[position:].rstrip("\r\n")
        position = end + 1
    return fields
