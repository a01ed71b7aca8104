"""Who may ask the engine now: a bounded queue with turns, deadlines, and an end. For one event loop.

    async with admission.turn(caller, tokens=prompt + expected) as turn:
        ...                      # submit to the engine, read the answer
        turn.spent = used        # tokens it really took

Leaving the block, in whatever way, ends the turn; a task that is cancelled while it waits leaves the queue at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from qwenrt.server.keys import HIGHEST_PRIORITY
from qwenrt.server.turns import USUAL_PRIORITY, Rate, Ticket, Turns
from qwenrt.text.dialects.problem import Problem

_UNKNOWN_RATE = 5  # seconds until a refused client should come again, before anything was finished
_SOONEST, _LATEST = 1, 120  # seconds


@dataclass(eq=False)
class Turn:
    """The right to compute. ``waited``: seconds in the queue. ``spent``: tokens that it took, as far as is known."""

    ticket: Ticket
    waited: float = 0.0
    spent: int = 0
    ended: bool = False


@dataclass(frozen=True)
class Figures:
    """What a queue looks like: requests that wait, their tokens and callers, and the seconds of the one that has waited
    longest; sequences that run; tokens a second that are finished while there is work, None where nothing was yet."""

    waiting: int
    waiting_tokens: int
    callers: int
    longest_wait: float
    running: int
    tokens_per_s: float | None
    draining: bool


class Admission:
    """``slots``: sequences that the engine computes at once; ``backlog`` more may wait in it, so that a slot that comes
    free has its next sequence there. ``max_queue`` and ``queue_timeout`` as `ServeSettings` has them."""

    def __init__(
        self,
        slots: int,
        *,
        max_queue: int = 64,
        queue_timeout: float = 60.0,
        backlog: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._turns = Turns(slots + backlog, max_queue)
        self._timeout, self._clock = queue_timeout, clock
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}  # in the order of arrival
        self._rate, self._looked = Rate(), clock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False

    @asynccontextmanager
    async def turn(
        self, caller: str, tokens: int, *, sequences: int = 1, priority: int = USUAL_PRIORITY
    ) -> AsyncIterator[Turn]:
        """Wait for a turn, and have it within the block; else as `begin`."""
        turn = await self.begin(caller, tokens, sequences=sequences, priority=priority)
        try:
            yield turn
        finally:
            self.end(turn)

    async def begin(
        self, caller: str, tokens: int, *, sequences: int = 1, priority: int = USUAL_PRIORITY
    ) -> Turn:
        """Wait for a turn, which `end` must end.

        tokens: what the request is expected to cost, prompt and answers; see `expected`. priority: 0 to 9, beyond it is
        clamped. Raises Problem: unavailable (draining), queue_full at once, queue_timeout.
        """
        self.check_room()
        ticket = Ticket(caller, max(1, tokens), max(1, sequences), min(max(priority, 0), HIGHEST_PRIORITY))
        ticket.arrived = self._clock()
        await self._queue(ticket)
        return Turn(ticket, self._clock() - ticket.arrived)

    def check_room(self) -> None:
        """Raise the Problem that `begin` would raise at once, before work is put into a request for nothing."""
        if self._draining:
            raise Problem("unavailable", "The server is being stopped and takes no new requests.")
        if self._turns.full:
            raise self._full()

    def end(self, turn: Turn) -> None:
        """A turn is over, whatever became of it. Twice is once."""
        if turn.ended:
            return
        turn.ended = True
        self._pass_time()
        self._turns.end(turn.ticket)
        self._rate.finished(turn.spent)
        self._go_on()

    def expected(self, prompt_tokens: int, max_tokens: int, sequences: int = 1) -> int:
        """The cost of a request: its prompt, and answers of a usual length, as most that ask for 32,000 tokens at most
        take a few hundred."""
        return prompt_tokens + sequences * min(max_tokens, 512)

    def retry_after(self) -> int:
        """Seconds, whole and at least one, until what waits now will have been computed at the rate of late."""
        self._pass_time()
        rate = self._rate.value()
        if rate is None:
            return _UNKNOWN_RATE
        return max(_SOONEST, min(_LATEST, math.ceil(self._turns.waiting_tokens / rate)))

    def drain(self) -> None:
        """No new requests from now on; those that wait still have their turns. `idle` waits for the last."""
        self._draining = True

    def abandon(self) -> None:
        """Those that wait are refused as well."""
        self._draining = True
        for ticket in list(self._waiting):
            self._refuse(ticket, Problem("unavailable", "The server was stopped before this request's turn."))

    async def idle(self) -> None:
        """Wait until nothing waits and nothing runs."""
        await self._idle.wait()

    def expire(self) -> None:
        """Refuse those that have waited too long. Called by a timer; harmless at any time."""
        now = self._clock()
        for ticket in list(self._waiting):
            if now - ticket.arrived < self._timeout:
                break
            found = f"The request has waited {self._timeout:g} seconds for its turn; the server is busy."
            self._refuse(ticket, Problem("queue_timeout", found, retry_after=self.retry_after()))
        self._set_timer()

    def figures(self) -> Figures:
        """How the queue stands. Costs nothing that depends on its length."""
        self._pass_time()
        first = next(iter(self._waiting), None)
        turns = self._turns
        return Figures(
            waiting=len(turns),
            waiting_tokens=turns.waiting_tokens,
            callers=turns.callers,
            longest_wait=self._clock() - first.arrived if first is not None else 0.0,
            running=turns.running,
            tokens_per_s=self._rate.value(),
            draining=self._draining,
        )

    # ---- inside

    async def _queue(self, ticket: Ticket) -> None:
        future = asyncio.get_running_loop().create_future()
        self._pass_time()
        self._turns.add(ticket)
        self._waiting[ticket] = future
        self._idle.clear()
        self._go_on()
        try:
            await future
        except BaseException:  # cancelled while it waited, or just as it was given a turn; or refused
            if self._waiting.pop(ticket, None) is not None:
                self._turns.remove(ticket)
            elif not future.cancelled() and future.exception() is None:
                self._turns.end(ticket)
            self._go_on()
            raise

    def _go_on(self) -> None:
        """Give the turns that can be given now."""
        while (ticket := self._turns.take()) is not None:
            future = self._waiting.pop(ticket)
            if future.done():  # cancelled, which its task has not seen yet
                self._turns.end(ticket)
            else:
                future.set_result(None)
        self._set_timer()
        if not self._waiting and not self._turns.running:
            self._idle.set()

    def _refuse(self, ticket: Ticket, problem: Problem) -> None:
        self._turns.remove(ticket)
        future = self._waiting.pop(ticket)
        if not future.done():
            future.set_exception(problem)
        if not self._waiting and not self._turns.running:
            self._idle.set()

    def _full(self) -> Problem:
        found = f"{len(self._turns)} requests wait already, as many as may; the server is busy."
        return Problem("queue_full", found, retry_after=self.retry_after())

    def _pass_time(self) -> None:
        now = self._clock()
        if self._turns.running:
            self._rate.passed(now - self._looked)
        self._looked = now

    def _set_timer(self) -> None:
        """One timer, for the one that has waited longest."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        first = next(iter(self._waiting), None)
        if first is not None:
            left = max(0.0, first.arrived + self._timeout - self._clock())
            self._timer = asyncio.get_running_loop().call_later(left, self.expire)
