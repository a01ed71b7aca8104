"""The clients: each conversation turn by turn, in a closed or an open loop, and what the client itself cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, Protocol

from qwenrt.load_test.client import Answer
from qwenrt.load_test.pacing import ClosedLoop, OpenLoop
from qwenrt.load_test.workloads import Conversation, Request

LONGEST_REST_S = 30.0  # that a refused client waits, whatever Retry-After says
_TICK_S = 0.02


class Asked(Protocol):
    """A server, as the clients see it (client.OpenAIServer)."""

    async def ask(self, request: Request) -> Answer: ...

    async def alive(self) -> bool: ...


class LoadRun:
    """One run, readable while it goes on and when it was cut short. All times are of the event loop's clock.

    ``answers``: in the order in which they ended. ``running``: requests under way. ``gone``: why it was given up, if
    the server has gone. ``lags``: seconds by which the loop was late, at ticks of 20 ms and at each start in an open
    loop: as late may every time in the figures be.
    """

    def __init__(
        self, conversations: Sequence[Conversation], server: Asked, pace: ClosedLoop | OpenLoop
    ) -> None:
        self.planned = sum(len(conversation.turns) for conversation in conversations)
        self.pace = pace
        self.answers: list[Answer] = []
        self.running = 0
        self.gone = ""
        self.lags: list[float] = []
        self.seconds = 0.0
        self.cpu_s = 0.0
        self._server = server
        self._conversations = conversations

    async def go(self) -> None:
        """Send everything and wait for it. Cancelling it keeps what came so far."""
        clock = asyncio.get_running_loop().time
        began, cpu = clock(), time.process_time()
        watch = asyncio.create_task(self._watch())
        work = [asyncio.create_task(part) for part in self._work(began)]
        try:
            await asyncio.gather(*work)
        except _ServerGone as gone:
            self.gone = str(gone)
        finally:
            self.seconds, self.cpu_s = clock() - began, time.process_time() - cpu
            for task in (watch, *work):
                task.cancel()
            await asyncio.gather(watch, *work, return_exceptions=True)

    def _work(self, began: float) -> list[Coroutine[Any, Any, None]]:
        """What each client does, or each conversation."""
        pace = self.pace
        if isinstance(pace, ClosedLoop):
            waiting = iter(self._conversations)
            return [self._client(waiting) for _ in range(min(pace.clients, len(self._conversations)))]
        starts = pace.starts(len(self._conversations), self.planned / len(self._conversations))
        return [
            self._arrive(conversation, began + start)
            for conversation, start in zip(self._conversations, starts, strict=True)
        ]

    async def _client(self, waiting: Iterator[Conversation]) -> None:
        """Takes one conversation after the other. Who was refused rests as long as the server asks."""
        for conversation in waiting:
            last = await self._talk(conversation)
            if last is not None and last.retry_after:
                await asyncio.sleep(min(last.retry_after, LONGEST_REST_S))

    async def _arrive(self, conversation: Conversation, due: float) -> None:
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, due - clock()))
        self.lags.append(clock() - due)
        await self._talk(conversation)

    async def _talk(self, conversation: Conversation) -> Answer | None:
        """All turns of a conversation, up to the first that fails."""
        answer = None
        while (request := conversation.ask()) is not None:
            self.running += 1
            try:
                answer = await self._server.ask(request)
            finally:
                self.running -= 1
            self.answers.append(answer)
            if answer.failure is not None:
                if answer.failure.of_connection and not await self._server.alive():
                    raise _ServerGone(answer.failure.said)
                return answer
            conversation.heard(answer.text, answer.reasoning, answer.calls)
        return answer

    async def _watch(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self.lags.append(clock() - due)


class _ServerGone(Exception):
    """The server takes no connections any more."""
