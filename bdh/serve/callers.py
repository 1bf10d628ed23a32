"""API keys as people write them: in a file or an environment variable."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from bdh.text_files import read_text

_SMALLEST_KEY = 8


@dataclass(frozen=True)
class Caller:
    """Whoever a request comes from."""

    id: str
    """Of the key, not the key itself; or of the address. States belong to it."""
    name: str
    """For the log."""


def read_callers(keys_file: str | None, keys_variable: str) -> dict[bytes, Caller]:
    """The callers by the SHA-256 digests of their keys.

    Args:
        keys_file: a key in each line, or a name and a key; ``#`` begins a comment. None for no file.
        keys_variable: environment variable with further keys, separated by commas.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is too short, given twice, or the file has none.
    """
    found: dict[bytes, Caller] = {}
    given = os.environ.get(keys_variable, "")
    lines = [(f"the variable {keys_variable}", key.strip()) for key in given.split(",")]
    if keys_file is not None:
        path = Path(keys_file)
        if not path.is_file():
            raise FileNotFoundError(f"auth.keys_file is {str(path)!r}: there is no such file")
        of_file = [line.split("#")[0].strip() for line in read_text(path).splitlines()]
        if not any(of_file):
            raise ValueError(f"{path} has no key: it needs one in a line, or everybody could ask")
        lines += [(f"line {number} of {path}", line) for number, line in enumerate(of_file, 1)]
    for place, line in lines:
        if not line:
            continue
        name, _, key = line.rpartition(" ")
        if len(key) < _SMALLEST_KEY:
            raise ValueError(f"the key in {place} has {len(key)} characters: must be at least {_SMALLEST_KEY}")
        digest = hashlib.sha256(key.encode()).digest()
        if digest in found:
            raise ValueError(f"the key in {place} is given twice: must be there once")
        found[digest] = Caller(digest.hex()[:32], name.strip() or f"key-{digest.hex()[:8]}")
    return found
