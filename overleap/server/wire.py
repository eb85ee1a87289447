"""HTTP/1.1 on the wire: uvicorn's protocol with deadlines, and a server that drains when told.

Not here: routes (app.py). Read next: settings.py, which has the numbers.
"""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import HANDLED_SIGNALS

from overleap.server.service import Service
from overleap.server.settings import Settings

log = logging.getLogger("overleap.server")
READ_BYTES = 2**16  # that a client takes in `slow_reader_s` at least, where so much waits for it


class _Protocol(H11Protocol):
    """Closes a connection that sends a head or a body too slowly, or nothing at all.

    And one whose client does not read. Closing alone waits for ever for what is unsent.
    """

    settings: Settings
    _deadline: asyncio.TimerHandle | None = None
    _waits_for: str = ""
    _reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Writing pauses as soon as one byte waits here, and goes on when none does.
        transport.set_write_buffer_limits(0)
        self._expect("head", self.settings.header_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader = self._in_time(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and self._waits_for != "head":
            self._expect("head", self.settings.header_s)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        self._stop_reader()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Set the deadline that fits what the connection is doing."""
        state = self.conn.their_state
        if state is h11.SEND_BODY and self._waits_for != "body":
            self._expect("body", self.settings.body_s)
        elif state not in (h11.IDLE, h11.SEND_BODY):
            self._cancel()

    def _expect(self, what: str, seconds: float) -> None:
        self._cancel()
        self._waits_for = what
        self._deadline = self.loop.call_later(seconds, self._late)

    def _cancel(self) -> None:
        self._waits_for = ""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()

    def _in_time(self, unsent: int) -> asyncio.TimerHandle:
        return self.loop.call_later(self.settings.slow_reader_s, self._read_in_time, unsent)

    def _read_in_time(self, unsent: int) -> None:
        """Cut off a client that took less than READ_BYTES, of `unsent` bytes at the last look.

        What was sent meanwhile besides is not counted: a stream waits until nothing is unsent.
        """
        left = self.transport.get_write_buffer_size()
        if left > unsent - READ_BYTES:
            log.info("a client did not read, %d bytes were left", left)
            self.transport.abort()
        else:
            self._reader = self._in_time(left)

    def _stop_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None


def protocol_of(settings: Settings) -> type[H11Protocol]:
    """A protocol class with the deadlines of these settings, which uvicorn's lacks."""
    return type("Protocol", (_Protocol,), {"settings": settings})


class Server(uvicorn.Server):
    """Drains when told to stop: no new work, running answers get their time, then an error event.

    A second signal cuts the time short. Stopped by a signal, `serve` returns: uvicorn's raises the
    signal anew, so that a server that had ended every answer properly would end as a killed one.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._hurry = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have the loop told of signals, and woken by them, while this serves."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in HANDLED_SIGNALS:
            loop.add_signal_handler(number, self._told)
        try:
            yield
        finally:
            for number in HANDLED_SIGNALS:
                loop.remove_signal_handler(number)

    def _told(self) -> None:
        if self.should_exit:
            self._hurry.set()
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        await drain(self._service, self._hurry)
        await super().shutdown(sockets)


async def drain(service: Service, hurry: asyncio.Event) -> None:
    """Refuse new work; wait for what runs, then end it with an error event."""
    service.bridge.stopping = True
    everyone, seconds = service.everyone, service.settings.drain_s
    ended = asyncio.ensure_future(everyone.wait())
    cut = asyncio.ensure_future(hurry.wait())
    await asyncio.wait({ended, cut}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    cut.cancel()
    if not ended.done():
        late = len(everyone.running) + everyone.coming
        log.warning("%d requests did not end within %.0f s", late, seconds)
        everyone.cut()
        await asyncio.wait({ended}, timeout=5)
        ended.cancel()


def config_of(app: Any, settings: Settings) -> uvicorn.Config:
    """uvicorn as this server wants it."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol_of(settings),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        h11_max_incomplete_event_size=settings.header_bytes,
        timeout_keep_alive=int(settings.idle_s),
        timeout_graceful_shutdown=5,
        backlog=256,
    )
