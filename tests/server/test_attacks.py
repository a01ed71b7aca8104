"""What a hostile client, a broken connection or an unlucky moment must not do to a server that others use."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import qwenrt
from qwenrt.server import app, kept_streams, service
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
        lambda: (
            not (
                server.service.running or server.admission.figures().running or server.llm.stats()["running"]
            )
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
        with contextlib.suppress(Exception):  # by which the server around it knows to close the connection
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
        with contextlib.suppress(asyncio.CancelledError):
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


def test_an_engine_that_has_ended_is_no_fault_of_the_request() -> None:
    with qwenrt.load("demo", progress=False) as ended:
        server = app(ended, drain=0)
    for path, body in (("/v1/chat/completions", LONG), ("/v1/embeddings", {"input": "a"})):
        assert asyncio.run(asked(server, "POST", path, body)).status == 503


# ---- nobody's request stands in the way of others


async def longest_pause(work: Callable[[], Any]) -> float:
    """Seconds of the event loop's longest step while something is done, as a count of what could have been done."""
    turns: list[float] = []

    async def beat() -> None:
        while True:
            turns.append(time.thread_time())  # this thread's own work: others may keep the processor
            await asyncio.sleep(0)

    task = asyncio.ensure_future(beat())
    await asyncio.sleep(0)
    await work()
    task.cancel()
    return max(later - earlier for earlier, later in itertools.pairwise(turns))


HEAVY: dict[str, tuple[str, Callable[[], Any]]] = {
    "a bias for each of many prompts": (
        "/v1/completions",
        lambda: {
            "model": "m",
            "prompt": ["a"] * 300,
            "max_tokens": 1,
            "logit_bias": {str(i): 1 for i in range(3000)},
        },
    ),
    "each token's text": ("/tokenize", lambda: {"prompt": "word " * 200_000, "return_token_strs": True}),
    "brackets": ("/v1/chat/completions", lambda: b"[" * 4_000_000),
    "an error that quotes": (
        "/v1/messages",
        lambda: {"max_tokens": 5, "messages": [{"role": "x - at `$" * 400_000, "content": "x"}]},
    ),
    "many messages": ("/api/chat", lambda: {"messages": [{"role": "user", "content": "x"}] * 60_000}),
    "many alternatives": (
        "/v1/chat/completions",
        lambda: LONG | {"n": 16, "logprobs": True, "top_logprobs": 20, "max_tokens": 60},
    ),
}


@pytest.mark.parametrize("what", HEAVY)
def test_heavy_requests_leave_the_event_loop_to_others(server: Server, what: str) -> None:
    path, body = HEAVY[what]

    async def main() -> None:
        given = body()
        raw = given if isinstance(given, bytes) else json.dumps(given).encode()
        longest = await longest_pause(lambda: asked(server, "POST", path, raw))
        assert longest < 0.25  # seconds of work; each of these took many times as much in one step

    asyncio.run(main())


def test_an_object_of_a_thousand_properties_is_no_fault_of_the_server(server: Server) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}
    body = {
        "model": "m",
        "messages": USER,
        "max_tokens": 8,
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
    }
    exchange = asyncio.run(asked(server, "POST", "/v1/chat/completions", body))
    assert exchange.status < 500, exchange.body


def test_a_body_has_no_more_logprobs_than_memory(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_ENTRIES", 2**13)
    body = LONG | {"n": 64, "logprobs": True, "top_logprobs": 20}
    exchange = asyncio.run(asked(server, "POST", "/v1/chat/completions", body))
    told = exchange.headers["x-qwenrt-max-tokens"]
    choices = json.loads(exchange.body)["choices"]
    assert {len(choice["logprobs"]["content"]) for choice in choices} == {int(told)} == {2**13 // 64 // 21}


def test_texts_to_embed_wait_for_their_turn_and_end_with_their_client(server: Server) -> None:
    body = {"model": "m", "input": ["a text of some words " * 100] * 400}

    async def main() -> None:
        exchange = Exchange("POST", "/v1/embeddings", body)
        task = asyncio.ensure_future(exchange.run(server))
        await soon(lambda: server.admission.figures().running)
        before = await asked(server, "POST", "/tokenize", {"prompt": "x " * 40_000})  # in the usual threads
        assert before.status == 200 and not task.done()
        exchange.hang_up()
        await task
        assert exchange.status == 499 and not server.admission.figures().running

    asyncio.run(main())


# ---- memory has bounds that do not grow with the number of clients


def test_bodies_that_are_too_many_together_come_later(llm: qwenrt.LLM) -> None:
    server = app(llm, drain=0, max_body=1 << 20)

    async def main() -> None:
        half = json.dumps({"prompt": "x" * (1 << 19)})[:-2].encode()  # never whole
        waiting = [Exchange("POST", "/tokenize", half, ends=False) for _ in range(66)]
        tasks = [asyncio.ensure_future(exchange.run(server)) for exchange in waiting]
        await soon(lambda: any(exchange.status for exchange in waiting))
        refused = next(exchange for exchange in waiting if exchange.status)
        assert refused.status == 503 and refused.headers["retry-after"] == "1"
        for exchange in waiting:
            exchange.hang_up()
        await asyncio.wait(tasks)
        exchange = await asked(server, "POST", "/tokenize", {"prompt": "x"})
        assert exchange.status == 200 and not server._guard._bodies.held

    asyncio.run(main())


async def _bytes_of(count: int) -> AsyncIterator[bytes]:
    yield b"x" * count


def _keep(streams: kept_streams.KeptStreams, caller: str, number: int, count: int) -> Any:
    about = kept_streams.About("text/plain", {})
    return streams.keep(caller, f"{number:04x}0f8fad5bd9cb469fa165708677289", _bytes_of(count), about, print)


def test_a_reader_of_a_kept_stream_holds_little_of_it() -> None:
    async def main() -> None:
        stream = _keep(kept_streams.KeptStreams(), "a", 1, 1 << 20)
        pieces = [piece async for piece in stream.read(0)]
        assert b"".join(pieces) == b"x" * (1 << 20) and max(map(len, pieces)) <= 65536

    asyncio.run(main())


def test_kept_streams_give_way_to_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_streams, "MAX_STREAMS", 5)

    async def main() -> None:
        streams = kept_streams.KeptStreams()
        _keep(streams, "b", 0, 10)
        for number in range(1, 20):
            await asyncio.sleep(0.001)
            _keep(streams, "a", number, 10)
        names = [str(entry["conversation_id"])[:4] for entry in streams.listed("a")]
        assert names == ["0010", "0011", "0012", "0013"]
        assert len(streams.listed("b")) == 1 and streams.listed("") == []

    asyncio.run(main())


def test_kept_streams_have_a_bound_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_streams, "MOST_BYTES", kept_streams.KEPT_BYTES + 100)

    async def main() -> None:
        streams = kept_streams.KeptStreams()
        for number in range(20):
            _keep(streams, "a", number, 60)
            await asyncio.sleep(0.001)
        assert len(streams.listed("a")) == 2

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
