"""Rows of JSON files: one object per line, or objects that can span lines, within an array or not.

Each row is read independently. Only the field that holds the text matters: other fields can hold anything, and can be
missing in some rows.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bdh.data.config import DataConfig
from bdh.data.reading import (
    PEEKED_ROWS,
    ColumnError,
    DocumentReader,
    Skipped,
    State,
    TextColumn,
    choose_column,
    decoded,
    file_chunks,
    row_text,
    text_lines,
    text_start,
)

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_INTEGERS_AS_FLOATS = json.JSONDecoder(parse_int=float)
_PAIRS = json.JSONDecoder(object_pairs_hook=list, parse_int=float)


class Row(NamedTuple):
    """An object of a JSON file."""

    value: dict[str, Any]
    where: str
    """File and line, for error messages."""
    after: State
    """The position from which :func:`json_rows` continues with the next row."""


def json_reader(
    path: Path, column: TextColumn, config: DataConfig, skipped: Skipped, state: State | None = None
) -> DocumentReader:
    """Returns a reader of the rows of a JSON file, each of which is a document.

    Raises:
        ValueError: the state is from an earlier version of bdh.

    Iterating raises:
        ColumnError: the column was guessed, and another field contains a string that had none in the first rows.
        ValueError: a row is not a JSON object, or has the column twice, or with something other than text.
    """
    if state and "rows" in state:
        raise ValueError(f"{path}: the position in it was stored by an earlier version of bdh, and cannot be used")

    def documents(after: State) -> Iterator[tuple[bytes | None, State]]:
        for row in json_rows(path, config.encoding_errors, after, once=column.name):
            known = row.value if column.strings is None else column.strings
            for name, value in row.value.items():
                if type(value) is str and name not in known:
                    raise ColumnError(
                        f"{row.where}: set data.text_column, as column {name!r} holds a string too: {column.name!r} was "
                        "guessed from the first rows, where it did not"
                    )
            text = row.value.get(column.name)
            yield row_text(text, column.name, row.where, config.encoding_errors, skipped), row.after

    return DocumentReader(documents, state)


def json_column(path: Path, config: DataConfig) -> TextColumn | None:
    """Returns the field that holds the text, or None if there are no rows.

    It reads the first rows, and then further ones until it finds the wanted field or, without one, a field with
    strings.

    Raises:
        ColumnError: the wanted field is in no row; or none is given, and not exactly one field has strings.
        ValueError: a row that was read is not a JSON object.
    """
    types: dict[str, set[type]] = {}
    number, wanted = 0, config.text_column
    for number, row in enumerate(json_rows(path, config.encoding_errors), start=1):
        if wanted is not None and wanted in row.value:
            return TextColumn(wanted)
        for name, value in row.value.items():
            types.setdefault(name, set()).add(type(value))
        if wanted is None and number >= PEEKED_ROWS and any(str in found for found in types.values()):
            break
    if not number:
        return None
    strings = frozenset(name for name, found in types.items() if str in found)
    return TextColumn(choose_column(types, wanted, str(path)), strings)


def json_rows(
    path: Path, encoding_errors: str, after: State | None = None, *, once: str | None = None
) -> Iterator[Row]:
    """Yields the objects of a file, or those after a row.

    If each line is an object, the lines are read one by one. Any other file, whose first line is not a complete object,
    is held in memory as a whole.

    Args:
        path: the file.
        encoding_errors: the setting ``data.encoding_errors``.
        after: :attr:`Row.after` of the row after which to start.
        once: a field that no object may have twice.

    Raises:
        ValueError: the text is not UTF-8 or not JSON, a value is not an object, or an object has a field twice. The
            message contains the line.
    """
    after = after or {}
    spellings = set() if once is None else {json.dumps(once), json.dumps(once, ensure_ascii=False)}

    def checked(value: Any, written: str, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f'{where} is {value!r:.80}: must be an object, such as {{"text": "..."}}')
        if sum(map(written.count, spellings)) > 1:  # rare: the name may also occur in a nested object or a text
            names = [name for name, _ in _PAIRS.raw_decode(written, _end_of_space(written, 0))[0]]
            if names.count(once) > 1:
                raise ValueError(f"{where}: column {once!r} is given twice: give it once")
        return value

    if not ("row" in after or _is_array(path, encoding_errors)):
        for line in text_lines(path, encoding_errors, after.get("offset", 0), after.get("line", 1)):
            where = f"{path}, line {line.number}"
            value = checked(parse_line(line.text, where), line.text, where)
            yield Row(value, where, {"offset": line.end, "line": line.number + 1})
        return
    for number, (value, written, line_number) in enumerate(_values(path, encoding_errors), start=1):
        if number > after.get("row", 0):
            where = f"{path}, row {number}, line {line_number}"
            row = {"text": value} if isinstance(value, str) else value  # an array can also consist of texts
            yield Row(checked(row, written, where), where, {"row": number})


def parse_line(text: str, where: str) -> Any:
    """Returns the JSON value of a line. Raises ``ValueError`` with the position of the error if it is not JSON."""
    text = text.strip(" \t\n\r")
    try:
        value, end = _decode(text, 0)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, _end_of_space(text, end))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} (column {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deeply") from error
    return value


def _is_array(path: Path, encoding_errors: str) -> bool:
    """Whether the values are in an array, or span several lines."""
    first = next((line.text.strip() for line in text_lines(path, encoding_errors)), "")
    if first.startswith("[") or first == "{":
        return True
    if ".jsonl" in path.name.lower():
        return False
    with suppress(ValueError):
        parse_line(first, "")
        return False
    return True


def _values(path: Path, encoding_errors: str) -> Iterator[tuple[Any, str, int]]:
    """Yields the elements of an array, or consecutive values, each with its source text and the number of its line."""
    start = text_start(path)
    text = decoded(b"".join(file_chunks(path, start)), encoding_errors, path, start, 1)
    at = counted = _end_of_space(text, 0)
    line = 1 + text.count("\n", 0, at)
    is_array = text.startswith("[", at)
    at += is_array
    has_begun = False
    try:
        while (at := _end_of_space(text, at)) < len(text) or is_array:
            if is_array and text.startswith("]", at):
                at = _end_of_space(text, at + 1)
                if at < len(text):
                    raise json.JSONDecodeError("Extra data", text, at)
                return
            if is_array and has_begun:
                if not text.startswith(",", at):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
                at = _end_of_space(text, at + 1)
            line, counted = line + text.count("\n", counted, at), at
            begin = at
            value, at = _decode(text, begin)
            has_begun = True
            yield value, text[begin:at], line
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno} is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{path}, line {line} is not JSON that can be read: it is nested too deeply") from error


def _decode(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer with more digits than Python converts
        return _INTEGERS_AS_FLOATS.raw_decode(text, at)


def _end_of_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
