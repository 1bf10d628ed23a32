"""Errors in the shape of OpenAI's API."""

import math
from typing import Any

from starlette.responses import JSONResponse

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


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of HTTP.
        param: the field that was wrong.
        code: a word for programs; None for the one of most errors with this status.
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

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**error, **self.facts}}

    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status in (408, 413):
            found["Connection"] = "close"  # what is left of the body is of no use
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers())


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """Without what happened, which the log has."""
    return ApiError(500, "something went wrong in the server; its log has the request's id", code="internal_error")
