"""Server-sent events: frames, signs of life, and a response that ends when its client does.

Not here: what the events say (dialect files). Read next: turns.py.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

ALIVE = b": keep-alive\n\n"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
DONE = b"data: [DONE]\n\n"


def encode(value: Any) -> bytes:
    """JSON of one line, as clients of all dialects read it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )


def frame(value: Any, event: str | None = None) -> bytes:
    """One event. JSON has no raw newlines, so a frame is never torn."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + encode(value) + b"\n\n"


async def with_signs_of_life(
    frames: AsyncIterator[bytes], silence_s: float, alive: Callable[[], bytes]
) -> AsyncIterator[bytes]:
    """The frames, and `alive()` whenever none came for so long."""
    coming: asyncio.Task[bytes] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(_next(frames))
            done, _ = await asyncio.wait({coming}, timeout=silence_s)
            if not done:
                yield alive()
                continue
            try:
                value = coming.result()
            except StopAsyncIteration:
                return
            finally:
                coming = None
            yield value
    finally:
        if coming is not None:
            coming.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await coming


async def _next(frames: AsyncIterator[bytes]) -> bytes:
    return await anext(frames)


class EventStream(Response):
    """Sends frames as they come. When the client leaves, `frames` is closed at once.

    close  runs at the end in any case, also where nothing was ever sent
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str],
    ) -> None:
        self._frames, self._close = frames, close
        self.status_code = 200
        self.background = None
        extra = {"cache-control": "no-store", "x-accel-buffering": "no"}
        self.init_headers({**headers, **extra})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        try:
            await until_gone(receive, sending)
        finally:
            await self._close()

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers(headers)
        # The base class counts a body that is not there.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._frames:
            # Waits here while the client does not read, until its protocol cuts it off (wire.py).
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Receive, work: "asyncio.Future[Any]") -> Any:
    """The result of `work`, which is cancelled when the client goes away; None then."""
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return None
    finally:
        for task in (gone, work):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
