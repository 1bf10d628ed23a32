"""The unit in which text flows: a part of a document, so that no document has to fit in memory.

A part is UTF-8 text of at most ``PART_BYTES`` bytes. Most documents are one part. Longer ones are cut at line
ends, where there are any.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PART_BYTES = 1 << 18
# Kinds of things that are left out, and counted.
NO_TEXT = "rows without text"
EMPTY_FILES = "empty files"
NOT_UTF8 = "files that are not UTF-8"
OTHER_TYPES = "files of other types"
HELD_OUT_FILES = "files of data.val_source"
BROKEN_LINKS = "broken links"
FOLDERS = "folders"
FOUND_TWICE = "texts that were found already"
NO_REGULAR_FILES = "pipes, sockets and devices"

_SPACES = b" \t\n\v\f\r"
_MAX_LINE_ENDS = 64  # tried for the best cut: a file of empty lines has none


class Part(NamedTuple):
    utf8: bytes
    """Text, never empty."""
    ends_document: bool
    """Whether the document ends behind it."""


@dataclass
class Skipped:
    """What a source had to leave out, by kind. Counted here, so that it can be said aloud."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    def include(self, other: "Skipped") -> None:
        for what, number in other.counts.items():
            self.add(what, number)


def describe(skipped: Skipped) -> str:
    """What was left out, as the end of a sentence; nothing where nothing was."""
    if not skipped.counts:
        return ""
    return ": left out " + ", ".join(f"{what} ({number:,})" for what, number in skipped.counts.items())


def cut_position(utf8: bytes, limit: int = PART_BYTES) -> int:
    """Where to cut text that is longer than ``limit``: the number of bytes of its first part, 1 to ``limit``.

    Best is a line end between two characters that are not white space: there, tokenizers that split at white
    space give the same tokens with the cut as without. Then any line end, then any space, then any character.
    """
    end = limit
    for _ in range(_MAX_LINE_ENDS):
        end = utf8.rfind(b"\n", 1, end)
        if end < 0:
            break
        if utf8[end - 1] not in _SPACES and utf8[end + 1] not in _SPACES:
            return end + 1
    for separator in (b"\n", b" "):
        end = utf8.rfind(separator, 0, limit)
        if end >= 0:
            return end + 1
    return character_start(utf8, limit) or limit


def character_start(utf8: bytes, position: int) -> int:
    """The start of the character that the byte at ``position`` belongs to; the end, where there is none."""
    while 0 < position < len(utf8) and utf8[position] & 0xC0 == 0x80:
        position -= 1
    return position


def split_document(utf8: bytes) -> Iterator[Part]:
    """The parts of a document that is in memory as a whole."""
    start = 0
    while len(utf8) - start > PART_BYTES:
        end = start + cut_position(utf8[start : start + PART_BYTES + 1])
        yield Part(utf8[start:end], False)
        start = end
    yield Part(utf8[start:], True)


def to_plain(parts: Iterable[Part]) -> list[Any]:
    """A few parts as plain data, for the state of a reader."""
    return [[part.utf8.decode(), part.ends_document] for part in parts]


def from_plain(plain: list[Any]) -> list[Part]:
    return [Part(text.encode(), ends_document) for text, ends_document in plain]


def to_utf8(text: str, encoding_errors: str, where: str) -> bytes:
    """The text in UTF-8.

    Raises:
        ValueError: it holds half of a surrogate pair, which is no character, and ``encoding_errors`` is strict.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        if encoding_errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        raise ValueError(
            f"{where}: character {error.start} of the text is U+{ord(text[error.start]):04X}, half of a surrogate "
            "pair, which UTF-8 cannot hold; data.encoding_errors=replace goes on"
        ) from error
