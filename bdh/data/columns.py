"""Says which columns of tables are read as the text."""

import logging
from pathlib import Path

from bdh.data import csv_files
from bdh.data.config import DataConfig
from bdh.data.files import JSON_TYPES, PARQUET, file_type, find_column
from bdh.data.source import Source
from bdh.data.tables import ColumnError

_logger = logging.getLogger(__name__)


def show_columns(config: DataConfig, *sources: Source | None) -> None:
    """Says which column holds the text: of each .csv file, and of other tables where the name was guessed.

    Raises:
        ColumnError: the guess gives other names in other files of a source, or cannot be made.
        ValueError: as of :func:`bdh.data.csv_files.show_columns`, and of a file that is damaged.
    """
    known = [source for source in sources if source is not None]
    csv_files.show_columns([path for source in known for path in source.csv_files], config)
    if config.text_column is not None:
        return
    shown: set[str] = set()
    for source in known:
        found = _guessed_columns(config, source)
        if len(found) > 1:
            (name, path), (other_name, other_path) = list(found.items())[:2]
            raise ColumnError(
                f"data.source {config.source!r}: set data.text_column, as the only column of strings is {name!r} in {path}, but "
                f"{other_name!r} in {other_path}; files with other columns can be entries of data.mix, each with its text_column"
            )
        for name, where in found.items():
            if name not in shown:
                shown.add(name)
                text = _first_text(source, where)
                _logger.warning("%s: the text is column %r, the first text begins %r", where, name, text)


def _guessed_columns(config: DataConfig, source: Source) -> dict[str, str | Path]:
    """The names of columns, each with the first table in which it is so."""
    found: dict[str, str | Path] = {}
    if source.guessed_column is not None:
        found[source.guessed_column[1]] = source.guessed_column[0]
    elif not source.is_hub:
        for path in source.files:
            if file_type(path) in (*JSON_TYPES, PARQUET):
                name = find_column(path, None, config.encoding_errors)
                if name is not None:
                    found.setdefault(name, path)
    return found


def _first_text(source: Source, where: str | Path) -> str:
    """How the first document of a table begins; nothing where it cannot be read, which its reading will say."""
    files = source.shard_files
    number = next((number for number, paths in enumerate(files) if where in paths), 0)
    reader = source.open(state={"shard": number, "inner": None})
    try:
        part = next(iter(reader), None)
    except ValueError:
        return ""
    return (
        ""
        if part is None
        else part.utf8[: 4 * csv_files.SHOWN_CHARACTERS].decode("utf-8", "ignore")[: csv_files.SHOWN_CHARACTERS]
    )
