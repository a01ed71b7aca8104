"""Whose turn it is: bounds, fairness, no starvation, no idle slots; cancelled, expired and drained requests."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwenrt.server.admission import Admission, Turn
from qwenrt.server.turns import Rate, Ticket, Turns
from qwenrt.text.dialects.problem import Problem


def order(turns: Turns, count: int) -> list[str]:
    """Who is served, one at a time."""
    served = []
    for _ in range(count):
        ticket = turns.take()
        assert ticket is not None
        served.append(ticket.caller)
        turns.end(ticket)
    return served


def test_one_caller_is_served_in_order() -> None:
    turns = Turns(1, 100)
    tickets = [Ticket("a", tokens) for tokens in (5000, 1, 300, 90_000, 2)]
    for ticket in tickets:
        turns.add(ticket)
    for ticket in tickets:
        assert turns.take() is ticket
        turns.end(ticket)


def test_a_large_prompt_lets_short_ones_pass_though_not_for_ever() -> None:
    turns = Turns(1, 1000, quantum=1000)
    turns.add(Ticket("agent", 25_000))
    for _ in range(200):
        turns.add(Ticket("chat", 500))
    served = order(turns, 201)
    assert 40 <= served.index("agent") <= 60  # 25 turns of two


def test_many_requests_give_nobody_more_than_few() -> None:
    turns = Turns(1, 1000)
    for caller, count in (("greedy", 200), ("modest", 20), ("third", 20)):
        for _ in range(count):
            turns.add(Ticket(caller, 700))
    assert Counter(order(turns, 60)) == {"greedy": 20, "modest": 20, "third": 20}


def test_tokens_are_shared_not_requests() -> None:
    turns = Turns(1, 1000)
    for _ in range(300):
        turns.add(Ticket("long", 4000))
        turns.add(Ticket("short", 400))
    counts = Counter(order(turns, 220))
    assert abs(counts["long"] * 4000 - counts["short"] * 400) <= 8000


def test_a_higher_priority_comes_sooner_and_the_lowest_still_comes() -> None:
    turns = Turns(1, 1000)
    for priority in (0, 5, 9):
        for _ in range(100):
            turns.add(Ticket("", 1000, priority=priority))
    served: list[int] = []
    for _ in range(300):
        ticket = turns.take()
        assert ticket is not None
        served.append(ticket.priority)
        turns.end(ticket)
    assert served[:110].count(9) >= 95 and 5 in served[:110]
    assert served.count(0) == 100


def test_a_caller_with_many_priorities_gains_nothing() -> None:
    turns = Turns(1, 1000)
    for priority in (4, 5):
        for _ in range(100):
            turns.add(Ticket("split", 1000, priority=priority))
    for _ in range(100):
        turns.add(Ticket("plain", 1000))
    assert Counter(order(turns, 80))["split"] <= 41


def test_several_answers_count_as_many() -> None:
    turns = Turns(4, 10)
    for sequences in (3, 64, 1):
        turns.add(Ticket("a", 10, sequences))
    first, second = turns.take(), turns.take()
    assert first and second and turns.running == 67 and turns.take() is None
    turns.end(first)
    assert turns.take() is None
    turns.end(second)
    assert turns.take() is not None


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes, is taken back and ends: bounds are kept, no slot is idle, nothing is lost or served twice."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns(slots=5, limit=12, quantum=64)
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []

    @rule(
        caller=st.sampled_from("abcd"),
        tokens=st.one_of(st.integers(1, 100), st.integers(1, 10**6)),
        sequences=st.sampled_from([1, 1, 1, 2, 8]),
        priority=st.integers(0, 9),
    )
    def come(self, caller: str, tokens: int, sequences: int, priority: int) -> None:
        if self.turns.full:
            assert len(self.waiting) == 12
            return
        ticket = Ticket(caller, tokens, sequences, priority)
        self.turns.add(ticket)
        self.waiting.append(ticket)

    @rule()
    def go_on(self) -> None:
        while (ticket := self.turns.take()) is not None:
            self.waiting.remove(ticket)
            self.running.append(ticket)
        assert not self.waiting or self.turns.running >= 5  # no slot is idle while somebody waits

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.turns.end(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        ticket = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        assert self.turns.remove(ticket) and not self.turns.remove(ticket)

    @invariant()
    def adds_up(self) -> None:
        turns = self.turns
        assert set(turns) == set(self.waiting) and len(turns) == len(self.waiting) <= 12
        assert turns.waiting_tokens == sum(t.tokens for t in self.waiting)
        assert turns.running == sum(t.sequences for t in self.running)
        assert turns.running_tokens == sum(t.tokens for t in self.running)
        assert turns.callers == len({t.caller for t in self.waiting})
        for size in [max((t.sequences for t in self.running), default=0)]:
            assert turns.running - size < 5


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@settings(max_examples=50, deadline=None)
@given(
    victim=st.integers(1, 50_000),
    flood=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 2000)), min_size=1, max_size=8),
)
def test_nobody_starves(victim: int, flood: list[tuple[str, int]]) -> None:
    """However many others keep coming, a request is served after each of them has had its share of the tokens."""
    turns = Turns(1, 1000, quantum=1000)
    others = len({caller for caller, _ in flood})
    waits = Ticket("victim", victim)
    spent = 0
    for caller, tokens in flood:
        turns.add(Ticket(caller, tokens))
    turns.add(waits)
    while (ticket := turns.take()) is not waits:
        assert ticket is not None
        spent += ticket.tokens
        turns.end(ticket)
        turns.add(Ticket(ticket.caller, ticket.tokens))  # and comes again
        assert spent <= others * (math.ceil(victim / 1000) * 1000 + 1000 + 2000)


def test_the_rate_is_of_the_time_in_which_there_was_work() -> None:
    rate = Rate()
    assert rate.value() is None
    for _ in range(200):
        rate.passed(1.0)
        rate.finished(50)
    first = rate.value()
    assert first is not None and 48 <= first <= 52
    for _ in range(200):
        rate.passed(1.0)
        rate.finished(10)
    assert 9 <= (rate.value() or 0) <= 11  # of late
    assert math.isfinite(rate.value() or 0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_of_a_thousand_arrivals_as_many_as_may_are_taken_and_the_rest_told_so() -> None:
    async def run() -> None:
        admission = Admission(8, max_queue=64, backlog=2, clock=Clock())
        leave = asyncio.Event()
        refused: list[Problem] = []
        served: list[int] = []

        async def come(n: int) -> None:
            try:
                async with admission.turn(f"caller {n % 7}", 100 + n) as turn:
                    await leave.wait()
                    turn.spent = 100
                    served.append(n)
            except Problem as problem:
                refused.append(problem)

        tasks = [asyncio.create_task(come(n)) for n in range(1000)]
        await settle()
        figures = admission.figures()
        assert (figures.running, figures.waiting) == (10, 64) and len(refused) == 1000 - 74
        assert {(p.kind, p.status) for p in refused} == {("queue_full", 429)}
        assert all(p.retry_after is not None and p.retry_after >= 1 for p in refused)
        leave.set()
        await asyncio.gather(*tasks)
        assert len(served) == 74
        await admission.idle()
        assert admission.figures().running == admission.figures().waiting_tokens == 0

    asyncio.run(run())


def test_retry_after_is_what_the_queue_takes_at_the_rate_of_late() -> None:
    async def run() -> None:
        clock = Clock()
        admission = Admission(1, max_queue=4, backlog=0, clock=clock)
        assert admission.retry_after() == 5
        for _ in range(50):
            async with admission.turn("a", 100) as turn:
                clock.now += 1
                turn.spent = 100
        clock.now += 10_000  # idle for hours
        stay = asyncio.Event()

        async def hold(tokens: int) -> None:
            async with admission.turn("a", tokens):
                await stay.wait()

        tasks = [asyncio.create_task(hold(tokens)) for tokens in (5000, 900, 900, 100, 100)]
        await settle()
        with pytest.raises(Problem) as caught:
            async with admission.turn("b", 1):
                pass
        assert caught.value.retry_after == 20  # 2000 tokens at 100 a second
        stay.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_who_waits_too_long_is_told_so() -> None:
    async def run() -> None:
        clock = Clock()
        admission = Admission(1, queue_timeout=60, backlog=0, clock=clock)
        outcomes: list[str] = []

        async def come(name: str) -> None:
            try:
                async with admission.turn(name, 10):
                    await asyncio.Event().wait()
            except Problem as problem:
                outcomes.append(f"{name} {problem.kind} {problem.status}")

        tasks = [asyncio.create_task(come("runs"))]
        await settle()
        tasks.append(asyncio.create_task(come("first")))
        await settle()
        clock.now += 30
        tasks.append(asyncio.create_task(come("second")))
        await settle()
        clock.now += 31
        admission.expire()
        await settle()
        assert outcomes == ["first queue_timeout 503"] and admission.figures().waiting == 1
        assert admission.figures().longest_wait == 31
        clock.now += 1e9  # a laptop wakes up
        admission.expire()
        await settle()
        assert outcomes[1:] == ["second queue_timeout 503"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await admission.idle()

    asyncio.run(run())


def test_the_timer_of_the_queue_runs_by_itself() -> None:
    async def run() -> None:
        admission = Admission(1, queue_timeout=0.02, backlog=0)
        async with admission.turn("a", 1):
            with pytest.raises(Problem) as caught:
                async with admission.turn("b", 1):
                    raise AssertionError("there is no turn to have")
            assert caught.value.kind == "queue_timeout"
        async with admission.turn("b", 1) as turn:
            assert turn.waited < 0.02

    asyncio.run(run())


def test_who_is_cancelled_while_waiting_leaves_at_once() -> None:
    async def run() -> None:
        admission = Admission(1, backlog=0, clock=Clock())
        order: list[str] = []

        async def come(name: str) -> None:
            async with admission.turn(name, 10):
                order.append(name)
                await asyncio.sleep(0)

        async with admission.turn("runs", 1):
            tasks = {name: asyncio.create_task(come(name)) for name in "abc"}
            await settle()
            tasks["a"].cancel()
            await settle()
            assert admission.figures().waiting == 2 and tasks["a"].cancelled()
            tasks["b"].cancel()  # and the turn is free before its task knows
        assert admission.figures().waiting == 0
        await settle()
        with suppress(asyncio.CancelledError):
            await tasks["b"]
        await tasks["c"]
        assert order == ["c"]
        await admission.idle()
        assert admission.figures().running == 0

    asyncio.run(run())


def test_a_turn_given_to_a_task_that_is_cancelled_before_it_runs_is_given_back() -> None:
    async def run() -> None:
        admission = Admission(1, backlog=0, clock=Clock())

        async def come() -> None:
            async with admission.turn("a", 10):
                raise AssertionError("it was cancelled")

        async with admission.turn("runs", 1):
            task = asyncio.create_task(come())
            await settle()
        task.cancel()  # after its future was set, before it went on
        with suppress(asyncio.CancelledError):
            await task
        assert admission.figures().running == 0
        async with admission.turn("b", 1):
            pass

    asyncio.run(run())


def test_a_turn_may_outlive_the_task_that_waited_for_it() -> None:
    async def run() -> None:
        admission = Admission(1, backlog=0, clock=Clock())
        turn = await asyncio.create_task(admission.begin("a", 10))
        assert admission.figures().running == 1
        admission.end(turn)
        admission.end(turn)
        assert admission.figures().running == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), Problem("internal", "x"), asyncio.CancelledError()]
)
def test_a_turn_ends_however_it_ends(error: BaseException) -> None:
    async def run() -> None:
        admission = Admission(1, backlog=0, clock=Clock())
        with suppress(type(error)):
            async with admission.turn("a", 10, sequences=3):
                raise error
        assert admission.figures().running == 0
        await admission.idle()

    asyncio.run(run())


def test_draining_serves_those_who_wait_and_nobody_new() -> None:
    async def run() -> None:
        admission = Admission(1, backlog=0, clock=Clock())
        leave = asyncio.Event()
        turns: list[Turn] = []

        async def come() -> None:
            async with admission.turn("a", 10) as turn:
                turns.append(turn)
                await leave.wait()

        tasks = [asyncio.create_task(come()) for _ in range(3)]
        await settle()
        admission.drain()
        with pytest.raises(Problem) as caught:
            async with admission.turn("b", 1):
                pass
        assert caught.value.kind == "unavailable" and admission.figures().draining
        idle = asyncio.create_task(admission.idle())
        await settle()
        assert not idle.done()
        leave.set()
        await asyncio.gather(idle, *tasks)
        assert len(turns) == 3

    asyncio.run(run())


def test_those_who_wait_can_be_sent_away() -> None:
    async def run() -> None:
        admission = Admission(1, backlog=0, clock=Clock())
        async with admission.turn("runs", 1):
            waits = asyncio.ensure_future(admission.turn("a", 1).__aenter__())
            await settle()
            admission.abandon()
            with pytest.raises(Problem, match="stopped"):
                await waits
        await admission.idle()

    asyncio.run(run())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 5000), st.integers(0, 3), st.booleans()), max_size=40
    )
)
def test_any_mix_of_requests_leaves_nothing_behind(mix: list[tuple[int, int, int, bool]]) -> None:
    async def run() -> None:
        admission = Admission(2, max_queue=10, backlog=1, clock=Clock())
        most = 0

        async def come(caller: int, tokens: int, steps: int) -> None:
            nonlocal most
            async with admission.turn(str(caller), tokens):
                most = max(most, admission.figures().running)
                for _ in range(steps):
                    await asyncio.sleep(0)

        tasks = []
        for caller, tokens, steps, cancelled in mix:
            tasks.append(asyncio.create_task(come(caller, tokens, steps)))
            await asyncio.sleep(0)
            if cancelled:
                tasks[len(tasks) // 2].cancel()
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            assert done is None or isinstance(done, (Problem, asyncio.CancelledError))
        figures = admission.figures()
        assert most <= 3 and figures.running == figures.waiting == figures.callers == 0
        await admission.idle()

    asyncio.run(run())
