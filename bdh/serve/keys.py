"""Who asks: API keys, and what each may ask for in a minute."""

import hashlib
import hmac
import time
from collections.abc import Callable

from bdh.serve.callers import Caller, read_callers
from bdh.serve.config import AuthSettings
from bdh.serve.errors import ApiError

_MOST_CALLERS = 10_000  # addresses whose counts are kept


class ApiKeys:
    """The keys, of which only SHA-256 digests are kept. Without any, every address is a caller of its own.

    Raises:
        ValueError, FileNotFoundError: as :meth:`load`.
    """

    def __init__(self, settings: AuthSettings):
        self._settings = settings
        self._callers: dict[bytes, Caller] = {}
        self.load()

    def load(self) -> None:
        """Reads file and environment again.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a key is too short, given twice, or the file has none. The keys are what they were before.
        """
        self._callers = read_callers(self._settings.keys_file, self._settings.keys_variable)

    @property
    def are_needed(self) -> bool:
        return bool(self._callers)

    def caller(self, authorization: str | None, address: str) -> Caller:
        """Of the header's value.

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
    """So many requests and tokens a minute for each caller: what has been used comes back evenly over a minute.

    Tokens are known only when they have been generated. So a caller may begin while there is anything left, and pays
    what it turned out to be.
    """

    def __init__(self, settings: AuthSettings, now: Callable[[], float] = time.monotonic):
        self._limits = {"requests": settings.requests_per_minute, "tokens": settings.tokens_per_minute}
        self._used: dict[tuple[str, str], tuple[float, float]] = {}  # (what, caller) -> used, when
        self._now = now

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
        """What is used of the limit now."""
        used, since = self._used.get((what, caller.id), (0.0, 0.0))
        return max(0.0, used - (self._now() - since) * limit / 60)

    def _add(self, what: str, caller: Caller, count: float) -> None:
        limit = self._limits[what]
        if limit is None:
            return
        if len(self._used) > _MOST_CALLERS:
            now = self._now()
            self._used = {key: value for key, value in self._used.items() if now - value[1] < 60}
        self._used[what, caller.id] = (self._level(what, caller, limit) + count, self._now())
