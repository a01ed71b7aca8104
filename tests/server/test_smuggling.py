"""Where one request ends and the next begins is never a matter of opinion: what two programs could read in two ways is
refused and its connection closed, by both parsers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qwenrt.server.guard import Guard
from qwenrt.server.keys import Keyring
from qwenrt.server.problems import rendered
from qwenrt.server.settings import ServeSettings
from tests.server.wire import Serving, serving, until

HIDDEN = b"GET /hidden HTTP/1.1\r\nhost: localhost\r\n\r\n"
HEAD = b"POST /first HTTP/1.1\r\nhost: localhost\r\n"
CHUNKS = b"0\r\n\r\n"


@pytest.fixture(scope="module", params=["h11", "httptools"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Serving, list[str]]]:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        seen.append(scope["path"])
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    settings = ServeSettings(port=0, drain=0, receive_seconds=0.5)
    guard = Guard(app, settings, Keyring(settings), rendered)
    with serving(guard, settings, parser=request.param) as running:
        yield running, seen


def length(size: int) -> bytes:
    return b"content-length: %d\r\n" % size


AMBIGUOUS = {
    "two lengths": HEAD + length(0) + length(len(HIDDEN)) + b"\r\n" + HIDDEN,
    "a list of lengths": HEAD + b"content-length: 0, %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "a length with a sign": HEAD + b"content-length: +%d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "a length below nothing": HEAD + b"content-length: -1\r\n\r\n" + HIDDEN,
    "a length in hexadecimal": HEAD + b"content-length: 0x%x\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "a length with a line in it": HEAD + b"content-length: 4\n2\r\n\r\n" + HIDDEN,
    "a length and chunks": HEAD
    + length(len(CHUNKS + HIDDEN))
    + b"transfer-encoding: chunked\r\n\r\n"
    + CHUNKS
    + HIDDEN,
    "chunks that are none": HEAD + b"transfer-encoding: xchunked\r\n\r\n" + CHUNKS + HIDDEN,
    "chunks before another coding": HEAD + b"transfer-encoding: chunked, identity\r\n\r\n" + CHUNKS + HIDDEN,
    "a space before the colon": HEAD + b"content-length : %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "a header without a name": HEAD + b": x\r\n" + length(len(HIDDEN)) + b"\r\n" + HIDDEN,
    "a return alone in a header": HEAD + b"x: a\rcontent-length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "a zero byte in a header": HEAD + b"x: a\0b\r\n\r\n" + HIDDEN,
    "a chunk's size with a sign": HEAD + b"transfer-encoding: chunked\r\n\r\n+0\r\n\r\n" + HIDDEN,
    "a chunk's size in 0x": HEAD + b"transfer-encoding: chunked\r\n\r\n0x0\r\n\r\n" + HIDDEN,
    "a chunk longer than its size": HEAD
    + b"transfer-encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n"
    + HIDDEN,
    "a chunk's size beyond 64 bits": HEAD
    + b"transfer-encoding: chunked\r\n\r\n10000000000000000\r\n"
    + HIDDEN,
}


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_hides_no_request(served: tuple[Serving, list[str]], what: str) -> None:
    running, seen = served
    seen.clear()
    with running.wire(AMBIGUOUS[what]) as wire:
        came = wire.rest()
    until(lambda: not running.connections)
    assert "/hidden" not in seen, came
    assert came.count(b"HTTP/1.1 ") <= 1 or b"HTTP/1.1 400" in came


def test_requests_one_after_the_other_are_both_served(served: tuple[Serving, list[str]]) -> None:
    running, seen = served
    seen.clear()
    with running.wire(HEAD + length(3) + b"\r\nabc" + HIDDEN) as wire:
        assert wire.response()[0] == wire.response()[0] == 200
    assert seen == ["/first", "/hidden"]
