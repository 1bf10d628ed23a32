"""Which part of a corpus is trained on, and which is held out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from bdh.data.parts import Part, character_start
from bdh.data.source import Source

_MAX_SHORT_BYTES = 1 << 28  # of text that is counted before a stream is taken for a long one


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


@dataclass(frozen=True)
class StreamSplit:
    """The rule of streaming: which parts of a stream are held out, from the front of the stream on."""

    unit: Literal["parts", "documents", "bytes"]
    """What is counted."""
    number: int
    """Of parts, every so many-th is held out; of documents or bytes, those behind the first so many."""

    def marked(self, parts: Iterable[Part], position: int = 0) -> Iterator[tuple[Part, bool, int]]:
        """
        Args:
            position: of the first part, in units.

        Yields:
            Each part, or both sides of one that is cut; whether it is held out; and the position behind it.
        """
        for part in parts:
            if self.unit == "bytes":
                for piece, is_behind in cut(iter([part]), self.number - position):
                    position += len(piece.utf8)
                    yield piece, is_behind, position
            elif self.unit == "documents":
                is_behind = position >= self.number
                position += part.ends_document
                yield part, is_behind, position
            else:
                position += 1
                yield part, position % self.number == 0, position


def stream_split(source: Source, val_fraction: float) -> StreamSplit:
    """How a source is split whose end is far: every ``round(1 / val_fraction)``-th part is held out.

    A fraction above one half holds out every second part: it cannot hold out more than it leaves. A source of not
    more parts than that, of which none or only the rest of a document would be held out, is split as it is without
    streaming: the last documents, or the end of a single one.
    """
    every = max(2, round(1 / val_fraction))
    num_documents = num_bytes = 0
    for number, part in enumerate(source.open()):
        num_documents += part.ends_document
        num_bytes += len(part.utf8)
        if number == every or num_bytes > _MAX_SHORT_BYTES:
            return StreamSplit("parts", every)
    if num_documents == 1:
        return StreamSplit("bytes", num_kept(num_bytes, val_fraction))
    return StreamSplit("documents", num_kept(num_documents, val_fraction))
