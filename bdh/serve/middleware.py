"""What all routes share: request ids, keys, rate limits, bodies, errors, the log, and streams to clients.

The middleware is a plain ASGI application around another one, so a route sees immediately when its client disconnects.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh.serve.config import AuthSettings, Caller, LimitSettings
from bdh.words import counted

LOGGER = logging.getLogger("bdh.serve")
RETRY_SECONDS = 5.0  # if no better value is known
_MOST_CALLERS = 10_000  # the most callers whose counts are kept
_ERRORS = {
    400: "The request is invalid. `param` names the field.",
    401: "The API key is missing or unknown.",
    404: "The model, state, response or route does not exist.",
    405: "The route does not allow this method.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    429: "A rate limit is reached, or the queue is full. Retry-After says when to retry.",
    500: "An error in the server.",
    503: "The model is loading, the server is shutting down, its engine has failed, or the request took too long. "
    "Retry-After says when to retry.",
    507: "The state does not fit in memory or on the disk.",
}
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
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_DRAINED_BYTES = 32 << 20  # of a body that is too large are read, so that the client reads the answer
_SECURITY = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has disconnected, so there is no one to answer."""


class ErrorFacts(BaseModel):
    model_config = ConfigDict(extra="allow")
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorFacts


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the error responses of a route for the OpenAPI description."""
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


@dataclass(eq=False)
class ApiError(Exception):
    """An error that is sent to the client, in the format of OpenAI's API."""

    status: int
    """The HTTP status."""
    message: str
    param: str | None = None
    """The field that is wrong."""
    code: str = ""
    """A machine-readable code; by default the usual one of the status."""
    retry_after: float | None = None
    """Seconds after which a retry may succeed."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Additional fields of the error."""

    def __post_init__(self) -> None:
        super().__init__(self.message)
        self.code = self.code or _CODES.get(self.status, "error")

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.facts}}

    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status in (408, 413):
            found["Connection"] = "close"  # the rest of the body is not read
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers())


def bad_request(message: str, param: str | None = None, code: str = "") -> ApiError:
    return ApiError(400, message, param, code)


def unavailable(message: str, code: str) -> ApiError:
    """Returns a 503 that tells the client to retry."""
    return ApiError(503, message, code=code, retry_after=RETRY_SECONDS)


def internal_error() -> ApiError:
    """Returns a 500 that does not say what happened. The log does."""
    return ApiError(500, "something went wrong in the server; its log has the request's id")


def log_to_stderr(log_format: str) -> None:
    """Logs this package's and uvicorn's records to the standard error, as json or text.

    The stream is ``sys.__stderr__``. If writing fails, ``logging`` continues, and reports the error to ``sys.stderr``, which
    ``bdh`` may have replaced.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for name in ("bdh", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True  # the middleware logs requests


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    LOGGER.log(level, event, exc_info=error, extra={"facts": {k: v for k, v in facts.items() if v is not None}})


class JsonFormatter(logging.Formatter):
    """Formats each record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Formats records for people."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        # Text from a client must not look like a line of the log.
        texts = {name: str(value) for name, value in getattr(record, "facts", {}).items()}
        facts = " ".join(f"{name}={text if text.isprintable() else ascii(text)}" for name, text in texts.items())
        line = f"{when} {record.levelname.lower():<8}{record.getMessage()}" + (f"  {facts}" if facts else "")
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


class ApiKeys:
    """The API keys, stored as SHA-256 digests only. Without keys, every address is a caller of its own.

    The exceptions are those of :meth:`AuthSettings.callers`.
    """

    def __init__(self, settings: AuthSettings):
        self._settings = settings
        self.load()

    def load(self) -> None:
        """Reads the file and the environment variable again. After an error, the previous keys stay valid."""
        self._callers = self._settings.callers()

    @property
    def are_needed(self) -> bool:
        return bool(self._callers)

    def caller(self, authorization: str | None, address: str) -> Caller:
        """Returns the caller with the key in an Authorization header.

        Raises:
            ApiError: 401 if the key is missing or unknown.
        """
        if not self._callers:
            return Caller(f"address {address}", address)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="missing_api_key")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All keys are compared, so that the time reveals nothing.
        found = [caller for known, caller in self._callers.items() if hmac.compare_digest(known, digest)]
        if not found:
            raise ApiError(401, "the API key is unknown", code="invalid_api_key")
        return found[0]


class RateLimits:
    """Limits the requests and tokens per minute of each caller. What a caller has used is restored evenly over a minute.

    The number of tokens is known only after they are generated. So a caller may start a request while any are left, and is
    charged afterwards.
    """

    def __init__(self, settings: AuthSettings, now: Callable[[], float] = time.monotonic):
        limits = {"requests": settings.requests_per_minute, "tokens": settings.tokens_per_minute}
        self._limits = {what: limit for what, limit in limits.items() if limit is not None}
        self._now = now
        self.used: dict[tuple[str, str], tuple[float, float]] = {}
        """The amount used and the time of its last update, by ("requests" or "tokens", the caller's id)."""

    def begin(self, caller: Caller) -> None:
        """Counts a request.

        Raises:
            ApiError: 429 if a limit is reached. The request is not counted.
        """
        for what, limit in self._limits.items():
            over = self._level(what, caller) - limit + (1 if what == "requests" else 0)
            if over > 0 or (what == "tokens" and over == 0):
                message = f"the limit of {limit:,} {what} a minute is reached: wait, then try again"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after=max(over, 1) * 60 / limit)
        self._add("requests", caller, 1)

    def charge(self, caller: Caller, num_tokens: int) -> None:
        self._add("tokens", caller, num_tokens)

    def _level(self, what: str, caller: Caller) -> float:
        used, since = self.used.get((what, caller.id), (0.0, 0.0))
        return max(0.0, used - (self._now() - since) * self._limits[what] / 60)

    def _add(self, what: str, caller: Caller, count: float) -> None:
        if what in self._limits:
            now = self._now()
            if len(self.used) > _MOST_CALLERS:
                self.used = {key: value for key, value in self.used.items() if now - value[1] < 60}
            self.used[what, caller.id] = (self._level(what, caller) + count, now)


class RequestMiddleware:
    """Checks the key of each request, reads its body, logs it, and answers its errors.

    Args:
        keys: the API keys.
        limits: the limits of a request.
        open_paths: paths that need no key.
        answered: called with the route and the status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        limits: LimitSettings,
        open_paths: frozenset[str],
        answered: Callable[[str, int], None],
    ):
        self._app, self._keys, self._limits = app, keys, limits
        self._open_paths, self._answered = open_paths, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, method = time.monotonic(), scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn omits the body, by its own scope
        scope["path"] = scope["path"].rstrip("/") or "/"  # a trailing slash makes no difference
        connection = HTTPConnection(scope)
        given = connection.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, arrived=start, facts=facts)
        caller: Caller | None = None
        status, is_read = 0, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message.get("headers", []))
                names = {name.lower() for name, _ in headers}
                headers += [pair for pair in _SECURITY if pair[0] not in names]
                if not is_read and "expect" in connection.headers:
                    headers.append((b"connection", b"close"))  # the client may or may not still send its body
                message["headers"] = [*headers, (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check_head(scope)
            if scope["path"] not in self._open_paths:
                address = connection.client.host if connection.client else "local"
                caller = self._keys.caller(connection.headers.get("authorization"), address)
                scope["state"]["caller"] = caller
            given_once: list[Message] = [{"type": "http.request", "body": await self._body(connection, receive)}]
            is_read = True

            async def receive_body() -> Message:
                """Returns the whole body, and then the client's messages: in effect, that it disconnects."""
                return given_once.pop() if given_once else await receive()

            await self._app(scope, receive_body, send_with_headers)
        except ApiError as error:
            if not status:
                await error.response()(scope, receive, send_with_headers)
        except ClientGone:
            facts["gone"] = True
        except Exception as error:
            log("exception", level=logging.ERROR, error=error, request_id=request_id, path=scope["path"])
            if not status:
                await internal_error().response()(scope, receive, send_with_headers)
        finally:
            self._answered(getattr(scope.get("route"), "path", "none"), status)
            log(
                "request",
                request_id=request_id,
                caller=caller.name if caller else None,
                method=method,
                path=scope["path"],
                status=status,
                seconds=round(time.monotonic() - start, 4),
                **facts,
            )

    def _check_head(self, scope: Scope) -> None:
        """Raises an ``ApiError`` 400 for another protocol, or 431 for too many headers."""
        version, most = scope["http_version"], self._limits.head_fields
        if not version.startswith("1."):
            raise ApiError(400, f"HTTP/{version} is not supported: must be HTTP/1.1", code="invalid_http")
        if len(scope["headers"]) > most:
            raise ApiError(431, f"the request has more than {counted(most, 'header')}", code="headers_too_large")

    async def _body(self, connection: HTTPConnection, receive: Receive) -> bytes:
        """Returns the request's body. Raises an ``ApiError`` 413 (too large) or 408 (late), or :class:`ClientGone`."""
        limits, declared = self._limits, connection.headers.get("content-length", "0")
        is_too_large = declared.isdigit() and int(declared) > limits.body_bytes
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    piece = message.get("body", b"")
                    size += len(piece)
                    is_too_large |= size > limits.body_bytes
                    parts = [] if is_too_large else [*parts, piece]
                    if not message.get("more_body", False) or size > _DRAINED_BYTES:
                        break
        except TimeoutError:
            if not is_too_large:
                raise ApiError(408, f"the request did not arrive within {limits.body_timeout:g} seconds") from None
        if is_too_large:
            raise ApiError(413, f"the request has more than {counted(limits.body_bytes, 'byte')}: send less")
        return b"".join(parts)


def sent_event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Returns a server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream of events that is closed as soon as the client disconnects, even while nothing is sent.

    Args:
        events: the events.
        end: called at the end of the stream, however it ends, even if nothing was sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, write)
        except ClientGone:
            scope["state"]["facts"]["gone"] = True
        finally:
            self._end()
            await self._events.aclose()  # type: ignore[attr-defined]  # an async generator


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[Result]]) -> Result:
    """Returns the result of ``work``, which is cancelled if the client disconnects first.

    Raises:
        ClientGone: the client has disconnected.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work()), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
