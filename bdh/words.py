"""Wording that messages share: counts, sizes, similar names and the reason of an error; and whether memory ran out."""

from collections.abc import Iterable


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the name of its type if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def counted(number: int, noun: str, many: str | None = None) -> str:
    """Returns a number with its noun: "1 token", "2,000 tokens". ``many`` is the plural; by default it ends in s."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def gigabytes(num_bytes: float) -> str:
    """Returns a memory size in GB of 10^9 bytes, as in the settings: "0.031 GB", or "0.000031 GB" below a megabyte."""
    return f"{num_bytes / 1e9:,.{3 if num_bytes == 0 or num_bytes >= 1e6 else 6}f} GB"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the most similar of some names, or None if none has at least the similarity ``cutoff``, from 0 to 1."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out.

    It can come from Python, from PyTorch on a GPU (``torch.OutOfMemoryError``), or from PyTorch on a CPU, which has no
    class for it.
    """
    is_named = "OutOfMemory" in type(error).__name__
    return isinstance(error, MemoryError) or is_named or "allocate memory" in str(error)
