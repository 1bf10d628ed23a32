"""Local files: which there are, what each holds, and readers for them."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bdh.data.csv_files import CSV_TYPES, CsvReader, CsvSettings, find_layout
from bdh.data.jsonl import JsonReader, json_column
from bdh.data.parts import EMPTY_FILES, OTHER_TYPES, Skipped, describe
from bdh.data.paths import files_below, files_matching
from bdh.data.readers import (
    COMPRESSED,
    DocumentsReader,
    Reader,
    State,
    TableReader,
    TextFileReader,
    compression,
)
from bdh.data.tables import ColumnError, text_column

TEXT_TYPES = (".txt", ".md", ".py")
JSON_TYPES = (".jsonl", ".json")
TABLE_TYPES = (*JSON_TYPES, *CSV_TYPES)
PARQUET = ".parquet"  # which has a compression of its own


def file_type(path: Path) -> str | None:
    """The suffix that says what a file holds, without that of its compression; None if it is no known one."""
    suffix = os.path.splitext(path.name.lower().removesuffix(compression(path)))[1]
    is_known = suffix in TEXT_TYPES or suffix in TABLE_TYPES or (suffix == PARQUET and not compression(path))
    return suffix if is_known else None


def known_types() -> str:
    return f"{', '.join([*TEXT_TYPES, *TABLE_TYPES])}, each also as {' or '.join(COMPRESSED)}, and {PARQUET}"


def find_files(item: str, skipped: Skipped, setting: str = "data.source") -> list[Path] | None:
    """The files that a file's or folder's name or a glob stands for, in the same order on every system.

    In folders and globs, files of other types are counted as skipped, hidden files and folders are left out; see
    :func:`bdh.data.paths.files_below` for what else is.

    Args:
        setting: that names it, for the errors.

    Returns:
        None if it can only be a hub id: there is nothing of that name, and nothing says that there should be.

    Raises:
        FileNotFoundError: there is nothing of that name, or the folder or the glob gives no file of a known type.
        ValueError: the file is of an unknown type, or no regular file.
        OSError: a folder cannot be listed.
    """
    check_item(item, setting)
    path = Path(item).expanduser()
    if path.is_file():
        return [path]
    counts = Skipped()
    if path.is_dir():
        found = files_below(path, counts)
    elif glob.has_magic(item):
        found = files_matching(item, counts)
    else:
        return None
    files = [path for path in found if file_type(path) is not None]
    if len(files) < len(found):
        counts.add(OTHER_TYPES, len(found) - len(files))
    if not files:
        raise FileNotFoundError(
            f"{setting} {item!r} gives no file to read{describe(counts)}; known types are {known_types()}"
        )
    skipped.include(counts)
    return files


def check_item(item: str, setting: str = "data.source") -> None:
    """Whether a name of a source can be one of local files, as far as it tells without a look into folders.

    Raises:
        FileNotFoundError: there is nothing of that name, which is not that of a data set of the hub.
        ValueError: the file is of an unknown type, or no regular file.
    """
    path = Path(item).expanduser()
    if path.is_file():
        if file_type(path) is None:
            raise ValueError(f"{setting} {item!r} is of an unknown type: known are {known_types()}")
    elif path.exists():
        if not path.is_dir():
            raise ValueError(
                f"{setting} {item!r} is a pipe, a socket or a device: text is read more than once, so write it to a file"
            )
    elif path.is_symlink():
        raise FileNotFoundError(f"{setting} {item!r} is a broken link: there is no {os.readlink(path)}")
    elif not glob.has_magic(item) and _is_meant_as_path(item):
        raise FileNotFoundError(f"{setting} {item!r}: there is no such file or folder")


def item_names(source: str | Sequence[str]) -> list[str]:
    """The names in a setting. One that exists as it is may hold commas."""
    if not isinstance(source, str):
        return [item.strip() for item in source]
    if Path(source).expanduser().exists():
        return [source]
    return [item.strip() for item in source.split(",") if item.strip()]


def open_file(
    path: Path,
    column: str | None,
    encoding_errors: str,
    skipped: Skipped,
    state: State | None,
    csv_settings: CsvSettings,
) -> Reader:
    """A reader of a file's documents, by its type.

    Raises:
        ValueError: a table without the column, or of which no single column can be guessed, or that is damaged.
    """
    if file_type(path) in TEXT_TYPES:
        return TextFileReader(path, encoding_errors, skipped, state)
    if path.stat().st_size == 0:
        if state is None:
            skipped.add(EMPTY_FILES)
        return DocumentsReader(0, lambda number: None)
    if file_type(path) in CSV_TYPES:
        layout = find_layout(path, column, encoding_errors, csv_settings)
        if layout is not None:
            return CsvReader(path, layout, csv_settings, encoding_errors, skipped, state)
        skipped.add(EMPTY_FILES)
        return DocumentsReader(0, lambda number: None)

    column = find_column(path, column, encoding_errors)
    if column is None:
        skipped.add(EMPTY_FILES)
        return DocumentsReader(0, lambda number: None)
    if file_type(path) in JSON_TYPES:
        return JsonReader(path, column, encoding_errors, skipped, state)

    def explain(error: Exception) -> Exception:
        return _explain(path, error)

    try:
        rows = _rows(path, column)
    except Exception as error:  # pyarrow, fsspec and datasets each raise their own
        raise explain(error) from error
    return TableReader(rows, column, str(path), encoding_errors, skipped, explain, state)


def find_column(path: Path, wanted: str | None, encoding_errors: str) -> str | None:
    """The name of the column of a JSON or .parquet file that holds the text, or None if there are no rows.

    Args:
        wanted: ``data.text_column``.

    Raises:
        ColumnError: the wanted column is not there; or none is wanted, and not exactly one holds strings.
        ValueError: the file is damaged.
    """
    if path.stat().st_size == 0:
        return None
    if file_type(path) in JSON_TYPES:
        return json_column(path, wanted, encoding_errors)
    try:
        # A shard without rows may have another type of column, or none at all.
        return None if _is_empty_parquet(path) else text_column(_rows(path), wanted, str(path))
    except ColumnError:
        raise
    except Exception as error:  # pyarrow, fsspec and datasets each raise their own
        raise _explain(path, error) from error


def identity(files: Sequence[Path]) -> list[Any]:
    """Path, size and time of each file: another list where a file has been changed."""
    found = [(path.resolve(), path.stat()) for path in files]
    return [[path.as_posix(), stat.st_size, stat.st_mtime_ns] for path, stat in found]


def _rows(path: Path, column: str | None = None) -> Any:
    """A ``datasets.IterableDataset`` over a .parquet file; with ``column``, of this one alone."""
    from datasets import IterableDataset

    # Not load_dataset, which reports each call to the hub.
    name = glob.escape(str(path))
    return IterableDataset.from_parquet(name, columns=None if column is None else [column])


def _explain(path: Path, error: Exception) -> Exception:
    """What is wrong with a table, in terms of its file."""
    reason = (str(error).splitlines() or [""])[0]
    return ValueError(f"{path} cannot be read as {file_type(path)}: {type(error).__name__}: {reason}")


def _is_empty_parquet(path: Path) -> bool:
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows == 0


def _is_meant_as_path(item: str) -> bool:
    """A hub id is NAME or ORGANISATION/NAME; a known suffix tells a file."""
    return (
        file_type(Path(item)) is not None
        or item.startswith((".", "/", "~"))
        or item.endswith("/")
        or "\\" in item
        or item.count("/") > 1
    )
