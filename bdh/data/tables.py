"""Rows of JSON files, of parquet files, and of what the ``datasets`` library reads: data sets of the hub or in its layout.

A JSON file holds an object in each line, or objects over any lines, in an array or not. Each row is read alone, so only the
wanted field of it matters: what the others hold, and in which rows, is all the same. Tables in .csv files are in
:mod:`bdh.data.csv_files`.
"""

import glob
import json
import re
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from bdh.data.config import DataConfig, file_type, is_saved_to_disk
from bdh.data.reading import (
    PEEKED_ROWS,
    Chunk,
    ColumnError,
    DocumentReader,
    Skipped,
    State,
    choose_column,
    decoded,
    file_chunks,
    from_plain,
    row_text,
    split_document,
    text_lines,
    text_start,
    to_plain,
)

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_INTEGERS_AS_FLOATS = json.JSONDecoder(parse_int=float)
_PAIRS = json.JSONDecoder(object_pairs_hook=list, parse_int=float)

_SHAKESPEARE_ID = "karpathy/tiny_shakespeare"
# The hub's own conversion: the repository itself is a loading script, which datasets no longer runs.
_SHAKESPEARE_REVISION = "refs/convert/parquet"
_PYTHON: dict[str, type] = {"string": str, "large_string": str, "null": type(None)}  # of the types that matter


class Row(NamedTuple):
    """An object of a JSON file."""

    value: dict[str, Any]
    where: str
    """File and line, for errors."""
    after: State
    """Where :func:`json_rows` continues with the next one."""


class JsonColumn(NamedTuple):
    """The field that holds the text."""

    name: str
    strings: frozenset[str] | None
    """Where it was guessed, the fields that held a string in the first rows: no other one may come to hold one."""


def json_reader(
    path: Path, column: JsonColumn, encoding_errors: str, skipped: Skipped, state: State | None = None
) -> DocumentReader:
    """The rows of a JSON file, one document each.

    Iterating raises:
        ColumnError: the column was guessed, and another one holds a string, as none of the first rows has it.
        ValueError: a row is no JSON object, or its column is given twice or holds something else than text.
    """
    if state and "rows" in state:
        raise ValueError(f"{path}: the position in it was stored by an earlier version of bdh, and cannot be used")

    def documents(after: State) -> Iterator[tuple[bytes | None, State]]:
        for row in json_rows(path, encoding_errors, after, once=column.name):
            known = row.value if column.strings is None else column.strings
            for name, value in row.value.items():
                if type(value) is str and name not in known:
                    raise ColumnError(
                        f"{row.where}: set data.text_column, as column {name!r} holds a string too: {column.name!r} was "
                        "guessed from the first rows, where it did not"
                    )
            text = row.value.get(column.name)
            yield row_text(text, column.name, row.where, encoding_errors, skipped), row.after

    return DocumentReader(documents, state)


def json_column(path: Path, config: DataConfig) -> JsonColumn | None:
    """The field that holds the text, or None if there is not a single row.

    The first rows tell, and as many more as it takes to find the wanted one, or any that holds strings.

    Raises:
        ColumnError: the wanted field is in no row; or none is wanted, and not exactly one holds strings.
        ValueError: a row that was looked at is no JSON object.
    """
    types: dict[str, set[type]] = {}
    number, wanted = 0, config.text_column
    for number, row in enumerate(json_rows(path, config.encoding_errors), start=1):
        if wanted is not None and wanted in row.value:
            return JsonColumn(wanted, None)
        for name, value in row.value.items():
            types.setdefault(name, set()).add(type(value))
        if wanted is None and number >= PEEKED_ROWS and any(str in found for found in types.values()):
            break
    if not number:
        return None
    strings = frozenset(name for name, found in types.items() if str in found)
    return JsonColumn(choose_column(types, wanted, str(path)), strings)


def json_rows(
    path: Path, encoding_errors: str, after: State | None = None, *, once: str | None = None
) -> Iterator[Row]:
    """The objects of a file, or those after a row.

    Where each line is an object, one line is read after the other. A file of another form (its first line is no object
    of its own) is held in memory as a whole.

    Args:
        once: a field that no object may have twice.

    Raises:
        ValueError: the text is not UTF-8, not JSON, or something else than objects, or an object has a field twice; the
            message has the line.
    """
    after = after or {}
    spellings = set() if once is None else {json.dumps(once), json.dumps(once, ensure_ascii=False)}

    def checked(value: Any, written: str, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f'{where} is {value!r:.80}: must be an object, such as {{"text": "..."}}')
        if sum(map(written.count, spellings)) > 1:  # seldom: in an object inside of it, or as a text
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
            row = {"text": value} if isinstance(value, str) else value  # an array may hold nothing but texts
            yield Row(checked(row, written, where), where, {"row": number})


def parse_line(text: str, where: str) -> Any:
    """The JSON value of a line. Raises ValueError: it is none; the message says where in the line."""
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
    """Whether values stand in an array or over several lines."""
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
    """The elements of an array, or values one after the other; each with how it is written and the number of its line."""
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
    except ValueError:  # a number of more digits than Python makes an int of
        return _INTEGERS_AS_FLOATS.raw_decode(text, at)


def _end_of_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


@contextmanager
def _explained(fault: str) -> Iterator[None]:
    """Makes errors of pyarrow, pandas, fsspec and datasets, each of which raises its own, into a ValueError."""
    try:
        yield
    except ColumnError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"{fault}: {reason}") from error


class TableReader:
    """The rows of a ``datasets`` table, one document each."""

    def __init__(
        self,
        rows: Any,
        column: str,
        where: str,
        fault: str,
        encoding_errors: str,
        skipped: Skipped,
        state: State | None = None,
    ):
        """
        Args:
            rows: a ``datasets.IterableDataset``.
            where: the name of the table, for errors.
            fault: how the message begins where a row cannot be read.
        """
        self._rows, self._column, self._where, self._fault = rows, column, where, fault
        self._encoding_errors, self._skipped = encoding_errors, skipped
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

    def __iter__(self) -> Iterator[Chunk]:
        rows = islice(self._rows, self._num_passed, None)
        while True:
            while self._pending:
                yield self._pending.popleft()
            self._is_lost = True
            with _explained(self._fault):
                row = next(rows, None)
            if row is None:
                self._is_lost = False
                return
            where = f"{self._where}, row {self._num_rows + 1}"
            utf8 = row_text(row.get(self._column), self._column, where, self._encoding_errors, self._skipped)
            self._num_rows, self._is_lost = self._num_rows + 1, False
            if utf8:
                self._pending.extend(split_document(utf8))


def parquet_reader(
    path: Path, column: str, encoding_errors: str, skipped: Skipped, state: State | None = None
) -> TableReader:
    """The rows of a .parquet file, one document each. Raises ValueError: the file is damaged."""
    fault = f"{path} cannot be read as {file_type(path)}"
    with _explained(fault):
        rows = _parquet_rows(path, column)
    return TableReader(rows, column, str(path), fault, encoding_errors, skipped, state)


def parquet_column(path: Path, config: DataConfig) -> str | None:
    """The column that holds the text, or None if there are no rows; see :func:`bdh.data.reading.choose_column`.

    Raises:
        ColumnError: the wanted column is not there; or none is wanted, and not exactly one holds strings.
        ValueError: the file is damaged.
    """
    from pyarrow import parquet

    with _explained(f"{path} cannot be read as {file_type(path)}"):
        if parquet.read_metadata(path).num_rows == 0:  # such a shard may have another type of column, or none at all
            return None
        return _text_column(_parquet_rows(path), config.text_column, str(path))


def _parquet_rows(path: Path, column: str | None = None) -> Any:
    """A ``datasets.IterableDataset`` over a file; with ``column``, of this one alone."""
    from datasets import IterableDataset

    # Not load_dataset, which reports each call to the hub.
    return IterableDataset.from_parquet(glob.escape(str(path)), columns=None if column is None else [column])


def _text_column(rows: Any, wanted: str | None, where: str) -> str | None:
    """The column that holds the text of a ``datasets.Dataset`` or ``IterableDataset``, or None if there is no row.

    Where the table does not tell the types of its columns, the first rows do.
    """
    if rows.features is not None:
        types = {name: {_PYTHON.get(getattr(each, "dtype", ""), object)} for name, each in rows.features.items()}
        return choose_column(types, wanted, where)
    types = {}
    for row in rows.take(PEEKED_ROWS):
        for name, value in row.items():
            types.setdefault(name, set()).add(type(value))
    return choose_column(types, wanted, where) if types else None


class HubSet:
    """One split of a data set."""

    def __init__(self, path: str, split: str, config: DataConfig):
        """Finds the split; with ``streaming`` nothing but its description is fetched.

        Raises:
            FileNotFoundError: there is no such data set, or the hub cannot be reached.
            ValueError: it has no such configuration or split, or no column that holds the text.
        """
        self.where = f"{path}, split {split}"
        self._fault, self._encoding_errors = f"{self.where} cannot be read", config.encoding_errors
        load = partial(
            _load_split, path, name=config.name, split=split, revision=config.revision, streaming=config.streaming
        )
        rows = load()
        is_csv = rows.info.builder_name == "csv"
        if is_csv:
            import pandas

            # pandas takes the first column for an index where rows have more fields than the header; without, it cuts such
            # rows off, and only warns.
            warnings.filterwarnings("error", "Length of header or names", pandas.errors.ParserWarning)
            load = partial(load, index_col=False)
            rows = load()
        with _explained(self._fault):
            found = _text_column(rows, config.text_column, self.where)
        if found is None:
            raise ValueError(f"{self.where} has no rows")
        if is_csv and any(delimiter in found for delimiter in ";\t|"):
            raise ValueError(
                f"{self.where}: the fields seem to be separated by another character than a comma, as a column is called "
                f"{found!r}: take the files, with data.csv_delimiter, as data.source"
            )
        if is_csv:  # pandas would take 007 for a number, and NA, null and None for nothing
            names = rows.column_names or list(next(iter(rows)))
            load = partial(load, converters=dict.fromkeys(names, str), keep_default_na=False, na_values=[""])
            rows = load()
        self.column = found
        self.identity: str | None = getattr(rows, "_fingerprint", None)
        """Equal for equal data, where datasets knows it; None when streaming."""
        # A streamed data set carries the position of its one reader: each reader loads its own.
        self._rows = load if self.identity is None else lambda: rows

    def open(self, skipped: Skipped, state: State | None) -> TableReader:
        """A reader of its rows."""
        import datasets

        rows = self._rows()
        if rows.features is not None:
            rows = rows.select_columns([self.column])  # else every column of every row would be decoded
        if isinstance(rows, datasets.Dataset):
            rows = rows.to_iterable_dataset()
        return TableReader(rows, self.column, self.where, self._fault, self._encoding_errors, skipped, state)


def local_tables(path: str, *, name: str | None, split: str) -> list[Path] | None:
    """The .json, .jsonl, .csv, .tsv or .parquet files of a split of a local folder, which are read as any others.

    So only the column of the text matters, where ``datasets`` wants the same columns in all rows. None for other files,
    for .csv files whose form the data card describes, and for what :func:`_load_split` refuses.
    """
    import datasets

    folder = Path(path)
    if not folder.is_dir() or is_saved_to_disk(folder):
        return None
    try:
        builder = datasets.load_dataset_builder(path, name)
    except (ValueError, RuntimeError, OSError):
        return None  # _load_split raises it again, and says what is wrong
    config = builder.config
    if builder.name not in ("json", "csv", "parquet") or getattr(config, "field", None) is not None:
        return None
    files = [Path(file) for file in (config.data_files or {}).get(split, [])]
    if not all(file.is_file() and file_type(file) is not None for file in files):
        return None
    if builder.name == "csv":  # sep may follow from the names
        is_usual = config.sep == "," or (config.sep == "\t" and all(file_type(file) == ".tsv" for file in files))
        defaults = type(config)(sep=config.sep)
        if not is_usual or any(getattr(config, each) != getattr(defaults, each) for each in config.pd_read_csv_kwargs):
            return None
    return files


def _load_split(
    path: str, *, name: str | None, split: str, revision: str | None, streaming: bool, **options: Any
) -> Any:
    """``datasets.load_dataset``, with errors for the reader; folders of ``save_to_disk`` open too."""
    import datasets

    folder = Path(path)
    if folder.is_dir() and is_saved_to_disk(folder):
        try:
            loaded = datasets.load_from_disk(path)
        except (KeyError, TypeError, ValueError) as error:  # of files that it reads unchecked
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{path} is damaged, or not what save_to_disk of datasets wrote ({reason})") from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split not in loaded:
            raise ValueError(f"{path} has no split {split!r}: it has {', '.join(loaded)}")
        return loaded[split]
    # A local folder is read where it is; copying it into the cache of datasets would gain nothing.
    streaming = streaming or folder.is_dir()
    try:
        return datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming, **options)
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"data.source {path!r} is no file, folder or built-in text, and the hub did not give a data set of that name "
            f"({(str(error).splitlines() or [''])[0]}). Without a network these work: pydoc and stdlib, local files and "
            "folders, and data sets that are in the hub's cache, with HF_HUB_OFFLINE=1"
        ) from error
    except (ValueError, RuntimeError) as error:
        settings = f"data.name {name!r}, data.split {split!r}, data.revision {revision!r}"
        raise ValueError(f"{path} cannot be loaded with {settings}: {' '.join(str(error).split())}") from error


def shakespeare() -> bytes:
    """The 1.1 MB of "tiny shakespeare". Its three splits were cut from one text, and are joined to it again.

    Raises:
        FileNotFoundError: the hub cannot be reached, and the data set is not in its cache.
    """
    load = partial(_load_split, _SHAKESPEARE_ID, name=None, revision=_SHAKESPEARE_REVISION, streaming=False)
    return "".join(text for split in ("train", "validation", "test") for text in load(split=split)["text"]).encode()
