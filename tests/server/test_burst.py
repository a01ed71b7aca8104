"""A thousand clients at once, over sockets: as many as may are served, the rest is told when to come again."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from qwenrt.server.admission import Admission
from qwenrt.server.guard import Guard
from qwenrt.server.keys import Keyring
from qwenrt.server.lifecycle import allow_descriptors
from qwenrt.server.settings import ServeSettings
from tests.server.test_guard import render
from tests.server.wire import request, serving, until

CLIENTS, SLOTS, QUEUE = 1000, 8, 64


@pytest.mark.parametrize("parser", ["h11", "httptools"])
def test_a_thousand_connections_at_once(parser: Any) -> None:
    allow_descriptors(2 * CLIENTS + 500)
    admission = Admission(SLOTS, max_queue=QUEUE, backlog=0)
    leave, loops = asyncio.Event(), list[asyncio.AbstractEventLoop]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        loops.append(asyncio.get_running_loop())
        async with admission.turn("", 100):
            await leave.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    settings = ServeSettings(port=0, drain=0)
    with serving(Guard(app, settings, Keyring(settings), render), settings, parser=parser) as server:
        wires = [server.wire(request("POST", "/v1/chat/completions", body=b"{}")) for _ in range(CLIENTS)]
        until(lambda: server.tasks == SLOTS + QUEUE and len(loops) == CLIENTS)
        loops[0].call_soon_threadsafe(leave.set)
        statuses: Counter[int] = Counter()
        for wire in wires:
            status, headers, _ = wire.response()
            statuses[status] += 1
            assert status == 200 or 1 <= int(headers["retry-after"]) <= 120
            wire.close()
        assert statuses == {200: SLOTS + QUEUE, 429: CLIENTS - SLOTS - QUEUE}
        until(lambda: server.connections == 0)
        assert admission.figures().running == admission.figures().waiting == 0
