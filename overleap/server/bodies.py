"""Bodies of requests: of one type, and bounded one by one, by key and all together.

Not what is in them (schema.py), nor how slowly they may come (wire.py). Read next: app.py.
"""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request as HttpRequest

from overleap.server.refusals import Refusal, overloaded

KEY_SHARE = 4  # bodies of full size that one key may have here at once
ALL_SHARE = 16  # and all keys together


class Bodies:
    """What is held of bodies. Belongs to the loop. most: bytes of one of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.held: Counter[str] = Counter()  # bytes by key

    @asynccontextmanager
    async def read(self, http: HttpRequest, key: str) -> AsyncIterator[bytes]:
        """The body of a request, which counts as held until the block ends.

        Raises Refusal: 413 for too many bytes, 415 for another type, 503 where too much is held.
        """
        _check_head(http, self._most)
        size = 0
        try:
            pieces = []
            async for piece in http.stream():
                size += len(piece)
                self.held[key] += len(piece)
                if size > self._most:
                    raise _too_large(self._most)
                self._check_held(key)
                pieces.append(piece)
            whole = b"".join(pieces)
            del pieces
            yield whole
        finally:
            self.held[key] -= size
            if not self.held[key]:
                del self.held[key]

    def _check_held(self, key: str) -> None:
        if self.held[key] > KEY_SHARE * self._most:
            raise overloaded(f"{self.held[key]} bytes of this key's requests are here already", 1)
        total = self.held.total()
        if total > ALL_SHARE * self._most:
            raise overloaded(f"{total} bytes of requests are here already", 1)


def _check_head(http: HttpRequest, most: int) -> None:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Anything else a browser may send from any page without asking this server first.
        raise Refusal(415, f"the body is {kind or 'of no type'}, expected application/json")
    try:
        length = int(http.headers.get("content-length") or 0)
    except ValueError:
        raise Refusal(400, "the content-length is no number") from None
    if length > most:
        raise _too_large(most)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is too large, {most} bytes are the most")
