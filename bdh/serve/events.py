"""Server-sent events, and answers that end when their reader leaves."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bdh.serve.middleware import ClientGone

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
SILENCE_SECONDS = 10.0

Result = TypeVar("Result")


def event(data: dict[str, Any], name: str | None = None) -> bytes:
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
