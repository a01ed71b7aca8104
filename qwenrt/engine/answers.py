"""A submitted request as its reader sees it: from a thread (Handle), or from an event loop (AsyncAnswer)."""

from __future__ import annotations

import asyncio
import os
import queue
import weakref
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as List

from qwenrt.engine.bridge import Mailbox
from qwenrt.engine.loop import Abort, EndThought, Loop, again, forked
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.engine.requests import Progress, Request
from qwenrt.outputs import Delta
from qwenrt.text.replies.parser import ReplyStream


class _Submitted:
    """A request in the engine, which ends when this is forgotten. ``replies``: what reads its completions."""

    def __init__(self, request: Request, loop: Loop, owner: object) -> None:
        self.request_id = request.request_id
        self.replies: List[ReplyStream] = request.replies
        self._begun = request.begun
        self._loop, self._done = loop, False
        self._owner: object = owner  # an engine that nobody else holds lives until the answer is read
        self._cancel = weakref.finalize(self, loop.inbox.put, Abort(request.request_id))
        self._cancel.atexit = False

    def cancel(self) -> None:
        """End the request soon; its last Delta has finish_reason "abort". Harmless when it has ended."""
        self._cancel()

    def end_thought(self) -> None:
        """The model shall think no longer: what closes a thought is written for it, and the answer follows. Harmless
        where it does not think."""
        if not self._done:
            self._loop.inbox.put(EndThought(self.request_id))

    @property
    def progress(self) -> Progress | None:
        """How far its prompt is; None before it is in the engine."""
        return Progress.of(self._begun[0]) if self._begun else None

    def _read(self, output: RequestOutput) -> Delta:
        if output.finished or output.error is not None:
            self._done = True
            self._owner = None
            self._cancel.detach()
        if output.error is not None:
            raise again(output.error)
        return output.delta


class Handle(_Submitted, Iterator[Delta]):
    """Iterating yields its Deltas as they come and raises what made it fail.

    `cancel`, or forgetting the handle, frees what the request holds.
    """

    def __init__(
        self, request: Request, sink: queue.SimpleQueue[RequestOutput], loop: Loop, owner: object
    ) -> None:
        super().__init__(request, loop, owner)
        self._sink = sink

    def __iter__(self) -> Handle:
        return self

    def __next__(self) -> Delta:
        if self._done:
            raise StopIteration
        if os.getpid() != self._loop.pid:
            raise forked()
        return self._read(self._sink.get())


class AsyncAnswer(_Submitted, AsyncIterator[Delta]):
    """The same for one event loop: `async for` yields its Deltas as they come and raises what made it fail.

    One task reads it. If that is cancelled while it waits here, the request ends, as by `cancel` or by forgetting this.
    """

    def __init__(self, request: Request, mailbox: Mailbox, loop: Loop, owner: object) -> None:
        super().__init__(request, loop, owner)
        self._mailbox = mailbox

    @property
    def backlog(self) -> int:
        """Deltas that came and were not read yet: how far its reader is behind."""
        return len(self._mailbox.received)

    def __aiter__(self) -> AsyncAnswer:
        return self

    async def __anext__(self) -> Delta:
        if self._done:
            raise StopAsyncIteration
        await self._arrival()
        return self._read(self._mailbox.received.popleft())

    async def batch(self, within: float | None = None) -> list[Delta]:
        """All that came since the last one, waiting for at least one; [] at the end. An error is raised once what came
        before it was read. Raises TimeoutError, which ends nothing, where none comes ``within`` so many seconds."""
        deltas: list[Delta] = []
        received = self._mailbox.received
        if not self._done and not received:
            await self._arrival(within)
        while received and not self._done and not (deltas and received[0].error is not None):
            deltas.append(self._read(received.popleft()))
        return deltas

    async def _arrival(self, within: float | None = None) -> None:
        try:
            if within is None:
                await self._mailbox.wait()
            else:
                await asyncio.wait_for(self._mailbox.wait(), within)
        except asyncio.TimeoutError:
            raise TimeoutError(f"no piece of {self.request_id} within {within} s") from None
        except asyncio.CancelledError:
            self.cancel()
            raise
