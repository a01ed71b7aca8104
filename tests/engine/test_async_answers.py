"""Answers read in an event loop: a step wakes it once, and whoever stops reading ends the work in the engine."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch

from qwenrt.engine.async_engine import AsyncEngine
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.engine.thoughts import ThoughtRules
from qwenrt.errors import BackendError, CapacityError, RequestError
from qwenrt.outputs import Delta
from qwenrt.sampling_params import SamplingParams
from tests.engine.conftest import FaultyBackend, make_engine
from tests.engine.test_async_engine import ENDLESS, GREEDY, eventually, idle, slowly

Main = Callable[[], Coroutine[Any, Any, Any]]


@pytest.fixture
def served() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(make_engine(max_model_len=4096, num_blocks=512, max_num_batched_tokens=64))
    yield engine
    engine.close()


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


class Gate:
    """A fault that holds up the step it is in until `open`."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.reached.set()
        assert self._opened.wait(200)
        return x

    def open(self) -> None:
        FaultyBackend.fault = None
        self._opened.set()


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 200)


def test_an_answer_is_what_a_handle_gives(served: AsyncEngine) -> None:
    expected = tokens_of(list(served.submit([1, 2, 3], GREEDY)))

    async def main() -> None:
        answer = served.asubmit([1, 2, 3], GREEDY)
        deltas = [delta async for delta in answer]
        assert tokens_of(deltas) == expected and deltas[-1].finish_reason == "length"
        assert [delta async for delta in answer] == [] and await answer.batch() == []
        batches = []
        answer = served.asubmit([1, 2, 3], GREEDY)
        while batch := await answer.batch():
            batches += batch
        assert tokens_of(batches) == expected and batches[-1].usage is not None

    asyncio.run(main())


def test_a_step_wakes_the_loop_once_for_all_its_requests(served: AsyncEngine) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls: list[object] = []
        right = loop.call_soon_threadsafe

        def counted(callback: Any, *args: Any, **options: Any) -> Any:
            calls.append(callback)
            return right(callback, *args, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        before = served.stats()["steps"]
        answers = [served.asubmit([n, n + 1], GREEDY) for n in range(1, 13)]
        for answer in answers:
            assert len([delta async for delta in answer]) == 8
        steps = served.stats()["steps"] - before
        assert 8 <= len(calls) <= steps + 1 < 12 * 8

    asyncio.run(main())


def test_what_is_wrong_is_raised_at_once(served: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="no event loop runs in this thread"):
        served.asubmit([1], GREEDY)

    async def main() -> None:
        with pytest.raises(RequestError, match="an empty list"):
            served.asubmit([], GREEDY)

    asyncio.run(main())


@pytest.mark.parametrize("state", ["queued", "prefilling", "decoding"])
@pytest.mark.parametrize("how", ["task", "cancel", "lost"])
def test_who_stops_reading_ends_the_request_within_a_step(state: str, how: str) -> None:
    served = AsyncEngine(
        make_engine(max_model_len=4096, num_blocks=512, max_num_batched_tokens=64, max_num_seqs=1)
    )
    gate = Gate()

    async def main() -> None:
        first = served.asubmit([5], ENDLESS) if state == "queued" else None
        if first is not None:
            await first.__anext__()
        if state != "decoding":
            FaultyBackend.fault = gate
        answer = served.asubmit([1, 2] * 400 if state == "prefilling" else [1], ENDLESS)
        if state == "decoding":
            await answer.__anext__()
            FaultyBackend.fault = gate

        async def read() -> None:
            async for _ in answer:
                pass

        task = asyncio.create_task(read())
        await until(gate.reached)
        steps = served.stats()["steps"]
        if how == "task":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "cancel":
            answer.cancel()
        else:
            task.cancel()
            await asyncio.wait([task])
            del answer, task, read
            gc.collect()
        if first is not None:
            first.cancel()
        gate.open()
        await asyncio.to_thread(eventually, lambda: idle(served))
        assert served.stats()["steps"] == steps, "it was computed any further"
        if how == "cancel":
            await task

    try:
        asyncio.run(main())
    finally:
        gate.open()
        served.close()


def test_waiting_for_a_while_ends_nothing(served: AsyncEngine) -> None:
    gate = Gate()

    async def main() -> None:
        FaultyBackend.fault = gate
        answer = served.asubmit([1], GREEDY)
        await until(gate.reached)
        with pytest.raises(TimeoutError):
            await answer.batch(within=0.01)
        assert answer.backlog == 0
        gate.open()
        deltas = []
        while batch := await answer.batch(within=200):
            deltas += batch
        assert len(tokens_of(deltas)) == 8

    try:
        asyncio.run(main())
    finally:
        gate.open()


def test_what_was_not_read_can_be_counted(served: AsyncEngine) -> None:
    async def main() -> None:
        answer = served.asubmit([1], GREEDY)
        while answer.backlog < 8:
            await asyncio.sleep(0.001)
        assert len(await answer.batch()) == 8 and answer.backlog == 0

    asyncio.run(main())


def test_each_loop_gets_its_own(served: AsyncEngine) -> None:
    expected = {n: tokens_of(list(served.submit([n], GREEDY))) for n in range(1, 5)}
    found: dict[int, list[list[int]]] = {}

    def serve(n: int) -> None:
        async def one() -> list[int]:
            return tokens_of([delta async for delta in served.asubmit([n], GREEDY)])

        async def main() -> None:
            found[n] = await asyncio.gather(*(one() for _ in range(5)))

        asyncio.run(main())

    threads = [threading.Thread(target=serve, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert found == {n: [wanted] * 5 for n, wanted in expected.items()}


def test_a_closed_loop_breaks_nothing(served: AsyncEngine) -> None:
    FaultyBackend.fault = slowly
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        answer = served.asubmit([1], ENDLESS)
        await answer.__anext__()
        return answer

    answer = loop.run_until_complete(begin())
    loop.close()
    eventually(lambda: idle(served))  # though somebody still holds the answer
    assert served.stats()["finished"]["abort"] == 1 and answer.request_id
    assert len(list(served.submit([1], GREEDY))) == 8 and served.failure is None


def test_a_failure_comes_behind_what_was_computed(served: AsyncEngine) -> None:
    def out_of_memory(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no")

    async def main() -> None:
        answer = served.asubmit([1], ENDLESS)
        first = await answer.batch()
        FaultyBackend.fault = out_of_memory
        with pytest.raises(CapacityError, match="OutOfMemoryError: no"):
            while batch := await answer.batch():
                first += batch
        assert all(delta.token_ids for delta in first)
        assert await answer.batch() == []

    asyncio.run(main())
    assert served.stats()["finished"] == {"error": 1}


def test_the_end_of_the_thread_is_told_to_all_and_seen_at_once() -> None:
    engine = make_engine()
    served = AsyncEngine(engine)
    assert served.failure is None

    def broken() -> list[tuple[object, int]]:
        raise ZeroDivisionError("a fault of ours")

    async def main() -> None:
        engine.scheduler.schedule = broken  # type: ignore[assignment, method-assign]
        with pytest.raises(BackendError, match="ZeroDivisionError: a fault of ours"):
            await served.asubmit([1], GREEDY).batch()
        assert isinstance(served.failure, BackendError) and "a fault of ours" in str(served.failure)

    asyncio.run(main())
    served.close()
    assert served.failure is not None


def test_a_close_wakes_who_waits() -> None:
    FaultyBackend.fault = slowly
    served = AsyncEngine(make_engine(max_model_len=4096, max_num_seqs=1))

    async def main() -> None:
        running, waiting = served.asubmit([1], ENDLESS), served.asubmit([2], ENDLESS)
        await running.__anext__()
        await asyncio.to_thread(served.close)
        for answer in (running, waiting):
            with pytest.raises(RequestError, match="it was closed"):
                async for _ in answer:
                    pass

    asyncio.run(main())
    assert isinstance(served.failure, RequestError)


def test_a_thought_is_ended_from_the_loop(served: AsyncEngine) -> None:
    FaultyBackend.fault = slowly
    rules = ThoughtRules(None, 500, (7, 8, 500, 9), in_thought=True)

    async def main() -> None:
        params = SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True)
        answer = served.asubmit([1], params, thought=rules)
        deltas = [await answer.__anext__()]
        answer.end_thought()
        while 500 not in tokens_of(deltas):
            deltas += await answer.batch()
        written = tokens_of(deltas)
        place = written.index(500)
        assert written[place - 2 : place] == [7, 8]
        answer.cancel()

    asyncio.run(main())


def test_a_sink_of_the_callers_own_gets_all(served: AsyncEngine) -> None:
    class Kept:
        def __init__(self) -> None:
            self.outputs: list[RequestOutput] = []

        def put(self, output: RequestOutput) -> None:
            self.outputs.append(output)

    class Broken:
        def put(self, output: RequestOutput) -> None:
            raise ZeroDivisionError("a sink's fault")

    kept = Kept()
    served.submit_to(Broken(), [1], ENDLESS)
    name = served.submit_to(kept, [1, 2, 3], GREEDY)
    eventually(lambda: bool(kept.outputs) and kept.outputs[-1].finished)
    assert tokens_of([o.delta for o in kept.outputs]) == tokens_of(list(served.submit([1, 2, 3], GREEDY)))
    assert {o.request_id for o in kept.outputs} == {name}
    eventually(lambda: idle(served))
    served.abort(name)
    assert served.failure is None
