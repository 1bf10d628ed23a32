"""Words that messages have in common: how many of something there are, which name is meant, what an error is about."""

from collections.abc import Iterable


def counted(number: int, noun: str, many: str | None = None) -> str:
    """A number and what it counts: "1 token", "2,000 tokens"; ``many`` is the plural where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of the names that is written most like ``name``; None where none is as like as ``cutoff``, from 0 to 1."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by Python, by PyTorch on a GPU (``torch.OutOfMemoryError``), or on a CPU, where it has no class."""
    is_named = "OutOfMemory" in type(error).__name__
    return isinstance(error, MemoryError) or is_named or "allocate memory" in str(error)
