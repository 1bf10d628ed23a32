"""Which column of a table holds the text."""

from typing import Any

PEEKED_ROWS = 100


class ColumnError(ValueError):
    """The column of the text is missing, or cannot be guessed."""


def text_column(rows: Any, wanted: str | None, where: str) -> str | None:
    """The name of the column that holds the text, or None if there is not a single row.

    Args:
        rows: a ``datasets.Dataset`` or ``IterableDataset``.
        wanted: ``data.text_column``.
        where: the name of the table, for errors.

    Raises:
        ColumnError: the wanted column is not there; or none is wanted, and not exactly one holds strings.
    """
    columns = _columns(rows)
    return None if columns is None else choose_column(columns, wanted, where)


def choose_column(columns: dict[str, bool], wanted: str | None, where: str) -> str:
    """The one of the columns that holds the text.

    Args:
        columns: their names, and of each whether it holds strings.

    Raises:
        ColumnError: as :func:`text_column`.
    """
    names = ", ".join(columns)
    if wanted is not None:
        if wanted not in columns:
            raise ColumnError(f"data.text_column is {wanted!r}, but {where} has no such column: it has {names}")
        return wanted
    strings = [name for name, holds_strings in columns.items() if holds_strings]
    if len(strings) == 1:
        return strings[0]
    found = f"{len(strings)} columns hold strings ({', '.join(strings)})" if strings else "no column holds strings"
    raise ColumnError(f"{where}: set data.text_column, as {found}; its columns are {names}")


def _columns(rows: Any) -> dict[str, bool] | None:
    """Of each column, whether it holds strings. Where the table's types are not known, the first rows tell."""
    if rows.features is not None:
        return {
            name: getattr(feature, "dtype", None) in ("string", "large_string")
            for name, feature in rows.features.items()
        }
    values: dict[str, list[Any]] = {}
    for row in rows.take(PEEKED_ROWS):
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    if not values:
        return None
    return {
        name: any(isinstance(value, str) for value in column) and all(isinstance(v, str | None) for v in column)
        for name, column in values.items()
    }
