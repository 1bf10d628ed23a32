"""Local files: which a name stands for, and their bytes, lines and text.

A folder or a pattern gives each file once, and none that a run, an export or the token cache wrote.
"""

import fnmatch
import glob
import gzip
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from bdh.data.reading import CHUNK_BYTES, EMPTY_FILES, Chunk, Skipped, State, cut_position
from bdh.text_files import MARK_BYTES, mark_length

BUILTIN = ("pydoc", "stdlib", "shakespeare")
TEXT_TYPES = (".txt", ".md", ".py")
JSON_TYPES = (".jsonl", ".json")
CSV_TYPES = (".csv", ".tsv")
PARQUET = ".parquet"  # which has a compression of its own
OTHER_TYPES = "files of other types"
FOUND_TWICE = "texts that were found already"

FileKey = tuple[int, int]

_COMPRESSED = (".gz", ".zst")
_COMPRESSED_CHUNK_BYTES = 1 << 14
_RECURSIVE = "**"
_MAX_NAMED = 3
# What `bdh train` writes into a run's folder.
_OF_A_RUN = (
    "checkpoints",
    "config.yaml",
    "metrics.jsonl",
    "model",
    "samples.jsonl",
    "tensorboard",
    "tokenizer",
    "wandb",
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def file_type(path: Path) -> str | None:
    """The suffix that says what a file holds, without that of its compression; None if it is no known one."""
    suffix = os.path.splitext(path.name.lower().removesuffix(compression(path)))[1]
    is_known = (
        suffix in TEXT_TYPES or suffix in (*JSON_TYPES, *CSV_TYPES) or (suffix == PARQUET and not compression(path))
    )
    return suffix if is_known else None


def _known_types() -> str:
    return (
        f"{', '.join([*TEXT_TYPES, *JSON_TYPES, *CSV_TYPES])}, each also as {' or '.join(_COMPRESSED)}, and {PARQUET}"
    )


def find_files(item: str, skipped: Skipped, setting: str = "data.source") -> list[Path] | None:
    """The files that a file's or folder's name or a glob stands for, in the same order on every system.

    In folders and globs, files of other types are counted as skipped, hidden files and folders are left out; see
    :func:`files_below` for what else is.

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
        raise FileNotFoundError(f"{setting} {item!r} gives no file to read{counts}; known types are {_known_types()}")
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
            raise ValueError(f"{setting} {item!r} is of an unknown type: known are {_known_types()}")
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


def identity(files: Sequence[Path]) -> list[Any]:
    """Path, size and time of each file: another list where a file has been changed."""
    found = [(path.resolve(), path.stat()) for path in files]
    return [[path.as_posix(), stat.st_size, stat.st_mtime_ns] for path, stat in found]


def files_below(folder: Path, skipped: Skipped) -> list[Path]:
    """The files below a folder, without hidden ones, in the same order on every system.

    A symbolic link is followed, and what several links lead to is given once. Left out and counted are links that lead
    nowhere, what is no regular file, and the folders of runs, exported models, tokenizers and the token cache.

    Raises:
        OSError: a folder cannot be listed.
    """
    found = sorted(_matching(folder, [_RECURSIVE]), key=lambda path: path.relative_to(folder).as_posix())
    return _not_written_by_us(regular_files(found, set(), skipped), folder, skipped)


def files_matching(pattern: str, skipped: Skipped) -> list[Path]:
    """The files that match a pattern of :mod:`glob`, otherwise as :func:`files_below`.

    Folders of runs and so on are entered where the pattern names the file, as ``runs/*/samples.jsonl`` does.
    """
    path = Path(os.path.expanduser(pattern))
    literal = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
    root, parts = Path(*path.parts[:literal]), path.parts[literal:]
    found = sorted(_matching(root, parts), key=Path.as_posix)
    num_folders = sum(each.is_dir() for each in found)
    if num_folders and _RECURSIVE not in parts:
        skipped.add("folders", num_folders)
    files = regular_files(found, set(), skipped)
    return _not_written_by_us(files, root, skipped) if glob.has_magic(parts[-1]) else files


def regular_files(paths: Iterable[Path], known: set[FileKey], skipped: Skipped) -> list[Path]:
    """Those of the files that can be read and are not known yet; the others are counted, but for folders.

    Args:
        known: keys of the files that are left out; those of the returned ones are added.
    """
    files = []
    for path in paths:
        try:
            facts = path.stat()
        except OSError:
            if not path.is_symlink():
                raise
            skipped.add("broken links")
            continue
        key = (facts.st_dev, facts.st_ino)
        if stat.S_ISDIR(facts.st_mode):
            continue
        if not stat.S_ISREG(facts.st_mode):
            skipped.add("pipes, sockets and devices")
        elif key in known:
            skipped.add(FOUND_TWICE)
        else:
            known.add(key)
            files.append(path)
    return files


def file_key(path: Path) -> FileKey:
    """Equal for two paths that lead to one file or folder."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _matching(folder: Path, parts: Iterable[str]) -> Iterator[Path]:
    """As ``glob.glob`` below ``folder``; but ``**`` enters each folder once, and none is passed over in silence."""
    if not parts:
        yield folder
        return
    part, *rest = parts
    if part == _RECURSIVE:
        for each in _folders(folder, set()):
            yield from _matching(each, rest or ["*"])
    elif not glob.has_magic(part):
        if os.path.lexists(folder / part):
            yield from _matching(folder / part, rest)
    elif folder.is_dir():
        for name in sorted(os.listdir(folder)):
            if fnmatch.fnmatch(name, part) and (not name.startswith(".") or part.startswith(".")):
                yield from _matching(folder / name, rest)


def _folders(folder: Path, known: set[FileKey]) -> Iterator[Path]:
    """A folder and those below it, hidden ones left out, each once."""
    if not folder.is_dir() or file_key(folder) in known:
        return
    known.add(file_key(folder))
    yield folder
    for name in sorted(os.listdir(folder)):
        if not name.startswith("."):
            yield from _folders(folder / name, known)


def _not_written_by_us(files: list[Path], root: Path, skipped: Skipped) -> list[Path]:
    """The files but those of runs and so on below ``root``; and of a run whose folder ``root`` is itself."""
    kinds: dict[Path, str | None] = {}

    def owner(path: Path) -> str | None:
        folder = root
        if _kind(root) == "run" and path.relative_to(root).parts[0] in _OF_A_RUN:
            return f"run {root}"
        for part in path.relative_to(root).parts[:-1]:
            folder = folder / part
            if folder not in kinds:
                kinds[folder] = _kind(folder)
            if kinds[folder]:
                return f"{kinds[folder]} {folder}"
        return None

    kept, counts = [], Skipped()
    for path in files:
        name = owner(path)
        if name is None:
            kept.append(path)
        else:
            counts.add(f"files of the {name}")
    for number, (what, count) in enumerate(counts.counts.items()):
        further = f"files of {len(counts.counts) - _MAX_NAMED:,} further runs, models or caches"
        skipped.add(what if number < _MAX_NAMED else further, count)
    return kept


def _kind(folder: Path) -> str | None:
    """Which of the folders that this program writes this one is, if any."""

    def has(*names: str) -> bool:
        return any((folder / name).exists() for name in names)

    if has("config.yaml") and has("metrics.jsonl", "checkpoints", "tokenizer/tokenizer.json"):
        return "run"
    if has("config.json", "adapter_config.json") and has(*_WEIGHTS):
        return "model"
    if has("tokenizer.json") and has("tokenizer_config.json"):
        return "tokenizer"
    return "token cache" if has("tokens.bin") and has("meta.json") else None


class TextFileReader:
    """A plain or compressed text file: one document, read in parts."""

    def __init__(self, path: Path, encoding_errors: str, skipped: Skipped, state: State | None = None):
        self._path = path
        self._encoding_errors = encoding_errors
        self._skipped = skipped
        self._start = text_start(path)
        # Bytes of the (uncompressed) file that were given.
        self._offset: int = max(self._start, state["offset"] if state else 0)

    def state(self) -> State:
        return {"offset": self._offset}

    def __iter__(self) -> Iterator[Chunk]:
        """
        Raises:
            ValueError: the bytes are not UTF-8, or the compressed file is damaged.
        """
        pending = b""
        for chunk in file_chunks(self._path, self._offset):
            pending += chunk
            while len(pending) > CHUNK_BYTES:
                cut = cut_position(pending)
                yield self._chunk(pending[:cut], False)
                pending = pending[cut:]
        if pending:
            yield self._chunk(pending, True)
        elif self._offset == self._start:
            self._skipped.add(EMPTY_FILES)

    def _chunk(self, raw: bytes, ends_document: bool) -> Chunk:
        try:
            utf8 = raw if raw.isascii() else raw.decode("utf-8", self._encoding_errors).encode()
        except UnicodeDecodeError as error:
            raise not_utf8(self._path, self._offset + error.start, raw[error.start]) from error
        self._offset += len(raw)
        return Chunk(utf8, ends_document)


class Line(NamedTuple):
    """A line of a file that is not blank."""

    number: int
    """From 1 on."""
    text: str
    end: int
    """Bytes of the (uncompressed) file up to the next line."""


def text_lines(path: Path, encoding_errors: str, offset: int = 0, number: int = 1) -> Iterator[Line]:
    """The lines of a file that are not blank, without a byte order mark.

    Args:
        offset: bytes of the (uncompressed) file to leave out, which end with a line.
        number: of the line that is there.

    Raises:
        ValueError: a line is not UTF-8, or the compressed file is damaged.
    """
    offset = max(offset, text_start(path))
    pending: list[bytes] = []
    for chunk in chain(file_chunks(path, offset), [b"\n"]):  # the last line may have no end of its own
        first, *others = chunk.split(b"\n")
        pending.append(first)
        for other in others:
            line, pending = b"".join(pending), [other]
            start, offset = offset, offset + len(line) + 1
            if line and not line.isspace():
                try:
                    text = line.decode("utf-8", encoding_errors)
                except UnicodeDecodeError as error:
                    raise not_utf8(path, start + error.start, line[error.start], number) from error
                yield Line(number, text, offset)
            number += 1


def compression(path: Path) -> str:
    """The last suffix of a file's name in small letters, if it is one of a compression; else nothing."""
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSED else ""


def text_start(path: Path) -> int:
    """Where the text of a file begins in its uncompressed bytes: after the byte order mark, if there is one.

    Raises:
        ValueError: the mark is that of another encoding than UTF-8, or the compressed file is damaged or cut off.
    """
    beginning = b""
    for chunk in file_chunks(path):
        beginning += chunk
        if len(beginning) >= MARK_BYTES:
            break
    return mark_length(beginning, path)


def file_chunks(path: Path, offset: int = 0) -> Iterator[bytes]:
    """The bytes of a file from ``offset`` on, uncompressed if its name ends in .gz or .zst.

    Raises:
        ValueError: the compressed file is damaged or cut off.
        OSError: the file cannot be read; the error has its name.
    """
    try:
        yield from _chunks(path, offset)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _chunks(path: Path, offset: int) -> Iterator[bytes]:
    if not compression(path):
        with path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        return
    for chunk in _gzip_chunks(path) if compression(path) == ".gz" else _zstd_chunks(path):
        if offset < len(chunk):
            yield chunk[offset:]
        offset = max(0, offset - len(chunk))


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while True:
            try:
                chunk = file.read(CHUNK_BYTES)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is damaged or cut off: {error}") from error
            if not chunk:
                return
            yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """By hand, as the library's own reader takes a file that is cut off for one that is complete."""
    import zstandard

    frame = None
    with path.open("rb") as file:
        while chunk := file.read(_COMPRESSED_CHUNK_BYTES):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise ValueError(f"{path} is damaged: {error}") from error
                chunk = b""
                if frame.eof:
                    chunk, frame = frame.unused_data, None
    if frame is not None:
        raise ValueError(f"{path} is cut off: its last zstandard frame has no end")


def not_utf8(path: Path, offset: int, byte: int, line: int | None = None) -> ValueError:
    where = f", in line {line}" if line else ""
    return ValueError(
        f"{path} is not UTF-8: byte {offset} is 0x{byte:02X}{where}. Convert the file, or set "
        "data.encoding_errors=replace to put U+FFFD in the place of such bytes"
    )


def _is_meant_as_path(item: str) -> bool:
    """A hub id is NAME or ORGANISATION/NAME; a known suffix tells a file."""
    return (
        file_type(Path(item)) is not None
        or item.startswith((".", "/", "~"))
        or item.endswith("/")
        or "\\" in item
        or item.count("/") > 1
    )
