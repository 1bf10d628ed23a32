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
MARK_BYTES = max(map(len, _OTHER_MARKS))


def mark_length(beginning: bytes, path: Path) -> int:
    """The number of bytes of UTF-8's byte order mark at the beginning of a file: 3, or 0 where there is none.

    Args:
        beginning: the first ``MARK_BYTES`` bytes of the file, or more.

    Raises:
        ValueError: the file has the mark of another encoding.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if beginning.startswith(mark):
            raise ValueError(
                f"{path} is {encoding}, as its first bytes say ({mark.hex(' ').upper()}): must be UTF-8. "
                f"`iconv -f {encoding} -t UTF-8` converts it"
            )
    return len(codecs.BOM_UTF8) if beginning.startswith(codecs.BOM_UTF8) else 0


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
