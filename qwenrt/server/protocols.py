"""Deadlines for receiving and sending, on uvicorn's HTTP protocols, which have none.

uvicorn's keep-alive timer ends at a request's first byte, and an ASGI app begins after its header: whoever sends a
header byte by byte, or reads nothing of an answer, would hold a connection for ever. The mix-in here knows only what
both of uvicorn's protocol classes have had since 0.30: `transport`, `loop`, `cycle`, `flow`, `connections`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from qwenrt.server.settings import ServeSettings

_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
Phase = Literal["idle", "header", "body"]


@dataclass(frozen=True)
class Limits:
    """What a connection may take. The names are those of `ServeSettings`."""

    max_header: int
    max_connections: int
    receive_seconds: float
    receive_rate: float
    send_buffer: int
    send_seconds: float

    @classmethod
    def of(cls, settings: ServeSettings) -> Limits:
        """The limits that a server was told."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})


class Deadlines(ABC):
    """Stands before one of uvicorn's protocol classes, which does all the work.

    A header must be whole ``receive_seconds`` after its first byte (or after the connection was made), and have at most
    ``max_header`` bytes. A body must be whole by then too, or have come at ``receive_rate`` bytes a second since;
    while the app does not read, its client is not blamed. What waits for a reader must shrink by half of
    ``send_buffer`` in each ``send_seconds``, once there is more of it than ``send_buffer`` or the answer is complete.
    """

    limits: Limits
    transport: Any
    loop: asyncio.AbstractEventLoop
    cycle: Any
    flow: Any
    connections: set[Any]

    _phase: Phase = "idle"
    _refused = False
    _since = 0.0  # when the phase began
    _came = 0  # bytes of the phase
    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None
    _app_waited = False  # when this was looked at last
    _unsent = 0  # bytes that waited when `_sending` was set

    @abstractmethod
    def phase(self) -> Phase:
        """What of a request is being received: each of the two classes below asks its own parser."""

    # ---- what the transport calls

    def connection_made(self, transport: Any) -> None:
        """A connection; one too many is told so and closed."""
        if len(self.connections) >= self.limits.max_connections:
            self._refused = True
            transport.write(_answer(503, "unavailable", "The server has as many connections as it may have."))
            transport.close()
            return
        transport.set_write_buffer_limits(high=self.limits.send_buffer)
        # else the system keeps megabytes, and looks like a reader
        with contextlib.suppress(OSError, AttributeError):
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer)
        super().connection_made(transport)  # type: ignore[misc]
        self._enter("header")

    def connection_lost(self, exc: Exception | None) -> None:
        """Its end: nothing is left that would call it later."""
        for timer in (self._receiving, self._sending):
            if timer is not None:
                timer.cancel()
        self._receiving = self._sending = None
        if not self._refused:
            super().connection_lost(exc)  # type: ignore[misc]
            # uvicorn leaves it to run out where the connection was lost by an error
            if (keep_alive := getattr(self, "timeout_keep_alive_task", None)) is not None:
                keep_alive.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client. Those of a header are handed on only as far as a header may go."""
        if self._refused:
            return
        while data and not self.transport.is_closing():
            room = len(data) if self._phase == "body" else max(1, self.limits.max_header - self._came)
            piece, data = data[:room], data[room:]
            self._came += len(piece)
            cycle = self.cycle
            super().data_received(piece)  # type: ignore[misc]
            now = self.phase()
            if now != self._phase or self.cycle is not cycle:
                self._enter(now, 0 if now == "idle" else len(piece))
            elif now == "header" and self._came >= self.limits.max_header:
                self._refuse(431, f"The header has more than {self.limits.max_header} bytes.")
            elif now == "idle":
                self._came = 0

    def pause_writing(self) -> None:
        """More waits for the client than may."""
        if self._refused:
            return
        super().pause_writing()  # type: ignore[misc]
        self._watch_sending()

    def on_response_complete(self) -> None:
        """An answer is written, though its client may not have read it."""
        super().on_response_complete()  # type: ignore[misc]
        if self.transport.get_write_buffer_size():
            self._watch_sending()
        if (now := self.phase()) != self._phase:  # of a pipelined request, which has been read by now
            self._enter(now)

    def _unsupported_upgrade_warning(self) -> None:  # noqa: B027 (it is to say nothing)
        """uvicorn's advice to install more, for every request that wishes for another protocol."""

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP; an answer that has begun cannot become another."""
        self._refuse(400, msg)

    # ---- receiving

    def _enter(self, phase: Phase, came: int = 0) -> None:
        self._phase, self._since, self._came = phase, self.loop.time(), came
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None
        if phase != "idle":
            self._receiving = self.loop.call_later(self.limits.receive_seconds, self._check_receiving)

    def _check_receiving(self) -> None:
        """The time of a header is over, or that in which a body should have come."""
        self._receiving = None
        if self.transport.is_closing():
            return
        if self._phase == "header" and not self._came:  # it was opened and nothing was said
            self.transport.close()
            return
        allowed = self.limits.receive_seconds
        if self._phase == "body":
            app_waits = self.flow.read_paused or self.cycle.waiting_for_100_continue
            if app_waits or self._app_waited:  # its client has all the time again when the app goes on
                self._app_waited = app_waits
                self._enter("body")
                return
            allowed += self._came / self.limits.receive_rate
        left = self._since + allowed - self.loop.time()
        if left > 0:
            self._receiving = self.loop.call_later(left, self._check_receiving)
        else:
            self._refuse(408, f"The request has not come within {self.limits.receive_seconds:g} seconds.")

    # ---- sending

    def _watch_sending(self) -> None:
        if self._sending is None:
            self._unsent = self.transport.get_write_buffer_size()
            self._sending = self.loop.call_later(self.limits.send_seconds, self._check_sending)

    def _check_sending(self) -> None:
        self._sending = None
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            return
        waited = self.flow.write_paused or self.transport.is_closing() or self.cycle.response_complete
        if waited and self._unsent - unsent < self.limits.send_buffer // 2:
            self.transport.abort()  # its request sees a client that has gone
        elif waited:
            self._watch_sending()

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is no request that an app could see, and close."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        kind = {408: "timeout", 431: "too_large"}.get(status, "invalid_request")
        self.transport.write(_answer(status, kind, message))
        self.transport.close()


class _NoUpgrade:
    """Hides the wish for another protocol from httptools, which else reads no body: Java's client asks for HTTP/2 in
    each request, as one may, and goes on without."""

    def data_received(self, data: bytes) -> None:
        if self.phase() != "body" and (found := _UPGRADE.search(data)):  # type: ignore[attr-defined]
            end = data.find(b"\r\n\r\n")
            if end < 0 or found.start() < end:
                data = data[: found.start()] + b"\r\nx-upgrade:" + data[found.end() :]
        super().data_received(data)  # type: ignore[misc]


def _answer(status: int, kind: str, message: str) -> bytes:
    body = json.dumps({"error": {"message": message, "type": kind, "code": kind}}).encode()
    retry = "retry-after: 1\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        f"{retry}cache-control: no-store\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


@cache
def protocol_class(limits: Limits, parser: Literal["auto", "h11", "httptools"] = "auto") -> type[Any]:
    """uvicorn's protocol class with deadlines: that of httptools where it is installed, else that of h11."""
    if parser == "auto":
        try:
            import httptools  # noqa: F401
        except ImportError:
            parser = "h11"
        else:
            parser = "httptools"
    base = _with_h11() if parser == "h11" else _with_httptools()
    return type(base.__name__, (base,), {"limits": limits})


@cache
def _with_h11() -> type[Any]:
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class H11(Deadlines, H11Protocol):  # type: ignore[misc]
        def phase(self) -> Phase:
            if self.conn.their_state is h11.SEND_BODY:
                return "body"
            pending = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
            return "header" if pending else "idle"

    return H11


@cache
def _with_httptools() -> type[Any]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class HttpTools(Deadlines, _NoUpgrade, HttpToolsProtocol):  # type: ignore[misc]
        _parsed: Phase = "idle"

        def phase(self) -> Phase:
            return self._parsed

        def on_message_begin(self) -> None:
            self._parsed = "header"
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._parsed = "body"
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._parsed = "idle"
            super().on_message_complete()

    return HttpTools
