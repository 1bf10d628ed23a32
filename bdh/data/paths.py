"""Which files a folder or a pattern stands for: each once, and none that a run, an export or the token cache wrote."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from bdh.data.parts import BROKEN_LINKS, FOLDERS, FOUND_TWICE, NO_REGULAR_FILES, Skipped

FileKey = tuple[int, int]

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
        skipped.add(FOLDERS, num_folders)
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
            skipped.add(BROKEN_LINKS)
            continue
        key = (facts.st_dev, facts.st_ino)
        if stat.S_ISDIR(facts.st_mode):
            continue
        if not stat.S_ISREG(facts.st_mode):
            skipped.add(NO_REGULAR_FILES)
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
