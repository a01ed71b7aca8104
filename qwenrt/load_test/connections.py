"""HTTP/1.1 over asyncio's streams with h11, which uvicorn brings.

No proxy, no redirect, no cookie: a load is sent to the server that was named, and nowhere else.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from qwenrt.errors import RequestError

_PIECE = 1 << 16  # bytes read at once
_CONNECT_S = 10.0
Header = tuple[str, str]


class CouldNotConnect(OSError):
    """No connection came about."""


@dataclass(frozen=True)
class Address:
    """Where a server is. ``path`` is what its routes begin with, such as "/v1"."""

    host: str
    port: int
    tls: bool
    path: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Of "http://HOST:PORT", with or without the "/v1" at its end. Raises RequestError for what is no such URL."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or port == -1
            or parts.query
            or parts.username
        ):
            raise RequestError("the server's URL", f"got {url!r}", "Give one like http://127.0.0.1:8000.")
        path = parts.path.rstrip("/")
        tls = parts.scheme == "https"
        return cls(
            parts.hostname, port or (443 if tls else 80), tls, path if path.endswith("/v1") else path + "/v1"
        )

    @property
    def netloc(self) -> str:
        """HOST:PORT, as a Host header has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.netloc}"


class _Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.state = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)

    def send(self, request: h11.Request, body: bytes) -> None:
        events = [request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        self.writer.write(b"".join(self.state.send(event) or b"" for event in events))

    async def next(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self.state.next_event()
            if event is not h11.NEED_DATA:
                assert not isinstance(event, type) or event is h11.PAUSED
                return event
            self.state.receive_data(await self.reader.read(_PIECE))

    def close(self) -> None:
        self.writer.close()


class Exchange:
    """A response as it comes. ``status`` and ``headers`` are there, ``pieces`` reads the body."""

    def __init__(self, pool: Pool, wire: _Wire, response: h11.Response) -> None:
        self._pool, self._wire = pool, wire
        self.status = response.status_code
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, in pieces as they arrive. Raises h11.RemoteProtocolError where it ends early."""
        while isinstance(event := await self._wire.next(), h11.Data):
            yield bytes(event.data)

    async def body(self, most: int) -> bytes:
        """The whole body, or its first ``most`` bytes."""
        whole = b""
        async for piece in self.pieces():
            whole += piece
            if len(whole) >= most:
                break
        return whole[:most]

    def close(self) -> None:
        """The connection serves the next request where this one was read to its end, else it is closed."""
        state = self._wire.state
        if state.our_state is h11.DONE and state.their_state is h11.DONE:
            state.start_next_cycle()
            self._pool.idle.append(self._wire)
        else:
            self._wire.close()


class Pool:
    """Connections to one server, kept between requests as real clients keep them."""

    def __init__(self, address: Address, headers: Sequence[Header] = ()) -> None:
        self.address = address
        self._headers = [("host", address.netloc), ("user-agent", "qwenrt-bench"), *headers]
        self._tls = ssl.create_default_context() if address.tls else None
        self.idle: list[_Wire] = []

    async def exchange(self, method: str, route: str, body: bytes = b"") -> Exchange:
        """Send a request to a route such as "/models", and read the head of its response.

        Raises CouldNotConnect, OSError where the connection is lost, h11.RemoteProtocolError for what is no HTTP.
        """
        headers = [*self._headers, ("content-length", str(len(body)))]
        if body:
            headers.append(("content-type", "application/json"))
        request = h11.Request(method=method, target=self.address.path + route, headers=headers)
        if self.idle:
            wire = self.idle.pop()
            try:
                return await self._begin(wire, request, body)
            except (OSError, h11.RemoteProtocolError):  # the server closed it meanwhile: a new one tells more
                wire.close()
        return await self._begin(await self.connect(), request, body)

    async def connect(self) -> _Wire:
        """A new connection. Raises CouldNotConnect, which says why there is none."""
        try:
            opened = asyncio.open_connection(self.address.host, self.address.port, ssl=self._tls)
            return _Wire(*await asyncio.wait_for(opened, _CONNECT_S))
        except (asyncio.TimeoutError, TimeoutError):
            raise CouldNotConnect(f"no connection to {self.address} within {_CONNECT_S:g} s") from None
        except OSError as error:
            raise CouldNotConnect(str(error.strerror or error)) from None

    async def _begin(self, wire: _Wire, request: h11.Request, body: bytes) -> Exchange:
        try:
            wire.send(request, body)
            event = await wire.next()
            while isinstance(event, h11.InformationalResponse):
                event = await wire.next()
            if not isinstance(event, h11.Response):
                raise h11.RemoteProtocolError("the connection was closed without a response")
            return Exchange(self, wire, event)
        except BaseException:
            wire.close()
            raise

    def close(self) -> None:
        """Close the connections that serve no request."""
        while self.idle:
            self.idle.pop().close()
