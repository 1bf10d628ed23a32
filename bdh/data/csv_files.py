"""Tables in .csv and .tsv files: a reader of their rows, and what is reported of them.

Every row must have as many fields as the header: neither is a column ever taken for an index, nor a field cut off. Where
the header lacks it, rows may end with one more delimiter, if all do.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bdh.data.csv_layout import CsvSettings, Layout, Lines, find_layout, rows
from bdh.data.reading import NO_TEXT, DocumentReader, Skipped, State

SHOWN_CHARACTERS = 60
_BAD_ROWS = "rows with another number of fields than the header"
_MAX_COUNTED_BYTES = 1 << 26
_MAX_SHOWN_FILES = 3
_logger = logging.getLogger(__name__)


def csv_reader(
    path: Path,
    layout: Layout,
    settings: CsvSettings,
    encoding_errors: str,
    skipped: Skipped,
    state: State | None = None,
) -> DocumentReader:
    """The rows of a .csv or .tsv file, one document each. Iterating raises as :func:`csv_texts`."""

    def documents(after: State) -> Iterator[tuple[bytes | None, State]]:
        lines = Lines(path, encoding_errors, (after["offset"], after["line"]) if after else None)
        for text in csv_texts(lines, layout, settings):
            if not text:
                skipped.add(NO_TEXT if text is not None else _BAD_ROWS)
            yield (text or "").encode(), {"offset": lines.offset, "line": lines.number}

    return DocumentReader(documents, state)


def csv_texts(lines: Lines, layout: Layout, settings: CsvSettings) -> Iterator[str | None]:
    """The text of each row, also where it is empty; None for a row with another number of fields that is skipped.

    Raises:
        ValueError: a row has another number of fields than the header, or quotes that are not closed or not doubled;
            or the file is not UTF-8, damaged or cut off.
    """
    checks_quotes = layout.format.has_quoting and settings.quoting is None
    begins, found = lines.number == 0, rows(lines, layout.format)
    if begins and layout.has_header:
        next(found, None)
    for line, row_lines, fields in found:
        where = f"{lines.path}, line {line}"
        if checks_quotes and len(row_lines) > 1 and layout.may_be_rows(row_lines):
            raise ValueError(
                f"{where}: it cannot be told whether the {len(row_lines)} lines from {row_lines[0]!r:.60} on are "
                "one row, of which quotes enclose a field, or as many rows. Set data.csv_quoting=true if quotes enclose "
                "fields; or data.csv_quoting=false if they are characters like any other"
            )
        if layout.format.has_escapes and any(each.rstrip("\r\n").endswith("\\") for each in row_lines[:-1]):
            raise ValueError(
                f"{where}: a line in quotes ends with a backslash, and it cannot be told whether that is "
                "part of the text, as the quotes in this file have backslashes before them: write it with quotes doubled"
            )
        fits = layout.fits(fields)
        if not fits and settings.bad_rows != "skip":
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
    if len(fields) > layout.width and layout.format.has_quoting:
        ways.insert(0, f"A field that holds {delimiter!r} must be in quotes")
    elif len(fields) < layout.width and layout.format.has_quoting:
        ways.insert(0, "A field that holds a line end must be in quotes")
    if len(fields) > layout.width == 1:
        other = "tab" if delimiter != "\t" else "'|'"
        ways.insert(1, f"where lines are texts as they are, set data.csv_delimiter={other}")
    return (
        f"the row has {len(fields)} field{'s' * (len(fields) != 1)}, but {expected}: "
        f"{delimiter.join(fields)!r:.80}. {'; '.join(ways)}"
    )


def show_csv_columns(files: Iterable[Path], config: Any) -> None:
    """Says of each file which column holds the text, how many rows there are, and how the first text begins.

    The rows of the first files are counted, up to 64 MiB of text.

    Args:
        config: a ``DataConfig``.

    Raises:
        ValueError: as of :func:`find_layout`; and of :func:`csv_texts` in the counted rows.
    """
    settings, num_shown, num_bytes, further = CsvSettings.of(config), 0, 0, Counter[str]()
    for path in files:
        layout = find_layout(path, config.text_column, config.encoding_errors, settings)
        if layout is None:
            continue
        if num_shown == _MAX_SHOWN_FILES:
            further[layout.names[layout.column]] += 1
            continue
        lines = Lines(path, config.encoding_errors)
        texts, num_rows, is_all = csv_texts(lines, layout, settings), 0, False
        end = object()
        while num_bytes + lines.offset < _MAX_COUNTED_BYTES and not is_all:
            text = next(texts, end)
            is_all = text is end
            num_rows += not is_all and text is not None
        num_shown, num_bytes = num_shown + 1, num_bytes + lines.offset
        number = f"{num_rows:,} row{'s' * (num_rows != 1)}" if is_all else f"more than {num_rows:,} rows"
        _logger.warning(
            "%s: %s; %s, the first text begins %r", path, layout, number, layout.first_text[:SHOWN_CHARACTERS]
        )
    if further:
        columns = ", ".join(f"{name!r} in {number:,}" for name, number in further.items())
        _logger.warning("%s further tables: the text is column %s", f"{further.total():,}", columns)
