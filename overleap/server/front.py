"""What every response and every request goes through: headers, and whom a browser may speak for.

Not keys (auth.py), not deadlines (wire.py). Read next: app.py.
"""

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overleap.server import sse
from overleap.server.refusals import Refusal
from overleap.server.settings import Settings

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


class Front:
    """Adds headers; refuses what a foreign web page had a browser send.

    A server on this machine alone answers only to its own names, so that a page cannot reach it
    under a name that it had resolved to 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._names = {*_LOOPBACK, settings.host.lower()} if settings.loopback else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _ALWAYS.items():
                    headers.setdefault(name, value)
                headers["openai-processing-ms"] = str(round((time.monotonic() - began) * 1000))
            await send(message)

        refusal = self._foreign(Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, dressed)
            return
        body = sse.encode(refusal.body("chat", ""))
        start = {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(b"content-type", b"application/json"),
                        (b"content-length", str(len(body)).encode())],
        }  # fmt: skip
        await dressed(start)
        await dressed({"type": "http.response.body", "body": body})

    def _foreign(self, headers: Headers) -> Refusal | None:
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._names is not None and name not in self._names:
            return Refusal(403, "this server answers to its own names only", "foreign_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host:
            return Refusal(403, "pages of other origins may not use this server", "foreign_origin")
        return None
