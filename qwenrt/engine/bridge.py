"""From the engine's thread to asyncio: all that a step gave to one event loop crosses in a single call."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from qwenrt.engine.output_processor import RequestOutput


class Mailbox:
    """Where one request's outputs arrive in an event loop: a sink for the engine, read by whoever waits in the loop.

    ``received`` are those nobody has read yet.
    """

    def __init__(self, request_id: str, bridge: Bridge) -> None:
        self.request_id, self._bridge = request_id, bridge
        self.received: deque[RequestOutput] = deque()
        self._news = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """From any thread."""
        self._bridge.carry(self, output)

    def arrive(self, output: RequestOutput) -> None:
        """In the loop."""
        self.received.append(output)
        self._news.set()

    async def wait(self) -> None:
        """Until there is something to read."""
        while not self.received:
            self._news.clear()
            await self._news.wait()


class Bridge:
    """To one event loop. ``touched``: where it says that it has something to carry over; ``drop`` ends a request that
    nobody can read any more, because the loop was closed."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, touched: set[Bridge], drop: Callable[[str], object]
    ) -> None:
        self._loop, self._touched, self._drop = loop, touched, drop
        self._waiting: deque[tuple[Mailbox, RequestOutput]] = deque()

    def carry(self, mailbox: Mailbox, output: RequestOutput) -> None:
        """Keep an output until the next `flush`. From any thread, without a lock: a collection may end an engine in the
        middle of this."""
        self._waiting.append((mailbox, output))
        self._touched.add(self)

    def flush(self) -> None:
        """Hand over what was kept."""
        batch: list[tuple[Mailbox, RequestOutput]] = []
        while self._waiting:
            try:
                batch.append(self._waiting.popleft())
            except IndexError:  # another thread was faster
                break
        if not batch:
            return
        try:
            self._loop.call_soon_threadsafe(_arrive, batch)
        except RuntimeError:  # the loop is closed
            for request_id in dict.fromkeys(mailbox.request_id for mailbox, _ in batch):
                self._drop(request_id)


def _arrive(batch: list[tuple[Mailbox, RequestOutput]]) -> None:
    for mailbox, output in batch:
        mailbox.arrive(output)
