"""Data sets of the hub, and local folders in the hub's layout."""

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from bdh.data.files import file_type
from bdh.data.parts import Skipped
from bdh.data.readers import Reader, State, TableReader
from bdh.data.tables import ColumnError, text_column

SHAKESPEARE_ID = "karpathy/tiny_shakespeare"
# The hub's own conversion: the repository itself is a loading script, which datasets no longer runs.
SHAKESPEARE_REVISION = "refs/convert/parquet"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


class HubSet:
    """One split of a data set."""

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        column: str | None = None,
        encoding_errors: str = "strict",
        streaming: bool = False,
    ):
        """Finds the split; with ``streaming`` nothing but its description is fetched.

        Raises:
            FileNotFoundError: there is no such data set, or the hub cannot be reached.
            ValueError: it has no such configuration or split, or no column that holds the text.
        """
        self.where = f"{path}, split {split}"
        self._encoding_errors = encoding_errors
        load = partial(load_split, path, name=name, split=split, revision=revision, streaming=streaming)
        rows = load()
        is_csv = rows.info.builder_name == "csv"
        if is_csv:
            load = partial(load, **_strict_csv())
            rows = load()
        try:
            found = text_column(rows, column, self.where)
        except ColumnError:
            raise
        except Exception as error:  # pyarrow, pandas, fsspec and datasets each raise their own
            raise self._explain(error) from error
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

    def open(self, skipped: Skipped, state: State | None) -> Reader:
        """A reader of its rows."""
        import datasets

        rows = self._rows()
        if rows.features is not None:
            rows = rows.select_columns([self.column])  # else every column of every row would be decoded
        if isinstance(rows, datasets.Dataset):
            rows = rows.to_iterable_dataset()
        return TableReader(rows, self.column, self.where, self._encoding_errors, skipped, self._explain, state)

    def _explain(self, error: Exception) -> Exception:
        reason = (str(error).splitlines() or [""])[0]
        return ValueError(f"{self.where} cannot be read: {type(error).__name__}: {reason}")


def local_tables(path: str, *, name: str | None, split: str) -> list[Path] | None:
    """The .json, .jsonl, .csv, .tsv or .parquet files of a split of a local folder, which are read as any others.

    So only the column of the text matters, where ``datasets`` wants the same columns in all rows. None for other files,
    for .csv files whose form the data card describes, and for what :func:`load_split` refuses.
    """
    import datasets

    folder = Path(path)
    if not folder.is_dir() or _is_saved_to_disk(folder):
        return None
    try:
        builder = datasets.load_dataset_builder(path, name)
    except (ValueError, RuntimeError, OSError):
        return None  # load_split raises it again, and says what is wrong
    if builder.name not in ("json", "csv", "parquet") or getattr(builder.config, "field", None) is not None:
        return None
    files = [Path(file) for file in (builder.config.data_files or {}).get(split, [])]
    if not all(file.is_file() and file_type(file) is not None for file in files):
        return None
    return None if builder.name == "csv" and _has_options(builder.config, files) else files


def _has_options(config: Any, files: list[Path]) -> bool:
    """Whether a ``datasets`` configuration of .csv files says how they are written; ``sep`` may follow from the names."""
    is_usual = config.sep == "," or (config.sep == "\t" and all(file_type(file) == ".tsv" for file in files))
    defaults = type(config)(sep=config.sep)
    return not is_usual or any(getattr(config, name) != getattr(defaults, name) for name in config.pd_read_csv_kwargs)


def load_split(
    path: str, *, name: str | None, split: str, revision: str | None, streaming: bool, **options: Any
) -> Any:
    """``datasets.load_dataset``, with errors for the reader; folders of ``save_to_disk`` open too."""
    import datasets

    folder = Path(path)
    if folder.is_dir() and _is_saved_to_disk(folder):
        try:
            loaded = datasets.load_from_disk(path)
        except (KeyError, TypeError, ValueError) as error:  # of files that it reads unchecked
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{path} is damaged, or not what save_to_disk of datasets wrote ({reason})") from error
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{path} has no split {split!r}: it has {', '.join(loaded)}")
            return loaded[split]
        return loaded
    # A local folder is read where it is; copying it into the cache of datasets would gain nothing.
    streaming = streaming or folder.is_dir()
    try:
        return datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming, **options)
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(_unreachable(path, error)) from error
    except (ValueError, RuntimeError) as error:
        settings = f"data.name {name!r}, data.split {split!r}, data.revision {revision!r}"
        raise ValueError(f"{path} cannot be loaded with {settings}: {' '.join(str(error).split())}") from error


def _strict_csv() -> dict[str, Any]:
    """Options for pandas, which takes the first column for an index where rows have more fields than the header."""
    import pandas

    # Without the index it cuts such rows off, and only warns.
    warnings.filterwarnings("error", "Length of header or names", pandas.errors.ParserWarning)
    return {"index_col": False}


def shakespeare() -> bytes:
    """The 1.1 MB of "tiny shakespeare". Its three splits were cut from one text, and are joined to it again.

    Raises:
        FileNotFoundError: the hub cannot be reached, and the data set is not in its cache.
    """
    splits = ("train", "validation", "test")
    loaded = [
        load_split(SHAKESPEARE_ID, name=None, split=split, revision=SHAKESPEARE_REVISION, streaming=False)
        for split in splits
    ]
    return "".join(text for rows in loaded for text in rows["text"]).encode()


def is_hub_layout(folder: Path) -> bool:
    """Whether a folder says itself which of its files are which split.

    Either its README.md has ``configs`` or ``dataset_info`` in its YAML header, or its ``data`` folder holds
    files named like ``train-00000-of-00001.parquet``, or ``datasets`` saved it to disk.
    """
    if _is_saved_to_disk(folder):
        return True
    data = folder / "data"
    if data.is_dir() and any(_SHARD.search(path.name) for path in data.iterdir()):
        return True
    card = folder / "README.md"
    if not card.is_file():
        return False
    header = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    if header is None:
        return False
    import yaml

    try:
        fields = yaml.safe_load(header.group(1))
    except yaml.YAMLError:
        return False  # a page with a line that looks like a header: text like any other
    return isinstance(fields, dict) and ("configs" in fields or "dataset_info" in fields)


def _is_saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _unreachable(path: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0]
    return (
        f"data.source {path!r} is no file, folder or built-in text, and the hub did not give a data set of that name "
        f"({reason}). Without a network these work: pydoc and stdlib, local files and folders, and data sets that "
        "are in the hub's cache, with HF_HUB_OFFLINE=1"
    )
