"""Texts that every Python carries, so that a first run needs no network."""

import os
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path

from bdh.data.parts import EMPTY_FILES, NOT_UTF8, Skipped

BUILTIN = ("pydoc", "stdlib", "shakespeare")
_NO_SOURCE_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def pydoc_documents() -> list[bytes]:
    """The language reference that Python's ``help()`` shows, one document a topic, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name].encode() for name in sorted(topics)]


def stdlib_files() -> list[Path]:
    """The standard library's .py files, without site-packages and tests, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NO_SOURCE_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_document(files: list[Path], skipped: Skipped) -> Callable[[int], bytes | None]:
    """A function that reads the file of a number, or counts it as skipped where it is empty or not UTF-8."""

    def read(number: int) -> bytes | None:
        utf8 = files[number].read_bytes()
        try:
            utf8.decode()
        except UnicodeDecodeError:
            skipped.add(NOT_UTF8)
            return None
        if not utf8:
            skipped.add(EMPTY_FILES)
        return utf8

    return read


def python_version() -> str:
    """What the built-in texts depend on."""
    return f"{platform.python_implementation()} {platform.python_version()}"
