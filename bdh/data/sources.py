"""Finds the sources that the settings name. A source can be read repeatedly."""

import glob
import hashlib
import logging
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from bdh.data import tables
from bdh.data.config import BUILTIN, DataConfig, EntryConfig
from bdh.data.csv_files import Lines, csv_reader, csv_settings, csv_texts, find_layout
from bdh.data.files import (
    CSV_TYPES,
    FOUND_TWICE,
    JSON_TYPES,
    PARQUET,
    TEXT_TYPES,
    FileKey,
    file_key,
    file_type,
    find_files,
    is_hub_layout,
    item_names,
    regular_files,
)
from bdh.data.json_files import json_column, json_reader
from bdh.data.reading import (
    EMPTY_FILES,
    ChainReader,
    ColumnError,
    OpenShard,
    Reader,
    Skipped,
    State,
    TextFileReader,
    compression,
    file_chunks,
    listed,
)
from bdh.words import counted

_FINGERPRINT_BYTES = 1 << 16
_FIRST_BYTES = 1 << 20
_NOWHERE = (0, 0)
_NOTHING_LEFT = "nothing is left to train on without data.val_source"
_SHOWN_CHARACTERS = 60
_MAX_COUNTED_BYTES = 1 << 26
_MAX_SHOWN_FILES = 3
_NO_SOURCE_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_logger = logging.getLogger(__name__)


class _TableType(NamedTuple):
    """How to read files of a type whose rows are documents."""

    find_column: Callable[[Path, DataConfig], Any]
    """Returns the column that holds the text, in a form that ``open`` takes; None if there are no rows."""
    open: Callable[[Path, Any, DataConfig, Skipped, State | None], Reader]


_TABLES: dict[str | None, _TableType] = {
    **dict.fromkeys(CSV_TYPES, _TableType(find_layout, csv_reader)),
    **dict.fromkeys(JSON_TYPES, _TableType(json_column, json_reader)),
    PARQUET: _TableType(tables.parquet_column, tables.parquet_reader),
}


@dataclass
class Source:
    """A text that can be read: its shards in order, and the data that identify it."""

    shards: list[OpenShard]
    identity: list[Any]
    """Plain data that differ whenever the text may differ, for the key of the cache."""
    shard_files: list[list[Path]]
    """The local files of each shard."""
    num_bytes: int | None
    """The size of the text in bytes, if it is known in advance, for progress bars."""
    skipped: Skipped
    """What was skipped when the source was looked up."""
    names: set[tuple[str | None, ...]] = field(default_factory=set)
    """The names of texts that are not read file by file: built-in texts, and splits that ``datasets`` reads."""
    guessed_column: tuple[str, str] | None = None
    """For a table that ``datasets`` reads, its name and the column that was guessed to hold the text."""

    @property
    def files(self) -> list[Path]:
        """All local files."""
        return [path for files in self.shard_files for path in files]

    @property
    def is_hub(self) -> bool:
        """Whether ``datasets`` reads the source as a whole. Its files may then contain other splits too."""
        return any(name[0] == "hub" for name in self.names)

    def open(self, skipped: Skipped | None = None, state: State | None = None) -> ChainReader:
        """Returns a reader from the beginning, or from the position of another reader."""
        return ChainReader(self.shards, Skipped() if skipped is None else skipped, state)

    def fingerprint(self, until: State | None = None) -> str:
        """Returns a hash that identifies files by name, size, beginning and end, and is the same on other machines.

        Args:
            until: the state of a reader. Text after this position does not change the hash. Of the file that contains
                the position, the hash covers the bytes before it if the reader counts bytes, and otherwise the text
                that the reader returned.
        """
        known = [entry for entry in self.identity if entry[0] != "files"]
        digest = hashlib.sha256(repr(known).encode())
        last = len(self.shards) if until is None else until["shard"]
        for path in chain.from_iterable(self.shard_files[:last]):
            digest.update(_ends(path, path.stat().st_size))
        if until is not None and (files := [*self.shard_files, []][last]):
            digest.update("".join(path.name for path in files).encode())
            digest.update(self._before(last, until["inner"] or {}))
        return digest.hexdigest()

    def _before(self, number: int, inner: State) -> bytes:
        """Returns a hash of the text of a shard before the position of a reader."""
        wanted = _place(inner)
        if wanted == _NOWHERE:
            return b""
        digest = hashlib.sha256()
        if "offset" in inner:
            digest.update(_bytes_before(self.shard_files[number][0], inner["offset"]))
            # The first rows determine how all are read. Some of them may be after the position, and may have changed.
            if not inner.get("parts") and ("line" not in inner or inner["offset"] > _FIRST_BYTES):
                return digest.digest()
        reader: Reader | None = None
        reached = _NOWHERE
        with suppress(ValueError):  # text that cannot be read ends there
            reader = self.shards[number](Skipped(), None)
            for chunk in reader:
                reached = _place(reader.state())
                if reached > wanted:
                    break
                digest.update(f"Part(utf8={chunk.utf8!r}, ends_document={chunk.ends_document})".encode())
        if reader is not None:
            reached = max(reached, _place(reader.state()))
        digest.update(repr(min(reached, wanted)).encode())
        return digest.digest()


def _place(state: State) -> tuple[int, int]:
    """Returns a position that increases while a reader reads.

    It consists of the number of rows, documents or bytes read, and the number of chunks that were returned of the next
    one.
    """
    read = next((state[name] for name in ("row", "num_rows", "document", "offset") if name in state), 0)
    return read, state.get("parts", -len(state.get("pending", [])))


def _ends(path: Path, size: int) -> bytes:
    """Returns the name of a file, the size, and the first and last bytes of its first ``size`` bytes."""
    with path.open("rb") as file:
        first = file.read(min(size, _FINGERPRINT_BYTES))
        file.seek(max(0, size - _FINGERPRINT_BYTES))
        return repr((path.name, size)).encode() + first + file.read(min(size, _FINGERPRINT_BYTES))


def _bytes_before(path: Path, offset: int) -> bytes:
    """Returns bytes that identify the text of a file, which may be compressed, up to an offset."""
    if not compression(path):
        return _ends(path, offset)
    digest, left = hashlib.sha256(path.name.encode()), offset
    for chunk in file_chunks(path):
        digest.update(chunk[:left])
        left -= len(chunk)
        if left <= 0:
            break
    return digest.digest()


def training_source(config: DataConfig) -> Source:
    """Returns the source named by ``data.source``, without the files of ``data.val_source``.

    Raises:
        FileNotFoundError: a file does not exist, or the hub does not provide the data set.
        ValueError: a setting is not allowed for the source, or nothing is left to train on.
    """
    return _resolve(config, item_names(config.source), config.split, _held_out(config))


def _held_out(config: DataConfig) -> set[FileKey]:
    """Returns the keys of the files to validate on. For an entry of a mix, they include those of the other entries."""
    keys: set[FileKey] = set()
    for section in [config, *(config.others if isinstance(config, EntryConfig) else [])]:
        items = item_names(section.source)
        is_folder = len(items) == 1 and Path(items[0]).expanduser().is_dir()
        if section.val_source is not None or (section.val_split is not None and is_folder):
            validation = validation_source(section)
            if validation is not None and not validation.is_hub:
                keys |= {file_key(path) for path in validation.files}
    return keys


def validation_source(config: DataConfig) -> Source | None:
    """Returns the source to validate on, or None if validation text is split off the training source."""
    if config.val_split is not None:
        items = item_names(config.source)
        if len(items) != 1 or items[0] in BUILTIN or not _is_hub(items[0], config):
            raise ValueError(
                f"data.val_split is {config.val_split!r}, but only data sets of the hub have splits, not "
                f"{config.source!r}: use data.val_source or data.val_fraction"
            )
        return _resolve(config, items, config.val_split, set())
    if config.val_source is None:
        return None
    items = item_names(config.val_source)
    skipped = Skipped()
    files: list[Path] = []
    for item in items:
        found = None if item in BUILTIN else find_files(item, skipped, "data.val_source")
        if found is None:
            raise FileNotFoundError(
                f"data.val_source {item!r}: there is no such file or folder; for a split of a hub data set, use "
                "data.val_split"
            )
        files += found
    return _of_files(config, regular_files(files, set(), skipped), skipped)


def _is_hub(item: str, config: DataConfig) -> bool:
    folder = Path(item).expanduser()
    if not folder.exists():
        return not glob.has_magic(item) and find_files(item, Skipped()) is None
    if not folder.is_dir():
        return False
    asks_for_split = config.name is not None or config.split != "train" or config.val_split is not None
    return asks_for_split or is_hub_layout(folder)


def _resolve(config: DataConfig, items: list[str], split: str, held_out: set[FileKey]) -> Source:
    if len(items) == 1 and items[0] not in BUILTIN and _is_hub(items[0], config):
        return _of_hub(config, items[0], split, held_out)
    for setting, default in (("name", None), ("split", "train"), ("revision", None)):
        value = getattr(config, setting)
        if value != default:
            raise ValueError(
                f"data.{setting} is {value!r}, but data.source {config.source!r} is not a data set on the hub: "
                "leave it out"
            )
    skipped = Skipped()
    known: set[FileKey] = set()
    parts: list[Source] = []
    for number, item in enumerate(items):
        if item in BUILTIN:
            if item in items[:number]:
                skipped[FOUND_TWICE] += 1
            else:
                parts.append(_of_builtin(item))
            continue
        if _is_hub(item, config):
            raise ValueError(f"data.source names several texts, and {item!r} is a data set: must be the only source")
        found = find_files(item, skipped) or []
        kept = regular_files(_not_held_out(found, held_out, skipped), known, skipped)
        if kept:
            parts.append(_of_files(config, kept, Skipped()))
    if not parts:
        raise ValueError(f"data.source {config.source!r}: {_NOTHING_LEFT}")
    sizes = [part.num_bytes for part in parts]
    return Source(
        shards=[shard for part in parts for shard in part.shards],
        identity=[entry for part in parts for entry in part.identity],
        shard_files=[files for part in parts for files in part.shard_files],
        num_bytes=None if None in sizes else sum(size or 0 for size in sizes),
        skipped=skipped,
        names={name for part in parts for name in part.names},
    )


def _not_held_out(files: list[Path], held_out: set[FileKey], skipped: Skipped) -> list[Path]:
    kept = [path for path in files if file_key(path) not in held_out]
    if len(kept) < len(files):
        skipped["files of data.val_source"] += len(files) - len(kept)
    return kept


def _identity(files: Sequence[Path]) -> list[Any]:
    """Returns path, size and modification time of each file, which differ if a file has changed."""
    found = [(path.resolve(), path.stat()) for path in files]
    return [[path.as_posix(), stat.st_size, stat.st_mtime_ns] for path, stat in found]


def _of_files(config: DataConfig, files: list[Path], skipped: Skipped) -> Source:
    has_csv = any(file_type(path) in CSV_TYPES for path in files)
    identity_of_csv = [["csv", *csv_settings(config).values()]] if has_csv else []
    is_plain = all(file_type(path) == path.suffix.lower() and file_type(path) != PARQUET for path in files)
    return Source(
        shards=[_opener(path, config) for path in files],
        identity=[["files", *_identity(files)], *identity_of_csv],
        shard_files=[[path] for path in files],
        num_bytes=sum(path.stat().st_size for path in files) if is_plain else None,
        skipped=skipped,
    )


def _opener(path: Path, config: DataConfig) -> OpenShard:
    """Returns a function that opens a file, depending on its type.

    The function raises ``ValueError`` if a table does not have the column, or if no single column can be guessed.
    """

    def open_file(skipped: Skipped, state: State | None) -> Reader:
        if file_type(path) in TEXT_TYPES:
            return TextFileReader(path, config.encoding_errors, skipped, state)
        column = _column(path, config)
        if column is None:
            if state is None:
                skipped[EMPTY_FILES] += 1
            return listed(0, lambda number: None)
        return _TABLES[file_type(path)].open(path, column, config, skipped, state)

    return open_file


def _column(path: Path, config: DataConfig) -> Any:
    """Returns the column of a table that holds the text, as its type's reader takes it; None if there are no rows."""
    return _TABLES[file_type(path)].find_column(path, config) if path.stat().st_size else None


def _of_builtin(name: str) -> Source:
    if name == "stdlib":
        paths = stdlib_files()
        number, num_bytes = len(paths), sum(path.stat().st_size for path in paths)
        version = f"{platform.python_implementation()} {platform.python_version()}"
        identity = [name, version, number, num_bytes]

        def get(i: int, skipped: Skipped) -> bytes | None:
            return _python_file(paths[i], skipped)

    else:
        from pydoc_data.topics import topics  # the language reference that Python's help() shows

        texts = (
            [tables.shakespeare()] if name == "shakespeare" else [topics[topic].encode() for topic in sorted(topics)]
        )
        number, num_bytes = len(texts), sum(map(len, texts))
        identity = [name, hashlib.sha256(b"\0".join(texts)).hexdigest()]

        def get(i: int, skipped: Skipped) -> bytes | None:
            return texts[i]

    return Source(
        shards=[lambda skipped, state: listed(number, lambda i: get(i, skipped), state)],
        identity=[identity],
        shard_files=[[]],
        num_bytes=num_bytes,
        skipped=Skipped(),
        names={(name,)},
    )


def stdlib_files() -> list[Path]:
    """Returns the .py files of the standard library, except for site-packages and tests, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NO_SOURCE_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _python_file(path: Path, skipped: Skipped) -> bytes | None:
    utf8 = path.read_bytes()
    try:
        utf8.decode()
    except UnicodeDecodeError:
        skipped["files that are not UTF-8"] += 1
        return None
    if not utf8:
        skipped[EMPTY_FILES] += 1
    return utf8


def _of_hub(config: DataConfig, path: str, split: str, held_out: set[FileKey]) -> Source:
    folder = Path(path).expanduser()
    files = tables.local_tables(str(folder), name=config.name, split=split) or []
    if not any(file_type(table) in CSV_TYPES for table in files):
        for setting, value in csv_settings(config).items():
            if value != csv_settings(DataConfig())[setting]:
                raise ValueError(
                    f"data.csv_{setting} is {value!r}, but data.source {config.source!r} is a data set of the hub: leave it "
                    "out, or name the local files one by one or as a glob"
                )
    if files:
        skipped = Skipped()
        kept = _not_held_out(files, held_out, skipped)
        if not kept:
            raise ValueError(f"data.source {config.source!r}: {_NOTHING_LEFT}")
        return _of_files(config, kept, skipped)
    files = sorted(f for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else []
    for file in files:
        if file_key(file) in held_out:
            raise ValueError(
                f"data.source {config.source!r} is read as a whole, so {file} cannot be held out of it: name the files to "
                "train on one by one or as a glob"
            )
    hub_set = tables.HubSet(str(folder) if folder.is_dir() else path, split, config)
    name = [folder.name if files else path, config.name, split, config.revision, hub_set.column]
    return Source(
        shards=[hub_set.open],
        identity=[["hub", *name, hub_set.identity], ["files", *_identity(files)]],
        shard_files=[files],
        num_bytes=None,
        skipped=Skipped(),
        guessed_column=None if config.text_column is not None else (hub_set.where, hub_set.column),
        names={("hub", str(folder.resolve()) if folder.is_dir() else path, config.name, split)},
    )


def show_columns(config: DataConfig, *sources: Source | None) -> None:
    """Logs the column that holds the text of each .csv file, and of other tables if it was guessed.

    Raises:
        ColumnError: different names were guessed for the files of a source, or no column can be guessed.
        ValueError: as :func:`_show_csv_columns`, or because a file is damaged.
    """
    known = [source for source in sources if source is not None]
    files = [path for source in known if not source.is_hub for path in source.files]
    _show_csv_columns([path for path in files if file_type(path) in CSV_TYPES], config)
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


def _show_csv_columns(files: Sequence[Path], config: DataConfig) -> None:
    """Logs the column, the number of rows and the beginning of the first text of each file.

    Rows are counted up to a limit. If there are many files, only the columns of the further ones are logged. Raises as
    :func:`find_layout` and, for the counted rows, as :func:`csv_texts`.
    """
    num_shown, num_bytes, further = 0, 0, Counter[str]()
    for path in files:
        layout = find_layout(path, config)
        if layout is None:
            continue
        if num_shown == _MAX_SHOWN_FILES:
            further[layout.names[layout.column]] += 1
            continue
        lines, num_rows, is_all = Lines(path, config), 0, False
        texts, end = csv_texts(lines, layout, config), object()
        while num_bytes + lines.offset < _MAX_COUNTED_BYTES and not is_all:
            text = next(texts, end)
            is_all = text is end
            num_rows += not is_all and text is not None
        num_shown, num_bytes = num_shown + 1, num_bytes + lines.offset
        number = counted(num_rows, "row") if is_all else f"more than {counted(num_rows, 'row')}"
        _logger.warning(
            "%s: %s; %s, the first text begins %r", path, layout, number, layout.first_text[:_SHOWN_CHARACTERS]
        )
    if further:
        columns = ", ".join(f"{name!r} in {number:,}" for name, number in further.items())
        _logger.warning("%s further tables: the text is column %s", f"{further.total():,}", columns)


def _guessed_columns(config: DataConfig, source: Source) -> dict[str, str | Path]:
    """Returns the guessed names of columns, each with the first table for which it was guessed."""
    if source.guessed_column is not None:
        where, name = source.guessed_column
        return {name: where}
    found: dict[str, str | Path] = {}
    for path in [] if source.is_hub else source.files:
        if file_type(path) in (*JSON_TYPES, PARQUET) and (column := _column(path, config)) is not None:
            found.setdefault(column.name, path)
    return found


def _first_text(source: Source, where: str | Path) -> str:
    """Returns the beginning of a table's first document, or "" if it cannot be read.

    Whoever reads the table later reports the error.
    """
    number = next((number for number, paths in enumerate(source.shard_files) if where in paths), 0)
    with suppress(ValueError):
        for chunk in source.open(state={"shard": number, "inner": None}):
            return chunk.utf8[: 4 * _SHOWN_CHARACTERS].decode("utf-8", "ignore")[:_SHOWN_CHARACTERS]
    return ""
