"""How long-running steps say how far they are."""

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with the step's name, the bytes of text done so far, and how many there are, or None if that is unknown."""


def no_progress(step: str, done_bytes: int, total_bytes: int | None) -> None:
    pass
