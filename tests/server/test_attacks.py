"""What a hostile client, a broken connection or an unlucky moment must not do to a server that others use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import qwenrt
from qwenrt.server import app
from qwenrt.server.application import Server
from tests.server.asgi import Exchange, asked

USER = [{"role": "user", "content": "What is the capital of France?"}]
LONG: dict[str, Any] = {"model": "m", "messages": USER, "ignore_eos": True, "max_tokens": 4000}


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with qwenrt.load("demo", progress=False) as loaded:
        yield loaded


@pytest.fixture
def server(llm: qwenrt.LLM) -> Server:
    return app(llm, drain=0)


async def soon(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.002)


async def nothing_left(server: Server) -> None:
    """Wait until no request holds a turn, an entry or a sequence."""
    await soon(
        lambda: not (
            server.service.running or server.admission.figures().running or server.llm.stats()["running"]
        )
    )


# ---- whoever hangs up, at whatever moment, gives back what was held for him


def test_a_client_that_leaves_after_the_first_piece_holds_no_turn(server: Server) -> None:
    def leave(exchange: Exchange, message: dict[str, Any]) -> None:
        exchange.hang_up()

    async def main() -> None:
        exchange = Exchange("POST", "/v1/chat/completions", LONG | {"stream": True}, at_send=leave)
        await exchange.run(server)
        await nothing_left(server)

    asyncio.run(main())


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_answer_that_cannot_be_sent_holds_no_turn(server: Server, at: int) -> None:
    def fail(exchange: Exchange, message: dict[str, Any]) -> None:
        if len(exchange.sent) == at:
            raise OSError("the connection is gone")

    async def main() -> None:
        exchange = Exchange("POST", "/v1/chat/completions", LONG | {"stream": True}, at_send=fail)
        with pytest.raises(Exception):  # the server around it closes the connection
            await exchange.run(server)
        await nothing_left(server)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("turns", range(0, 12, 2))
def test_a_request_that_is_cancelled_at_any_moment_holds_no_turn(
    server: Server, stream: bool, turns: int
) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(asked(server, "POST", "/v1/chat/completions", LONG | {"stream": stream}))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, Exception)):
            await task
        await nothing_left(server)

    asyncio.run(main())


def test_requests_that_share_an_id_are_told_apart(server: Server) -> None:
    body = {"model": "m", "max_tokens": 2000, "messages": USER, "stream": True}

    async def main() -> None:
        tasks = [
            asyncio.ensure_future(asked(server, "POST", "/v1/messages", body, **{"x-request-id": "same"}))
            for _ in range(3)
        ]
        await soon(lambda: len(server.service.running) == 3)
        await asyncio.gather(*tasks)
        await nothing_left(server)

    asyncio.run(main())


# ---- what a client says is no part of a header


@pytest.mark.parametrize("kind", ["x\r\nset-cookie: a=b", "x\0y", "x,y", "\x85\u2028", "é" * 70, "x" * 5000])
def test_names_of_ignored_tools_end_no_header(server: Server, kind: str) -> None:
    body = {"model": "m", "messages": USER, "tools": [{"type": kind}], "max_tokens": 1}

    async def main() -> None:
        exchange = await asked(server, "POST", "/v1/chat/completions", body)
        told = exchange.headers["x-qwenrt-ignored"]
        assert exchange.status == 200 and told.isprintable() and "," not in told and len(told) <= 64

    asyncio.run(main())
