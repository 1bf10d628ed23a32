"""The connections of a server, with limits on their number, on time, and on what is sent before a request is complete.

uvicorn waits without limit for the rest of the headers and has no option to change this. This is the only file that uses
uvicorn's internals: its h11 protocol class with ``conn``, ``cycle``, ``flow`` and ``send_400_response``, and its server's
``capture_signals`` (checked with 0.54; ``tests/serve/test_connections.py`` fails if they change).
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bdh.serve.config import LimitSettings
from bdh.serve.middleware import ApiError, log
from bdh.words import counted

_EMPTY_LINE = "no request line received"  # h11's message for an empty line, which some clients send after a body
_SWEEP_SECONDS = 0.25
_PIECE_BYTES = 16 << 10  # passed to the parser in one call
# If a connection closes while bytes arrive, its last answer is lost. So they are read and dropped for this long.
_LINGER_SECONDS = 2.0
_MOST_LINGERING = 64


class Server(uvicorn.Server):
    """A uvicorn server without its signal handling: :mod:`bdh.serve.server` handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Connections:
    """All connections of a server.

    A connection beyond ``limits.connections`` replaces the one that has gone longest without a complete request. It is
    refused only if all are busy.

    Args:
        limits: the limits of the server.
        answered: called with the route, here always "none", and the status when a connection is refused.
    """

    def __init__(self, limits: LimitSettings, answered: Callable[[str, int], None]):
        self.limits, self.answered = limits, answered
        self.open: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None

    def new(self, **arguments: Any) -> "Connection":
        """Creates a connection. uvicorn calls it for each."""
        return Connection(self, **arguments)

    def add(self, connection: "Connection") -> None:
        """Adds a new connection, which may replace another one."""
        self.open.add(connection)
        if self._sweep is None:
            self._sweep = connection.loop.call_later(_SWEEP_SECONDS, self._sweep_all, connection.loop)
        # A closed connection stays in `open` until the next turn of the event loop. Many may arrive within one turn.
        serving = [each for each in self.open if not (each.has_ended or each.transport.is_closing())]
        if len(serving) > self.limits.connections:
            waiting = [each for each in serving if each.is_waiting and each is not connection]
            min(waiting, key=lambda each: each.since, default=connection).give_way()

    @property
    def may_linger(self) -> bool:
        """Whether one more connection may stay open for a moment, so that its client reads why it was ended."""
        return len(self.open) <= self.limits.connections + _MOST_LINGERING

    def _sweep_all(self, loop: asyncio.AbstractEventLoop) -> None:
        for connection in list(self.open):
            try:
                connection.check_time()
            except Exception as error:  # the other connections must still be checked
                log("exception", level=logging.ERROR, error=error)
                connection.transport.abort()
        self._sweep = loop.call_later(_SWEEP_SECONDS, self._sweep_all, loop) if self.open else None


class Connection(H11Protocol):
    """A connection with limits on the size of its headers and on time.

    Attributes:
        since: the event loop's time of its opening, of the first byte of the current headers, or of the end of the last
            headers, whichever is latest.
        has_ended: whether it is only kept open until the client has received what was written.
    """

    def __init__(self, connections: Connections, **arguments: Any):
        super().__init__(**arguments)
        self._connections, self._limits = connections, connections.limits
        self.since = self.loop.time()
        self.has_ended = self._is_deaf = False
        self._head_bytes = self._ahead_bytes = 0
        self._until: float | None = self.since + self._limits.head_timeout  # for the headers
        self._abort_at: float | None = None
        self._blocked_since: float | None = None  # the client receives nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.open.discard(self)

    @property
    def is_waiting(self) -> bool:
        """Whether the connection waits for its client: no complete request is without a complete answer."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        at = 0
        while at < len(data) and not (self.has_ended or self._is_deaf or self.transport.is_closing()):
            state, size = self.conn.their_state, _PIECE_BYTES
            if state is h11.IDLE:
                self._ahead_bytes = 0
                size = min(size, self._limits.head_bytes - self._head_bytes)
                if not size:
                    self._refuse(self._too_large())
                    return
            elif state is h11.SEND_BODY and self.cycle.response_complete:
                self._end()  # answered before its body arrived, which is no longer needed
                return
            elif state is not h11.SEND_BODY:
                self._ahead_bytes += min(size, len(data) - at)
                if state is h11.MUST_CLOSE or self._ahead_bytes > self._limits.head_bytes:
                    self._is_deaf, self.cycle.keep_alive = True, False
                    return
            piece = data[at : at + size]
            at += len(piece)
            if state is h11.IDLE:
                self._head_bytes += len(piece)
                if self._until is None:
                    self.since = self.loop.time()
                    self._until = self.since + self._limits.head_timeout
            super().data_received(piece)
            if state is h11.IDLE and self.conn.their_state is not h11.IDLE:
                self._head_bytes, self._until, self.since = 0, None, self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._blocked_since = None

    def check_time(self) -> None:
        """Ends the connection if it has waited too long for its client."""
        now = self.loop.time()
        if self._abort_at is not None:
            if now >= self._abort_at:
                self.transport.abort()
        elif self.flow.write_paused or self.transport.is_closing():
            self._blocked_since = self._blocked_since or now
            if now >= self._blocked_since + self._limits.send_timeout:
                self.transport.abort()
        elif self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY:
            self._end()
        elif self._until is not None and now >= self._until:
            if self._head_bytes:
                self._refuse(ApiError(408, f"the headers did not arrive within {self._limits.head_timeout:g} seconds"))
            else:
                self.transport.close()

    def give_way(self) -> None:
        """Ends the connection because there are too many. It may be the new one itself."""
        if self.cycle is not None and self.cycle.response_complete and not self._head_bytes:
            self.transport.close()  # without an answer, like any idle connection
            return
        message = (
            f"the server has {counted(self._limits.connections, 'connection')}, which is the limit: try again later"
        )
        self._refuse(ApiError(503, message, code="too_many_connections", retry_after=1))

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that the parser cannot read. Called while its exception is handled."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        if str(error) == _EMPTY_LINE:
            rest = self.conn.trailing_data[0].lstrip(b"\r\n")
            self.conn, self._head_bytes = h11.Connection(h11.SERVER, self._limits.head_bytes), 0
            self.data_received(rest)
        elif status == 431:
            self._refuse(self._too_large())
        else:
            self._refuse(ApiError(status, f"this is not HTTP/1.1: {error}", code="invalid_http"))

    def _too_large(self) -> ApiError:
        is_address = self.conn.our_state is h11.IDLE and b"\n" not in self.conn.trailing_data[0]
        status, what, code = (414, "address", "uri_too_long") if is_address else (431, "headers", "headers_too_large")
        return ApiError(status, f"the request's {what} must be at most {self._limits.head_bytes:,} bytes", code=code)

    def _refuse(self, error: ApiError) -> None:
        """Ends the connection with an error, which is sent unless an answer has begun."""
        log("refused", status=error.status, code=error.code, address=self.client and self.client[0])
        self._connections.answered("none", error.status)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error.response()
            headers = {**dict(answer.raw_headers), b"connection": b"close"}
            reason = HTTPStatus(error.status).phrase.encode()
            head = h11.Response(status_code=error.status, headers=list(headers.items()), reason=reason)
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._end()

    def _end(self) -> None:
        """Stops reading, and gives the client a moment to receive what was written."""
        self.has_ended = True
        if not self._connections.may_linger or not self.transport.can_write_eof():
            self.transport.close()
            return
        try:
            self.transport.write_eof()
        except OSError:  # the client has just disconnected
            self.transport.abort()
            return
        self.flow.resume_reading()
        self._abort_at = self.loop.time() + _LINGER_SECONDS
