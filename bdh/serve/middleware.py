"""What happens to every request before and behind its route: id, key, body, errors, log.

A plain ASGI application around another one: nothing stands between a route and its client, so that a route sees at once
that the client has gone.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh.serve.config import LimitSettings
from bdh.serve.errors import ApiError, internal_error
from bdh.serve.keys import ApiKeys, Caller
from bdh.serve.logs import log

_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_DRAINED_BYTES = (
    32 << 20
)  # of a body that is too large: so much is read and dropped, so that the client reads the answer
_SECURITY = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class ClientGone(Exception):
    """There is nobody to answer any more."""


class Front:
    """
    Args:
        open_paths: paths that need no key.
        answered: is told route and status of every answer.
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
            scope = {**scope, "method": "GET"}  # the server leaves the body out, by its own scope
        status, is_read = 0, False

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name.lower() for name, _ in message.get("headers", [])}
                extra = [pair for pair in _SECURITY if pair[0] not in names]
                if not is_read and "expect" in connection.headers:
                    extra.append((b"connection", b"close"))  # the client keeps its body, or not: nobody knows
                message["headers"] = [
                    *message.get("headers", []),
                    *extra,
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        caller: Caller | None = None
        try:
            self._check_head(scope)
            address = connection.client.host if connection.client else "local"
            if scope["path"] not in self._open_paths:
                caller = self._keys.caller(connection.headers.get("authorization"), address)
                scope["state"]["caller"] = caller
            body = await self._body(connection, receive)
            is_read = True
            await self._app(scope, _with_body(body, receive), sending)
        except ApiError as error:
            if not status:
                await error.response()(scope, receive, sending)
        except ClientGone:
            facts["gone"] = True
        except Exception as error:
            log("exception", level=logging.ERROR, error=error, request_id=request_id, path=scope["path"])
            if not status:
                await internal_error().response()(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._answered(route, status)
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
        """
        Raises:
            ApiError: 400 or 431, the protocol is another one, or there are more headers than allowed.
        """
        version, most = scope["http_version"], self._limits.head_fields
        if not version.startswith("1."):
            raise ApiError(400, f"HTTP/{version} is not spoken here: must be HTTP/1.1", code="invalid_http")
        if len(scope["headers"]) > most:
            raise ApiError(431, f"the request has more than {most} headers", code="headers_too_large")

    async def _body(self, connection: HTTPConnection, receive: Receive) -> bytes:
        """All of the request's body.

        Raises:
            ApiError: 413, 408 or 400: it is larger than allowed, does not come, or its length is no number.
            ClientGone: the client has gone before its end.
        """
        most = self._limits.body_bytes
        too_large = ApiError(413, f"the request has more than {most:,} bytes: send less", code="request_too_large")
        declared = connection.headers.get("content-length", "0")
        is_too_large = declared.isdigit() and int(declared) > most
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    size += len(message.get("body", b""))
                    is_too_large |= size > most
                    if is_too_large:
                        parts.clear()
                    else:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body", False) or size > _DRAINED_BYTES:
                        break
        except TimeoutError:
            if is_too_large:
                raise too_large from None
            raise ApiError(
                408, f"the request has not come within {self._limits.body_timeout:g} seconds", code="request_timeout"
            ) from None
        if is_too_large:
            raise too_large
        return b"".join(parts)


def _with_body(body: bytes, receive: Receive) -> Receive:
    """The body in one message, and then what the client does: in effect, that it leaves."""
    is_given = False

    async def receiving() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receiving
