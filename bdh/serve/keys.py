"""API keys, and how much each of their owners may ask for in a minute."""

import hashlib
import hmac
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bdh.serve.errors import ApiError
from bdh.text_files import read_text

_SMALLEST_KEY = 8
_MOST_CALLERS = 10_000  # addresses whose counts are kept


@dataclass(frozen=True)
class Caller:
    """The owner of a key, or, without keys, an address."""

    id: str
    """A hash of the key, or the address. States belong to it."""
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
    found: dict[bytes, Caller] = {}
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


class ApiKeys:
    """The keys, of which only SHA-256 digests are kept. Without any, every address is a caller of its own.

    Arguments and errors are those of :func:`read_callers`.
    """

    def __init__(self, keys_file: str | None = None, keys_variable: str = ""):
        self._source = keys_file, keys_variable
        self.load()

    def load(self) -> None:
        """Reads file and environment again; after an error the keys are what they were before."""
        self._callers = read_callers(*self._source)

    @property
    def are_needed(self) -> bool:
        return bool(self._callers)

    def caller(self, authorization: str | None, address: str) -> Caller:
        """The caller that an Authorization header names.

        Raises:
            ApiError: 401, a key is needed, or it is none of ours.
        """
        if not self._callers:
            return Caller(f"address {address}", address)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="missing_api_key")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, caller in self._callers.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise ApiError(401, "the API key is not known here", code="invalid_api_key")
        return found


class RateLimits:
    """Requests and tokens a minute for each caller: what has been used comes back evenly over a minute.

    Tokens are known only when they have been generated. So a caller may begin while anything is left, and pays what it
    turned out to be.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._now = now
        self.used: dict[tuple[str, str], tuple[float, float]] = {}
        """By (requests or tokens, caller's id): how much, and when that was counted."""

    def begin(self, caller: Caller) -> None:
        """Counts a request.

        Raises:
            ApiError: 429, something is used up; nothing was counted.
        """
        for what, limit in self._limits.items():
            if limit is None:
                continue
            over = self._level(what, caller, limit) - limit + (1 if what == "requests" else 0)
            if over > 0 or (what == "tokens" and over == 0):
                raise ApiError(
                    429,
                    f"the limit of {limit:,} {what} a minute is reached: wait, and ask again",
                    code="rate_limit_exceeded",
                    retry_after=max(over, 1) * 60 / limit,
                )
        self._add("requests", caller, 1)

    def charge(self, caller: Caller, num_tokens: int) -> None:
        self._add("tokens", caller, num_tokens)

    def _level(self, what: str, caller: Caller, limit: int) -> float:
        used, since = self.used.get((what, caller.id), (0.0, 0.0))
        return max(0.0, used - (self._now() - since) * limit / 60)

    def _add(self, what: str, caller: Caller, count: float) -> None:
        limit = self._limits[what]
        if limit is None:
            return
        if len(self.used) > _MOST_CALLERS:
            now = self._now()
            self.used = {key: value for key, value in self.used.items() if now - value[1] < 60}
        self.used[what, caller.id] = (self._level(what, caller, limit) + count, self._now())
