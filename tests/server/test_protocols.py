"""Deadlines and limits of connections, over sockets, with both of uvicorn's protocol classes."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from typing import Any

import pytest

from qwenrt.server.settings import ServeSettings
from tests.server.wire import PATIENCE, Serving, request, serving, until

PARSERS = ("h11", "httptools")
CHUNK = b"data: " + b"x" * 8000 + b"\n\n"


class Echo:
    """Answers with the method, the path and the size of the body; /stream goes on until its client has gone."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gone: list[str] = []
        self.hold = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._lifespan(receive, send)
            return
        path = scope["path"]
        self.seen.append(path)
        if path == "/stream":
            await self._stream(receive, send)
            return
        size, more = 0, path != "/unread"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.append(path)
                return
            size += len(message["body"])
            more = message["more_body"]
        if path == "/wait":
            message = await receive()
            self.gone.append(message["type"])
            return
        body = f"{scope['method']} {path} {size}".encode() if path != "/large" else b"y" * 4_000_000
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, receive: Any, send: Any) -> None:
        gone = asyncio.ensure_future(self._until_gone(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            await asyncio.sleep(0)
        self.gone.append("/stream")

    async def _until_gone(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _lifespan(self, receive: Any, send: Any) -> None:
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return


def limits(**changes: Any) -> ServeSettings:
    usual: dict[str, Any] = {"port": 0, "drain": 0, "receive_seconds": 60, "send_seconds": 60}
    return ServeSettings(**{**usual, **changes})


def still_served(server: Serving) -> None:
    with server.wire(request(path="/after")) as wire:
        assert wire.response()[::2] == (200, b"GET /after 0")


@pytest.fixture(params=PARSERS)
def parser(request: pytest.FixtureRequest) -> str:
    return request.param


def test_requests_of_all_usual_forms_are_served(parser: str) -> None:
    with serving(Echo(), limits(), parser=parser) as server, server.wire() as wire:
        wire.send(request(path="/a"))
        assert wire.response()[::2] == (200, b"GET /a 0")
        wire.send(request("POST", "/b", body=b"12345"))
        assert wire.response()[2] == b"POST /b 5"
        wire.send(
            request("POST", "/c", {"transfer-encoding": "chunked"}) + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        )
        assert wire.response()[2] == b"POST /c 5"
        for byte in request("POST", "/d", body=b"xy"):  # each byte in a packet of its own
            wire.send(bytes([byte]))
        assert wire.response()[2] == b"POST /d 2"
        wire.send(request("POST", "/e", {"expect": "100-continue", "content-length": "4"}))
        assert wire.response()[0] == 100
        wire.send(b"late")
        assert wire.response()[2] == b"POST /e 4"
        wire.send(request("POST", "/f", body=b"1") + request(path="/g") + request("POST", "/h", body=b"23"))
        assert [wire.response()[2] for _ in range(3)] == [b"POST /f 1", b"GET /g 0", b"POST /h 2"]
        wire.send(request(path="/unread", headers={"connection": "close"}))
        assert wire.response()[0] == 200 and wire.ended()


def test_a_wish_for_another_protocol_is_passed_over(parser: str) -> None:
    with serving(Echo(), limits(), parser=parser) as server, server.wire() as wire:
        for name, wish in (("Upgrade", "h2c"), ("upgrade", "websocket"), ("UPGRADE", "TLS/1.0")):
            headers = {
                "Connection": "Upgrade, HTTP2-Settings",
                name: wish,
                "HTTP2-Settings": "AAMAAABkAAQAAP__",
            }
            wire.send(request("POST", "/java", headers, b"\r\nupgrade: is a text"))
            assert wire.response()[2] == b"POST /java 20"
        wire.send(request("POST", "/plain", body=b"\r\nupgrade: is a text"))
        assert wire.response()[2] == b"POST /plain 20"


def test_a_large_body_and_a_large_answer_pass_whole(parser: str) -> None:
    with serving(Echo(), limits(), parser=parser) as server, server.wire() as wire:
        wire.send(request("POST", "/big", body=b"z" * 3_000_000))
        assert wire.response()[2] == b"POST /big 3000000"
        wire.send(request(path="/large"))
        assert len(wire.response()[2]) == 4_000_000


def test_a_header_that_does_not_end_is_given_up(parser: str) -> None:
    app = Echo()
    with serving(app, limits(receive_seconds=0.2), parser=parser) as server:
        slow, silent = server.wire(b"GET /slow HTTP/1.1\r\nhost: localhost\r\nx: "), server.wire()
        with slow, silent:
            assert slow.response()[0] == 408 and slow.ended()
            assert silent.ended()  # nothing was asked, so nothing is answered
        until(lambda: server.connections == 0)
        # the second request of a connection has a deadline too
        with server.wire(request(path="/first")) as kept:
            assert kept.response()[0] == 200
            kept.send(b"GET /second HTT")
            assert kept.response()[0] == 408 and kept.ended()
        assert app.seen == ["/first"]
        still_served(server)


def test_a_header_byte_by_byte_gains_no_time(parser: str) -> None:
    with serving(Echo(), limits(receive_seconds=0.3), parser=parser) as server, server.wire() as wire:
        wire.send(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: ")
        wire.socket.settimeout(0.01)
        sent = 0
        while True:
            try:
                wire.came += wire.socket.recv(4096)
                break
            except TimeoutError:
                wire.send(b"y")
                sent += 1
                assert sent < 2000
        assert wire.came.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_stops_is_given_up(parser: str) -> None:
    app = Echo()
    with serving(app, limits(receive_seconds=0.2), parser=parser) as server:
        head = request("POST", "/body", {"content-length": "1000"})
        with server.wire(head + b"some of it") as wire:
            assert wire.response()[0] == 408 and wire.ended()
        until(lambda: app.gone == ["/body"])  # it was told, and reads no more
        until(lambda: server.tasks == 0)
        still_served(server)


def test_a_body_that_keeps_its_rate_may_take_longer(parser: str) -> None:
    settings = limits(receive_seconds=0.2, receive_rate=100)
    with serving(Echo(), settings, parser=parser) as server, server.wire() as wire:
        wire.send(request("POST", "/rate", {"content-length": "3001"}) + b"a" * 3000)  # good for 30 seconds
        wire.socket.settimeout(0.6)  # three of its deadlines
        with pytest.raises(TimeoutError):
            wire.socket.recv(1)
        wire.socket.settimeout(PATIENCE)
        wire.send(b"a")
        assert wire.response()[2] == b"POST /rate 3001"


def test_a_body_that_is_not_read_yet_is_not_blamed_on_its_client(parser: str) -> None:
    reading = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        loops.append(asyncio.get_running_loop())
        await reading.wait()
        size, more = 0, True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    settings = limits(receive_seconds=0.5, receive_rate=1 << 30)
    with serving(app, settings, parser=parser) as server, server.wire() as wire:
        wire.send(request("POST", "/", {"content-length": "1000000"}) + b"b" * 900_000)
        wire.socket.settimeout(1.2)
        with pytest.raises(TimeoutError):
            wire.socket.recv(1)
        loops[0].call_soon_threadsafe(reading.set)
        wire.send(b"b" * 100_000)
        wire.socket.settimeout(PATIENCE)
        assert wire.response()[0] == 200


@pytest.mark.parametrize("whole", [True, False])
def test_a_header_of_33_kib_is_refused(parser: str, whole: bool) -> None:
    app = Echo()
    with serving(app, limits(max_header=32 << 10), parser=parser) as server:
        long = request(headers={"x-long": "a" * (33 << 10)})
        with server.wire(long if whole else long[:-2]) as wire:
            assert wire.response()[0] == 431
        with server.wire(request(headers={f"x-{n}": "b" * 100 for n in range(290)})) as wire:  # 31 KiB
            assert wire.response()[0] == 200
        assert app.seen == ["/"]
        still_served(server)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS to a port without
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n x: folded\r\n: empty\r\n\r\n",
        request("POST", "/", {"content-length": "-1"}),
        request("POST", "/", {"content-length": "1e3"}),
        request("POST", "/", {"content-length": "99999999999999999999999999"}),
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        request("POST", "/", {"transfer-encoding": "chunked"}) + b"zz\r\nabc\r\n",
        request("POST", "/", {"transfer-encoding": "chunked, gzip"}) + b"abc",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_and_closed(parser: str, sent: bytes) -> None:
    with serving(Echo(), limits(receive_seconds=0.5), parser=parser) as server:
        with server.wire(sent) as wire:
            # h11 finds nothing wrong with some, and would wait for the next
            wire.socket.shutdown(socket.SHUT_WR)
            came = wire.rest()
        assert b" 500 " not in came.split(b"\r\n")[0]
        until(lambda: server.connections == 0)
        still_served(server)


def test_garbage_behind_a_request_ends_the_connection(parser: str) -> None:
    app = Echo()
    with serving(app, limits(), parser=parser) as server:
        with server.wire(request(path="/wait") + b"\x00\x01garbage\r\n\r\n") as wire:
            if parser == "h11":  # reads it when the answer is written
                wire.close()
            else:
                wire.rest()
        until(lambda: app.gone == ["http.disconnect"])
        with server.wire(request(path="/stream")) as wire:
            wire.read_until(b"data: ")
            wire.send(b"\x00\x01garbage\r\n\r\n")
            wire.close()
        until(lambda: server.connections == 0 and server.tasks == 0)
        still_served(server)


def test_who_reads_nothing_is_cancelled(parser: str) -> None:
    app = Echo()
    settings = limits(send_buffer=64 << 10, send_seconds=0.3)
    with serving(app, settings, parser=parser) as server:
        with server.wire(request(path="/stream"), receive_buffer=4096):
            until(lambda: app.gone == ["/stream"])
        until(lambda: server.connections == 0 and server.tasks == 0)
        with server.wire(request(path="/large"), receive_buffer=4096):  # complete, but nobody fetches it
            until(lambda: server.connections == 1)
            until(lambda: server.connections == 0)
        still_served(server)


def test_who_reads_slowly_is_served(parser: str) -> None:
    settings = limits(send_buffer=64 << 10, send_seconds=0.5)
    app = serving(Echo(), settings, parser=parser)
    with app as server, server.wire(request(path="/large"), receive_buffer=65536) as wire:
        wire.read_until(b"\r\n\r\n")
        came = len(wire.came)
        while came < 4_000_000:
            time.sleep(0.02)  # 1.5 s in all: three deadlines
            piece = wire.socket.recv(60_000)
            assert piece
            came += len(piece)
        assert came == 4_000_000


def test_connections_beyond_the_limit_are_told_so(parser: str) -> None:
    with serving(Echo(), limits(max_connections=3), parser=parser) as server:
        kept = [server.wire() for _ in range(3)]
        until(lambda: server.connections == 3)
        with server.wire() as wire:
            assert wire.response()[0] == 503
        kept.pop().close()
        until(lambda: server.connections == 2)
        still_served(server)
        for wire in kept:
            wire.close()


def test_a_client_that_closes_or_half_closes_has_gone(parser: str) -> None:
    app = Echo()
    with serving(app, limits(), parser=parser) as server:
        wire = server.wire(request(path="/wait"))
        until(lambda: app.seen == ["/wait"])
        wire.close()
        until(lambda: app.gone == ["http.disconnect"])
        half = server.wire(request(path="/wait"))
        until(lambda: len(app.seen) == 2)
        half.socket.shutdown(socket.SHUT_WR)  # nothing tells it from one that has closed
        until(lambda: len(app.gone) == 2)
        assert half.ended()
        half.close()
        until(lambda: server.connections == 0 and server.tasks == 0)


def test_damaged_requests_harm_nobody(parser: str) -> None:
    chance = random.Random(7)
    whole = (
        request("POST", "/a", {"x-request-id": "abc", "expect": "100-continue"}, b'{"model": "x"}')
        + request("POST", "/b", {"transfer-encoding": "chunked"})
        + b"3\r\nabc\r\n0\r\n\r\n"
        + request(path="/c?d=e")
    )
    with serving(Echo(), limits(receive_seconds=5), parser=parser) as server:
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                at = chance.randrange(len(damaged))
                kind = chance.randrange(4)
                if kind == 0:
                    damaged[at] = chance.randrange(256)
                elif kind == 1:
                    del damaged[at : at + chance.randint(1, 30)]
                elif kind == 2:
                    damaged[at:at] = bytes(chance.choices(b"\r\n :%;\x00\xff09", k=chance.randint(1, 9)))
                else:
                    damaged[at:at] = damaged[chance.randrange(len(damaged)) :][:50]
            with server.wire(bytes(damaged)) as wire:
                wire.socket.shutdown(socket.SHUT_WR)
                came = wire.rest()
            assert b"HTTP/1.1 5" not in came, bytes(damaged)
        until(lambda: server.connections == 0 and server.tasks == 0)
        still_served(server)


def test_many_connections_at_once(parser: str) -> None:
    with serving(Echo(), limits(), parser=parser) as server:
        wires = [server.wire() for _ in range(300)]
        for number, wire in enumerate(wires):
            wire.send(request(path=f"/{number}"))
        for number, wire in enumerate(wires):
            assert wire.response()[::2] == (200, f"GET /{number} 0".encode())
            wire.close()
        until(lambda: server.connections == 0)
