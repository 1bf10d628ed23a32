"""Which part of a corpus is trained on, and which is held out."""

from collections.abc import Iterator

from bdh.data.parts import Part, character_start
from bdh.data.source import Source


def count_if_single(source: Source) -> int | None:
    """The bytes of the source's text if it is one document, else None. Reads up to the second document at most."""
    num_bytes, ended = 0, False
    for part in source.open():
        if ended:
            return None
        num_bytes += len(part.utf8)
        ended = part.ends_document
    return num_bytes


def count_documents(source: Source) -> int:
    """Reads the whole source once."""
    return sum(part.ends_document for part in source.open())


def num_kept(number: int, val_fraction: float) -> int:
    """How many of so many documents or bytes are trained on, from the front; at least one each way, if possible."""
    kept = int(number * (1 - val_fraction))
    return min(max(kept, 1), number - 1) if number > 1 else number


def cut(parts: Iterator[Part], position: int) -> Iterator[tuple[Part, bool]]:
    """Parts of one document, cut at a byte position (moved back to the start of a character).

    Yields:
        Each part, and whether it is behind the cut. The text before the cut does not end a document.
    """
    start = 0
    for part in parts:
        end = start + len(part.utf8)
        if start < position < end:
            at = character_start(part.utf8, position - start)
            if at:
                yield Part(part.utf8[:at], False), False
            yield Part(part.utf8[at:], part.ends_document), True
        else:
            yield part, start >= position
        start = end


def is_held_out(number: int, val_fraction: float) -> bool:
    """The rule of streaming, where the number of parts is not known: every ``round(1 / val_fraction)``-th part.

    A fraction above one half holds out every second part: it cannot hold out more than it leaves.
    """
    every = max(2, round(1 / val_fraction))
    return number % every == every - 1
