"""Finds the local files for the names in the settings.

A folder or pattern yields each file once, and no files that a run, an export or the token cache wrote.
"""

import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from bdh.data.reading import COMPRESSED, Skipped, compression
from bdh.hub import is_path, why_not_asked
from bdh.words import counted

TEXT_TYPES = (".txt", ".md", ".py")
JSON_TYPES = (".jsonl", ".json")
CSV_TYPES = (".csv", ".tsv")
PARQUET = ".parquet"  # has its own compression
_LINES = (*TEXT_TYPES, *JSON_TYPES, *CSV_TYPES)
_KNOWN_TYPES = f"{', '.join(_LINES)}, each also as {' or '.join(COMPRESSED)}, and {PARQUET}"
OTHER_TYPES = "files of other types"
FOUND_TWICE = "texts that were found already"

FileKey = tuple[int, int]

_RECURSIVE = "**"
_MAX_NAMED = 3
# What `bdh train` writes into a run's folder.
_OF_A_RUN = [
    "checkpoints",
    "config.yaml",
    "metrics.jsonl",
    "model",
    "samples.jsonl",
    "tensorboard",
    "tokenizer",
    "wandb",
]
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def file_type(path: Path) -> str | None:
    """Returns the suffix for the type of a file, ignoring that of its compression; None if the type is unknown."""
    suffix = os.path.splitext(path.name.lower().removesuffix(compression(path)))[1]
    return suffix if suffix in (*_LINES, *([] if compression(path) else [PARQUET])) else None


def find_files(item: str, skipped: Skipped, setting: str = "data.source") -> list[Path] | None:
    """Returns the files for the name of a file or folder, or a glob pattern, in the same order on every system.

    In folders and patterns, files of other types are counted as skipped, and hidden files and folders are ignored; see
    :func:`files_below` for what else is skipped. Exceptions are those of :func:`check_item`.

    Args:
        item: the name or pattern.
        skipped: counts skipped files.
        setting: the setting with this name, for error messages.

    Returns:
        The files, or None if the name can only be a hub id, since nothing of that name exists locally.
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
        counts[OTHER_TYPES] += len(found) - len(files)
    if not files:
        raise FileNotFoundError(f"{setting} {item!r} gives no file to read{counts}; known types are {_KNOWN_TYPES}")
    skipped.update(counts)
    return files


def check_item(item: str, setting: str = "data.source") -> None:
    """Checks the name of a source, as far as possible without reading folders.

    Raises:
        FileNotFoundError: nothing of that name exists, and it cannot be a data set on the hub.
        ValueError: the file has an unknown type, or is not a regular file.
    """
    path = Path(item).expanduser()
    if path.is_file():
        if file_type(path) is None:
            raise ValueError(
                f"{setting} {item!r} is of an unknown type: known are {_KNOWN_TYPES}; a link with another name is read as text: ln -s {path} NAME.txt"
            )
    elif path.exists():
        if not path.is_dir():
            raise ValueError(
                f"{setting} {item!r} is a pipe, a socket or a device: text is read more than once, so write it to a file"
            )
    elif path.is_symlink():
        raise FileNotFoundError(f"{setting} {item!r} is a broken link: there is no {os.readlink(path)}")
    elif not glob.has_magic(item):
        nothing = f"{setting} {item!r}: there is no such file or folder"
        if file_type(path) is not None or is_path(item):  # a known suffix means a file
            raise FileNotFoundError(nothing)
        if (reason := why_not_asked(item, "dataset")) is not None:
            raise FileNotFoundError(f"{nothing}, and {reason}")


def item_names(source: str | Sequence[str]) -> list[str]:
    """Returns the names in a setting, which commas separate unless a path with commas exists."""
    if not isinstance(source, str):
        return [item.strip() for item in source]
    if Path(source).expanduser().exists():
        return [source]
    return [item.strip() for item in source.split(",") if item.strip()]


def files_below(folder: Path, skipped: Skipped) -> list[Path]:
    """Returns the files below a folder, without hidden ones, in the same order on every system.

    Symbolic links are followed, and a file with several links is returned once. Broken links, anything that is not a
    regular file, and the folders of runs, exported models, tokenizers and the token cache are skipped and counted.
    """
    return _files_below(folder, (_RECURSIVE,), skipped)


def files_matching(pattern: str, skipped: Skipped) -> list[Path]:
    """Returns the files that match a pattern of :mod:`glob`, otherwise as :func:`files_below`.

    Folders of runs and the like are only entered if the pattern names the file, such as ``runs/*/samples.jsonl``.
    """
    path = Path(os.path.expanduser(pattern))
    literal = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
    return _files_below(Path(*path.parts[:literal]), path.parts[literal:], skipped)


def _files_below(root: Path, parts: Sequence[str], skipped: Skipped) -> list[Path]:
    found = sorted(_matching(root, parts), key=Path.as_posix)
    if _RECURSIVE not in parts and (num_folders := sum(each.is_dir() for each in found)):
        skipped["folders"] += num_folders
    files = regular_files(found, set(), skipped)
    return _not_written_by_us(files, root, skipped) if glob.has_magic(parts[-1]) else files


def regular_files(paths: Iterable[Path], known: set[FileKey], skipped: Skipped) -> list[Path]:
    """Returns the regular files that are not known yet. Others, except for folders, are counted as skipped.

    Args:
        paths: the paths.
        known: the keys of files to ignore, to which those of the returned files are added.
        skipped: counts skipped files.
    """
    files = []
    for path in paths:
        try:
            facts = path.stat()
        except OSError:
            if not path.is_symlink():
                raise
            skipped["broken links"] += 1
            continue
        key = (facts.st_dev, facts.st_ino)
        if stat.S_ISDIR(facts.st_mode):
            continue
        if not stat.S_ISREG(facts.st_mode):
            skipped["pipes, sockets and devices"] += 1
        elif key in known:
            skipped[FOUND_TWICE] += 1
        else:
            known.add(key)
            files.append(path)
    return files


def file_key(path: Path) -> FileKey:
    """Returns a key that is equal for paths to the same file or folder."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _matching(folder: Path, parts: Iterable[str]) -> Iterator[Path]:
    """Matches like ``glob.glob`` below a folder, but ``**`` enters each folder once, and errors are not ignored."""
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
    """Yields a folder and those below it, without hidden ones, each once."""
    if not folder.is_dir() or file_key(folder) in known:
        return
    known.add(file_key(folder))
    yield folder
    for name in sorted(os.listdir(folder)):
        if not name.startswith("."):
            yield from _folders(folder / name, known)


def _not_written_by_us(files: list[Path], root: Path, skipped: Skipped) -> list[Path]:
    """Returns the files that do not belong to runs and the like below ``root``, or to ``root`` if that is a run."""
    kind_of = cache(_kind)

    def owner(path: Path) -> str | None:
        inside = path.relative_to(root)
        if kind_of(root) == "run" and inside.parts[0] in _OF_A_RUN:
            return f"run {root}"
        folders = [root / parent for parent in reversed(inside.parents)][1:]
        return next((f"{kind_of(folder)} {folder}" for folder in folders if kind_of(folder)), None)

    owners = [owner(path) for path in files]
    counts = Counter(name for name in owners if name)
    further = (
        f"files of {counted(len(counts) - _MAX_NAMED, 'further run, model or cache', 'further runs, models or caches')}"
    )
    for number, (name, count) in enumerate(counts.items()):
        skipped[f"files of the {name}" if number < _MAX_NAMED else further] += count
    return [path for path, name in zip(files, owners, strict=True) if name is None]


def _kind(folder: Path) -> str | None:
    """Returns the kind of a folder that this program wrote, or None."""

    def has(*names: str) -> bool:
        return any((folder / name).exists() for name in names)

    if has("config.yaml") and has("metrics.jsonl", "checkpoints", "tokenizer/tokenizer.json"):
        return "run"
    if has("config.json", "adapter_config.json") and has(*_WEIGHTS):
        return "model"
    if has("tokenizer.json") and has("tokenizer_config.json"):
        return "tokenizer"
    return "token cache" if has("tokens.bin") and has("meta.json") else None


def is_hub_layout(folder: Path) -> bool:
    """Whether a folder assigns its files to splits itself.

    That is so if its README.md has ``configs`` or ``dataset_info`` in its YAML header, if its ``data`` folder has files
    with names such as ``train-00000-of-00001.parquet``, or if ``datasets`` saved it to disk.
    """
    data, card = folder / "data", folder / "README.md"
    if is_saved_to_disk(folder) or (data.is_dir() and any(_SHARD.search(path.name) for path in data.iterdir())):
        return True
    header = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if header is None:
        return False
    import yaml

    try:
        fields = yaml.safe_load(header.group(1))
    except yaml.YAMLError:
        return False  # not a YAML header: an ordinary page that begins with such a line
    return isinstance(fields, dict) and ("configs" in fields or "dataset_info" in fields)


def is_saved_to_disk(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk`` of ``datasets``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )
