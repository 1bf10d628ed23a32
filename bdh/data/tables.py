"""Rows of parquet files, and of data sets that the ``datasets`` library reads, from the hub or in its layout."""

import logging
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from bdh.data.config import BUILTIN, DataConfig
from bdh.data.files import file_type, is_saved_to_disk
from bdh.data.reading import (
    PEEKED_ROWS,
    Chunk,
    ColumnError,
    DocumentReader,
    Skipped,
    State,
    TextColumn,
    choose_column,
    from_plain,
    row_text,
    split_document,
    to_plain,
)
from bdh.words import nearest

ROWS_AT_ONCE = 256  # rows of a parquet file; more would not be faster
_SHAKESPEARE_ID = "karpathy/tiny_shakespeare"
# The conversion by the hub, since the repository is a loading script, which datasets no longer runs.
_SHAKESPEARE_REVISION = "refs/convert/parquet"
_PYTHON: dict[str, type] = {"string": str, "large_string": str, "null": type(None)}  # the relevant types of Arrow
_logger = logging.getLogger(__name__)


@contextmanager
def _explained(fault: str) -> Iterator[None]:
    """A context that converts the various errors of pyarrow, pandas, fsspec and datasets to ``ValueError``."""
    try:
        yield
    except ColumnError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"{fault}: {reason}") from error


class TableReader:
    """Reads the rows of a ``datasets`` table, each of which is a document."""

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
        """Creates a reader.

        Args:
            rows: a ``datasets.IterableDataset``.
            column: the column that holds the text.
            where: the name of the table, for error messages.
            fault: the beginning of the error message if a row cannot be read.
            encoding_errors: the setting ``data.encoding_errors``.
            skipped: counts rows without text.
            state: the position of another reader, from which to continue.
        """
        self._rows, self._column, self._where, self._fault = rows, column, where, fault
        self._encoding_errors, self._skipped = encoding_errors, skipped
        self._num_rows: int = state["num_rows"] if state else 0
        self._is_lost = False  # whether the table's own state is past a row that could not be read
        self._pending = deque(from_plain(state["pending"]) if state else ())
        self._num_passed = 0  # the number of rows to skip
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
        rows = self._remaining()
        while True:
            while self._pending:
                yield self._pending.popleft()
            self._is_lost = True
            row = next(rows, None)
            if row is None:
                self._is_lost = False
                return
            where = f"{self._where}, row {self._num_rows + 1}"
            utf8 = row_text(row.get(self._column), self._column, where, self._encoding_errors, self._skipped)
            self._num_rows, self._is_lost = self._num_rows + 1, False
            if utf8:
                self._pending.extend(split_document(utf8))

    def _remaining(self) -> Iterator[Any]:
        with _explained(self._fault):  # entered once: entering it for each row would take a fifth of the time
            yield from islice(self._rows, self._num_passed, None)


def parquet_reader(
    path: Path, column: TextColumn, config: DataConfig, skipped: Skipped, state: State | None = None
) -> DocumentReader:
    """Returns a reader of the rows of a .parquet file, each of which is a document.

    Iterating raises ``ValueError`` if the file is damaged.
    """

    def documents(after: State) -> Iterator[tuple[bytes | None, State]]:
        first = after.get("num_rows", 0)
        for number, text in enumerate(_parquet_values(path, column.name, first), start=first + 1):
            where = f"{path}, row {number}"
            yield row_text(text, column.name, where, config.encoding_errors, skipped), {"num_rows": number}

    return DocumentReader(documents, state)


def _parquet_values(path: Path, column: str, first: int) -> Iterator[Any]:
    """Yields the values of a column, starting at row ``first``."""
    from pyarrow import parquet

    # Not with datasets, which takes thirty times as long for short rows.
    with _explained(f"{path} cannot be read as {file_type(path)}"), parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if first < num_rows:
                for rows in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column]):
                    yield from rows.column(column)[first:].to_pylist()
                    first = max(0, first - len(rows))
            else:
                first -= num_rows


def parquet_column(path: Path, config: DataConfig) -> TextColumn | None:
    """Returns the column that holds the text, or None if there are no rows; see :func:`bdh.data.reading.choose_column`.

    Raises:
        ColumnError: the wanted column does not exist; or none is given, and not exactly one column has strings.
        ValueError: the file is damaged.
    """
    from pyarrow import parquet

    with _explained(f"{path} cannot be read as {file_type(path)}"), parquet.ParquetFile(path) as file:
        if file.metadata.num_rows == 0:  # columns of an empty shard can have another type, or be missing
            return None
        return TextColumn(choose_column(_types(file.schema_arrow), config.text_column, str(path)))


def _types(schema: Any) -> dict[str, set[type]]:
    """Returns the types of the columns of a ``pyarrow.Schema``."""
    return {field.name: {_PYTHON.get(str(field.type), object)} for field in schema}


def _text_column(rows: Any, wanted: str | None, where: str) -> str | None:
    """Returns the column that holds the text of a ``datasets.Dataset`` or ``IterableDataset``; None if it has no rows.

    If the table does not know the types of its columns, the first rows determine them.
    """
    if rows.features is not None:
        return choose_column(_types(rows.features.arrow_schema), wanted, where)
    types: dict[str, set[type]] = {}
    for row in rows.take(PEEKED_ROWS):
        for name, value in row.items():
            types.setdefault(name, set()).add(type(value))
    return choose_column(types, wanted, where) if types else None


class HubSet:
    """A split of a data set."""

    def __init__(self, path: str, split: str, config: DataConfig):
        """Finds the split.

        With ``streaming``, this fetches only the description of the data set, and its first rows if that does not list
        the columns.

        Raises:
            FileNotFoundError: the data set does not exist, or the hub cannot be reached.
            ValueError: the data set has no such configuration or split, or no column that holds the text.
        """
        import datasets

        self.where = f"{path}, split {split}"
        self._fault, self._encoding_errors = f"{self.where} cannot be read", config.encoding_errors
        load = partial(
            _load_split, path, name=config.name, split=split, revision=config.revision, streaming=config.streaming
        )
        _announce(path)
        rows = load()
        is_csv = rows.info.builder_name == "csv"
        if is_csv:
            import pandas

            # If rows have more fields than the header, pandas would take the first column for an index or, with
            # index_col=False, cut off such rows with no more than a warning.
            warnings.filterwarnings("error", "Length of header or names", pandas.errors.ParserWarning)
            load = partial(load, index_col=False)
            rows = load()
        with _explained(self._fault):
            found = _text_column(rows, config.text_column, self.where)
        if found is None:
            raise ValueError(f"{self.where} has no rows")
        if is_csv and any(delimiter in found for delimiter in ";\t|"):
            raise ValueError(
                f"{self.where}: the fields seem to be separated by a character other than a comma, as a column is "
                f"called {found!r}: give the files themselves as data.source, with data.csv_delimiter"
            )
        if is_csv:  # pandas would read 007 as a number, and NA, null and None as missing
            names = rows.column_names or list(next(iter(rows)))
            load = partial(load, converters=dict.fromkeys(names, str), keep_default_na=False, na_values=[""])
            rows = load()
        self.column = found
        # There is no public name for it, and with None the tokens of two data sets could be confused. Checked with
        # datasets 5.2; tests/data/test_hub.py fails if it changes.
        self.identity: str | None = rows._fingerprint if isinstance(rows, datasets.Dataset) else None
        """A value that differs if the data differ; None when streaming, since datasets does not know it then."""
        # A streamed data set contains the position of its only reader, so each reader loads its own.
        self._rows = load if self.identity is None else lambda: rows

    def open(self, skipped: Skipped, state: State | None) -> TableReader:
        """Returns a reader of the rows."""
        import datasets

        rows = self._rows()
        if rows.features is not None:
            rows = rows.select_columns([self.column])  # otherwise all columns would be decoded
        if isinstance(rows, datasets.Dataset):
            rows = rows.to_iterable_dataset()
        return TableReader(rows, self.column, self.where, self._fault, self._encoding_errors, skipped, state)


def local_tables(path: str, *, name: str | None, split: str) -> list[Path] | None:
    """Returns the .json, .jsonl, .csv, .tsv or .parquet files of a split in a local folder.

    They are read like any other files, so that only the column with the text matters, while ``datasets`` requires the
    same columns in all rows. The result is None for other files, for .csv files whose format the data card describes,
    and for what :func:`_load_split` refuses.
    """
    import datasets

    folder = Path(path)
    if not folder.is_dir() or is_saved_to_disk(folder):
        return None
    try:
        builder = datasets.load_dataset_builder(path, name)
    except (ValueError, RuntimeError, OSError):
        return None  # _load_split reports the error
    config = builder.config
    if builder.name not in ("json", "csv", "parquet") or getattr(config, "field", None) is not None:
        return None
    files = [Path(file) for file in (config.data_files or {}).get(split, [])]
    if not all(file.is_file() and file_type(file) is not None for file in files):
        return None
    if builder.name == "csv":  # the separator can depend on the file names
        is_usual = config.sep == "," or (config.sep == "\t" and all(file_type(file) == ".tsv" for file in files))
        defaults = type(config)(sep=config.sep)
        if not is_usual or any(getattr(config, each) != getattr(defaults, each) for each in config.pd_read_csv_kwargs):
            return None
    return files


def _announce(path: str) -> None:
    """Logs that the hub is asked, since this takes a while to fail without a network."""
    from huggingface_hub import constants

    if not Path(path).is_dir() and not constants.HF_HUB_OFFLINE:
        _logger.warning("asking the Hugging Face hub for the data set %s", path)


def _load_split(
    path: str, *, name: str | None, split: str, revision: str | None, streaming: bool, **options: Any
) -> Any:
    """Calls ``datasets.load_dataset``, and makes its errors readable. Folders of ``save_to_disk`` are loaded too."""
    import datasets

    folder = Path(path)
    if folder.is_dir() and is_saved_to_disk(folder):
        try:
            loaded = datasets.load_from_disk(path)
        except (KeyError, TypeError, ValueError) as error:  # from files that it does not check
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{path} is damaged, or not what save_to_disk of datasets wrote ({reason})") from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split not in loaded:
            raise ValueError(f"{path} has no split {split!r}: it has {', '.join(loaded)}")
        return loaded[split]
    # A local folder is streamed: copying it into the cache of datasets would have no benefit.
    streaming = streaming or folder.is_dir()
    try:
        return datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming, **options)
    except OSError as error:
        if folder.is_dir():
            raise
        near = nearest(path, BUILTIN, 0.75)
        hint = f"Did you mean {near}? " if near else ""
        raise FileNotFoundError(
            f"data.source {path!r} is not a file, folder or built-in text, and no data set of that name was loaded "
            f"from the hub ({(str(error).splitlines() or [''])[0]}). {hint}Without a network these work: pydoc and "
            "stdlib, local files and folders, and data sets that are in the hub's cache, with HF_HUB_OFFLINE=1"
        ) from error
    except (ValueError, RuntimeError) as error:
        settings = f"data.name {name!r}, data.split {split!r}, data.revision {revision!r}"
        raise ValueError(f"{path} cannot be loaded with {settings}: {' '.join(str(error).split())}") from error


def shakespeare() -> bytes:
    """Returns the 1.1 MB of "tiny shakespeare". Its three splits were cut from one text, and are joined again.

    Raises:
        FileNotFoundError: the hub cannot be reached, and the data set is not in its cache.
    """
    _announce(_SHAKESPEARE_ID)
    load = partial(_load_split, _SHAKESPEARE_ID, name=None, revision=_SHAKESPEARE_REVISION, streaming=False)
    return "".join(text for split in ("train", "validation", "test") for text in load(split=split)["text"]).encode()
