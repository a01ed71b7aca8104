"""Requests that nobody sends on purpose: none is answered as no request may be. A few here, 20,000 marked slow."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

import qwenrt
from qwenrt.server import app
from qwenrt.server.settings import ServeSettings
from tests.server.fuzz import DOCUMENTED, Requests, fuzz, small_llm, told
from tests.server.wire import Serving, Wire, request, serving, until


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with small_llm() as loaded:
        yield loaded


def test_a_few_hundred_requests_in_this_process(llm: qwenrt.LLM) -> None:
    statuses = asyncio.run(fuzz(app(llm), 1, lambda count: count >= 400))
    assert statuses[200] > 40 and statuses[400] > 100  # what is sent is neither always right nor always wrong


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_thousand_requests_in_this_process(llm: qwenrt.LLM) -> None:
    statuses = asyncio.run(fuzz(app(llm), 2, lambda count: count >= 20_000))
    assert statuses.total() >= 20_000


def test_a_fault_is_found(llm: qwenrt.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "prepare", lambda *_, **__: 1 / 0)
    with pytest.raises(Exception, match="POST"):
        asyncio.run(fuzz(app(llm), 1, lambda count: count >= 400))


def _answered(wire: Wire, served: Serving) -> bytes:
    """What came until the end, or until nothing more comes: some ask by mistake for a connection that stays."""
    wire.socket.settimeout(2)
    try:
        return wire.rest()
    except TimeoutError:
        until(lambda: not served.tasks)
        return wire.came


def _over_sockets(llm: qwenrt.LLM, count: int, seed: int) -> None:
    settings = ServeSettings(port=0, drain=0, receive_seconds=1)
    server, requests, pick = app(llm, settings), Requests(seed), random.Random(seed)
    with serving(server, settings, hooks=server.hooks(lambda: None)) as served:
        for _ in range(count):
            made = requests()
            path = made.scope["raw_path"].decode("latin-1") or "/"
            query = made.scope["query_string"].decode("latin-1")
            headers = {**made.headers_given, "connection": "close"}
            sent = request(made.method, f"{path}?{query}" if query else path, headers, made.body_given)
            if pick.random() < 0.05:  # bytes within the head as well
                at = pick.randrange(len(sent))
                sent = sent[:at] + pick.randbytes(3) + sent[at:]
            with served.wire(sent) as wire:
                came = b"HTTP/1.1 000" if pick.random() < 0.05 else _answered(wire, served)
            status = int(came[9:12] or b"0")
            assert status < 500 or status in DOCUMENTED, (came[:500], told(made))
        until(lambda: not served.tasks and not served.connections)
        until(lambda: not server.service.running and not server.admission.figures().running)
        until(lambda: llm.stats()["free_blocks"] == llm.stats()["total_blocks"])


def test_some_requests_over_sockets(llm: qwenrt.LLM) -> None:
    _over_sockets(llm, 80, 3)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_thousand_requests_over_sockets(llm: qwenrt.LLM) -> None:
    _over_sockets(llm, 2_000, 4)
