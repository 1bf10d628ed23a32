"""Which column of a table holds the text."""

from collections.abc import Mapping
from typing import Any

PEEKED_ROWS = 100
_PYTHON: dict[str, type] = {"string": str, "large_string": str, "null": type(None)}  # of the types that matter


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
    types = _types(rows)
    return None if types is None else choose_column(types, wanted, where)


def choose_column(types: Mapping[str, set[type]], wanted: str | None, where: str) -> str:
    """The name of the column that holds the text.

    Args:
        types: of each column, those of the values that are known.

    Raises:
        ColumnError: as :func:`text_column`.
    """
    names = ", ".join(types)
    if wanted is not None:
        if wanted not in types:
            raise ColumnError(f"data.text_column is {wanted!r}, but {where} has no such column: it has {names}")
        return wanted
    nothing = type(None)
    # Best one of strings alone; else one that holds a string, whose other rows are faults; else one of nothing, all of
    # whose rows are without text.
    strings = (
        [name for name, found in types.items() if str in found and found <= {str, nothing}]
        or [name for name, found in types.items() if str in found]
        or [name for name, found in types.items() if found == {nothing}]
    )
    if len(strings) == 1:
        return strings[0]
    found = f"{len(strings)} columns hold strings ({', '.join(strings)})" if strings else "no column holds strings"
    raise ColumnError(f"{where}: set data.text_column, as {found}; its columns are {names}")


def _types(rows: Any) -> dict[str, set[type]] | None:
    """The types of each column's values. Where the table does not tell them, the first rows do."""
    if rows.features is not None:
        return {name: {_PYTHON.get(getattr(each, "dtype", ""), object)} for name, each in rows.features.items()}
    types: dict[str, set[type]] = {}
    for row in rows.take(PEEKED_ROWS):
        for name, value in row.items():
            types.setdefault(name, set()).add(type(value))
    return types or None
