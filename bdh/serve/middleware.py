"""What surrounds every route: the request's id, key, body, errors and log line, and streams that end when their reader leaves.

A plain ASGI application around another one: nothing stands between a route and its client, so that a route sees at once
that the client has gone.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh.serve.config import LimitSettings
from bdh.serve.errors import ApiError, internal_error
from bdh.serve.keys import ApiKeys, Caller
from bdh.serve.monitoring import log

_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_DRAINED_BYTES = 32 << 20  # of a body that is too large are read and dropped, so that the client reads the answer
_SECURITY = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]

Result = TypeVar("Result")


class ClientGone(Exception):
    """There is nobody to answer any more."""


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


class RequestMiddleware:
    """
    Args:
        open_paths: paths that need no key.
        answered: is given route and status of every answer.
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
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        scope["path"] = scope["path"].rstrip("/") or "/"  # a slash at the end makes no other route
        connection = HTTPConnection(scope)
        given = connection.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, arrived=start, facts=facts)
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn leaves the body out, by its own scope
        status, is_read = 0, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message.get("headers", []))
                names = {name.lower() for name, _ in headers}
                headers += [pair for pair in _SECURITY if pair[0] not in names]
                if not is_read and "expect" in connection.headers:
                    headers.append((b"connection", b"close"))  # the client keeps its body, or not: nobody knows
                message["headers"] = [*headers, (b"x-request-id", request_id.encode())]
            await send(message)

        caller: Caller | None = None
        try:
            self._check_head(scope)
            if scope["path"] not in self._open_paths:
                address = connection.client.host if connection.client else "local"
                caller = self._keys.caller(connection.headers.get("authorization"), address)
                scope["state"]["caller"] = caller
            body = await self._body(connection, receive)
            is_read = True
            await self._app(scope, _receive_of(body, receive), send_with_headers)
        except ApiError as error:
            if not status:
                await error_response(error)(scope, receive, send_with_headers)
        except ClientGone:
            facts["gone"] = True
        except Exception as error:
            log("exception", level=logging.ERROR, error=error, request_id=request_id, path=scope["path"])
            if not status:
                await error_response(internal_error())(scope, receive, send_with_headers)
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
        """Raises an ``ApiError`` 400 or 431 for another protocol, or for more headers than allowed."""
        version, most = scope["http_version"], self._limits.head_fields
        if not version.startswith("1."):
            raise ApiError(400, f"HTTP/{version} is not spoken here: must be HTTP/1.1", code="invalid_http")
        if len(scope["headers"]) > most:
            raise ApiError(431, f"the request has more than {most} headers", code="headers_too_large")

    async def _body(self, connection: HTTPConnection, receive: Receive) -> bytes:
        """All of the request's body.

        Raises:
            ApiError: 413 or 408, it is larger than allowed, or does not come.
            ClientGone: the client has gone before its end.
        """
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
                reason = f"the request has not come within {limits.body_timeout:g} seconds"
                raise ApiError(408, reason, code="request_timeout") from None
        if is_too_large:
            reason = f"the request has more than {limits.body_bytes:,} bytes: send less"
            raise ApiError(413, reason, code="request_too_large")
        return b"".join(parts)


def _receive_of(body: bytes, receive: Receive) -> Receive:
    """Gives the body in one message, and then what the client does: in effect, that it leaves."""
    given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_body() -> Message:
        return given.pop() if given else await receive()

    return receive_body


def sent_event(data: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream of events, which is closed when the client has gone, whether it was just being written or not.

    Args:
        end: is called at the end, however that comes, and also where the stream has not begun.
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
    """The result of some work, which is cancelled if the client leaves before.

    Raises:
        ClientGone: it has left.
    """
    working = asyncio.ensure_future(work())
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
