"""From what runs to an HTTP response: a stream of events, or one body when all is there.

Not here: what either says (openai.py, completions.py). Read next: sse.py.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from overleap.server import sse
from overleap.server.running import Running


class Talk(Protocol):
    """The answers of one request in the dialect of its API."""

    def frames(self) -> AsyncIterator[bytes]:
        """The events of a streamed answer, errors included."""

    async def whole(self) -> Any:
        """The answer as one object."""

    def alive(self) -> bytes:
        """What a stream says when there is nothing to say."""


async def reply(
    http: HttpRequest,
    running: Running,
    talk: Callable[[], Talk],
    *,
    silence_s: float,
    headers: Mapping[str, str],
) -> Response:
    """The response. `running` is closed when it ends, however it ends."""
    streaming = False
    try:
        told = talk()
        if running.admission.streamed:
            frames = sse.with_signs_of_life(told.frames(), silence_s, told.alive)
            streaming = True
            return sse.EventStream(frames, close=running.close, headers=headers)
        answer = await sse.until_gone(http.receive, asyncio.ensure_future(told.whole()))
    except Exception:
        running.fail()
        raise
    finally:
        if not streaming:
            await running.close()
    if answer is None:
        return Response(status_code=499)
    return Response(sse.encode(answer), media_type="application/json", headers=headers)
