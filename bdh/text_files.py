"""Text files that people write: UTF-8, with or without a byte order mark (BOM), which is never text."""

import codecs
import io
from pathlib import Path

_OTHER_MARKS = {  # the longer ones first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_WIDE = {  # of each encoding the bytes in a unit, the place of the highest one there, and of those next to it
    "UTF-32LE": (4, 3, 2),
    "UTF-32BE": (4, 0, 1),
    "UTF-16LE": (2, 1, None),
    "UTF-16BE": (2, 0, None),
}
MARK_BYTES = 64
"""So many bytes at the beginning of a file tell its encoding."""


def mark_length(beginning: bytes, path: Path) -> int:
    """The number of bytes of UTF-8's byte order mark at the beginning of a file: 3, or 0 where there is none.

    Args:
        beginning: the first ``MARK_BYTES`` bytes of the file, or more.

    Raises:
        ValueError: the file has the mark of another encoding, or seems to be in one without a mark.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if beginning.startswith(mark):
            raise ValueError(
                f"{path} is {encoding}, as its first bytes say ({mark.hex(' ').upper()}): must be UTF-8. "
                f"`iconv -f {encoding} -t UTF-8` converts it"
            )
    if wide := _wide_encoding(beginning[:MARK_BYTES]):
        raise ValueError(
            f"{path} seems to be {wide} without a byte order mark, as its first bytes tell "
            f"({beginning[:8].hex(' ').upper()}): must be UTF-8. `iconv -f {wide} -t UTF-8` converts it"
        )
    return len(codecs.BOM_UTF8) if beginning.startswith(codecs.BOM_UTF8) else 0


def _wide_encoding(beginning: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark, in which the high bytes of most scripts are those of control characters."""
    if len(beginning) < 4:
        return None
    for encoding, (size, high, next_to_it) in _WIDE.items():
        high_bytes = beginning[high::size]
        if next_to_it is not None:
            if not any(high_bytes) and max(beginning[next_to_it::size]) <= 0x10:  # U+10FFFF is the last character
                return encoding
        elif sum(byte < 0x09 for byte in high_bytes) >= 0.75 * len(high_bytes):
            return encoding
    return None


def read_text(path: Path) -> str:
    r"""The text of a file without a byte order mark, with lines that end in ``\n``.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    start = mark_length(data, path)
    try:
        text = data[start:].decode()
    except UnicodeDecodeError as error:
        position = start + error.start
        raise ValueError(f"{path} is not UTF-8: byte {position} is 0x{data[position]:02X}") from error
    return io.StringIO(text, newline=None).read()
