"""Whose turn it is: a bounded queue in which every caller gets the same number of tokens. No clock of its own, no I/O.

Deficit round robin: callers with something to do stand in a ring. Who is at its front gets a quantum of tokens to
spend, larger for a higher priority, and is served while its next request costs no more than it has saved; then the
next one has its turn. So a caller with one prompt of 25,000 tokens waits while others with short ones pass, though not
for ever, and a caller with a thousand requests gets no more than one with ten.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

USUAL_PRIORITY = 5


@dataclass(eq=False)
class Ticket:
    """One request that waits or runs. ``tokens``: what it is expected to cost, its prompt and its answers together.
    ``sequences``: how many answers it computes at once. ``arrived``: seconds of the caller's clock."""

    caller: str
    tokens: int
    sequences: int = 1
    priority: int = USUAL_PRIORITY
    arrived: float = 0.0


@dataclass(eq=False)
class _Flow:
    """The waiting requests of one caller with one priority, first come, first served; what it has saved."""

    weight: float
    waiting: deque[Ticket] = field(default_factory=deque)
    saved: float = 0.0


class Turns:
    """At most ``limit`` requests wait; at most ``slots`` sequences run, or the one request that reaches beyond.

    A request that computes several sequences begins as soon as one slot is free, and those that have none wait in the
    engine: nobody else waits longer for that, and no slot is kept empty for it. ``quantum``: tokens that a turn is
    worth at the usual priority; each step of priority is worth a factor of two, so that the lowest is still served.
    """

    def __init__(self, slots: int, limit: int, quantum: int = 1024) -> None:
        self.slots, self.limit, self._quantum = slots, limit, quantum
        self._ring: deque[tuple[str, int]] = deque()
        self._flows: dict[tuple[str, int], _Flow] = {}
        self._levels: dict[str, int] = {}  # priorities that a caller waits with: they share its turns
        self._paid = False  # whether the ring's front has had the quantum of its turn
        self.waiting_tokens = self.running = self.running_tokens = self._waiting = 0

    def __len__(self) -> int:
        """How many requests wait."""
        return self._waiting

    def __iter__(self) -> Iterator[Ticket]:
        """Those that wait, in no order that means anything."""
        for flow in self._flows.values():
            yield from flow.waiting

    @property
    def callers(self) -> int:
        """How many different callers wait."""
        return len(self._levels)

    @property
    def full(self) -> bool:
        """Whether one request more would be one too many."""
        return len(self) >= self.limit and not (self.limit == 0 and self.running < self.slots)

    def add(self, ticket: Ticket) -> None:
        """One more waits, at the end of its caller's."""
        place = ticket.caller, ticket.priority
        flow = self._flows.get(place)
        if flow is None:
            flow = self._flows[place] = _Flow(2.0 ** (ticket.priority - USUAL_PRIORITY))
            self._levels[ticket.caller] = self._levels.get(ticket.caller, 0) + 1
            self._ring.append(place)
        flow.waiting.append(ticket)
        self._waiting += 1
        self.waiting_tokens += ticket.tokens

    def remove(self, ticket: Ticket) -> bool:
        """Take back one that waits -> whether it did."""
        place = ticket.caller, ticket.priority
        flow = self._flows.get(place)
        if flow is None or ticket not in flow.waiting:
            return False
        flow.waiting.remove(ticket)
        self._left(place, flow, ticket)
        return True

    def take(self) -> Ticket | None:
        """The next that begins, None where none waits or no slot is free. `end` frees what it holds."""
        if self.running >= self.slots or not self._ring:
            return None
        while (ticket := self._served()) is None:
            pass
        self.running += ticket.sequences
        self.running_tokens += ticket.tokens
        return ticket

    def end(self, ticket: Ticket) -> None:
        """One that began has ended."""
        self.running -= ticket.sequences
        self.running_tokens -= ticket.tokens

    def _served(self) -> Ticket | None:
        """The ticket at the ring's front, if it can be paid for; else the ring has moved on."""
        place = self._ring[0]
        flow = self._flows[place]
        if not self._paid:
            self._paid = True
            flow.saved += self._share(place)
        ticket = flow.waiting[0]
        if ticket.tokens <= flow.saved:
            flow.saved -= ticket.tokens
            flow.waiting.popleft()
            self._left(place, flow, ticket)
            return ticket
        self._ring.rotate(-1)
        self._paid = False
        self._skip_rounds()
        return None

    def _share(self, place: tuple[str, int]) -> float:
        return self._quantum * self._flows[place].weight / self._levels[place[0]]

    def _skip_rounds(self) -> None:
        """Rounds in which nobody could be served are made at once: as many as nobody's saving reaches in."""
        rounds = math.inf
        for place in self._ring:
            flow = self._flows[place]
            rounds = min(rounds, (flow.waiting[0].tokens - flow.saved) // self._share(place))
            if rounds < 1:
                return
        for place in self._ring:
            self._flows[place].saved += rounds * self._share(place)

    def _left(self, place: tuple[str, int], flow: _Flow, ticket: Ticket) -> None:
        """A ticket has left its flow; an empty one leaves the ring and keeps nothing."""
        self._waiting -= 1
        self.waiting_tokens -= ticket.tokens
        if flow.waiting:
            return
        if self._ring[0] == place:
            self._paid = False
        self._ring.remove(place)
        del self._flows[place]
        self._levels[place[0]] -= 1
        if not self._levels[place[0]]:
            del self._levels[place[0]]


class Rate:
    """How fast work is finished, in units a second of the time in which there was any: of the last ``horizon`` seconds,
    roughly. A server that stood idle is not a slow one."""

    def __init__(self, horizon: float = 30.0) -> None:
        self._horizon = horizon
        self._units = self._seconds = 0.0

    def passed(self, seconds: float) -> None:
        """So much time went by, in which there was work."""
        kept = math.exp(-max(0.0, seconds) / self._horizon)
        self._units *= kept
        self._seconds = self._seconds * kept + max(0.0, seconds)

    def finished(self, units: float) -> None:
        """So much was done."""
        self._units += units

    def value(self) -> float | None:
        """Units a second; None while nothing is known."""
        return self._units / self._seconds if self._seconds > 0 and self._units > 0 else None
