"""Errors in the shape of OpenAI's API."""

import math
from typing import Any

_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    500: "internal_error",
}
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}
RETRY_SECONDS = 5.0  # where nothing better is known


class ApiError(Exception):
    """An error that the client is told.

    Args:
        status: of HTTP.
        param: the field that was wrong.
        code: a word for programs; None for the usual one of this status.
        retry_after: seconds after which it may work.
        facts: further fields of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        facts: dict[str, Any] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status, "error")
        self.retry_after, self.facts = retry_after, facts or {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.facts}}

    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status in (408, 413):
            found["Connection"] = "close"  # the rest of the body is of no use
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str) -> ApiError:
    """A 503, after which asking again may help."""
    return ApiError(503, message, code=code, retry_after=RETRY_SECONDS)


def internal_error() -> ApiError:
    """A 500 that does not say what happened; the log does."""
    return ApiError(500, "something went wrong in the server; its log has the request's id", code="internal_error")
