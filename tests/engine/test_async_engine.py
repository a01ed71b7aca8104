"""The engine's thread: any thread may ask, nobody waits for ever, nothing stays behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from qwenrt.engine.async_engine import AsyncEngine
from qwenrt.engine.loop import Compute
from qwenrt.errors import BackendError, CapacityError, RequestError
from qwenrt.model.qwen import Qwen
from qwenrt.sampling_params import SamplingParams
from tests.engine.conftest import FaultyBackend, make_engine, run, tokens

GREEDY = SamplingParams(temperature=0, max_tokens=8)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


@pytest.fixture
def served() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(make_engine(max_model_len=4096, num_blocks=512))
    yield engine
    engine.close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, "waited 200 s"
        time.sleep(0.01)


def idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return stats["running"] == stats["waiting"] == 0 and stats["free_blocks"] == stats["total_blocks"]


def slowly(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.002)
    return x


def test_a_handle_yields_what_the_engine_gives(served: AsyncEngine) -> None:
    engine = make_engine()
    engine.add([1, 2, 3], GREEDY, request_id="r")
    expected = tokens(run(engine)["r"])
    deltas = list(served.submit([1, 2, 3], GREEDY))
    assert [t for d in deltas for t in d.token_ids] == expected
    assert deltas[-1].finish_reason == "length" and deltas[-1].usage is not None
    assert served.logits([1, 2, 3]).shape == (3, 512)


def test_bad_requests_are_raised_where_they_are_made(served: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="an empty list"):
        served.submit([], GREEDY)
    with pytest.raises(RequestError, match="prompt token id 999"):
        served.logits([999])


def test_many_threads_get_their_own_answers(served: AsyncEngine) -> None:
    expected = {n: [t for d in served.submit([n, n + 1], GREEDY) for t in d.token_ids] for n in range(4)}
    wrong: list[object] = []

    def ask(n: int) -> None:
        for i in range(3):
            handle = served.submit([n % 4, n % 4 + 1], GREEDY)
            if (n + i) % 3 == 0:
                next(handle)
                handle.cancel()
                if list(handle)[-1].finish_reason not in ("abort", "length"):
                    wrong.append("cancelled without an end")
            elif [t for d in handle for t in d.token_ids] != expected[n % 4]:
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
        assert not thread.is_alive()
    assert not wrong
    eventually(lambda: idle(served))


def test_cancel_ends_the_iteration_and_frees_the_blocks(served: AsyncEngine) -> None:
    FaultyBackend.fault = slowly
    handle = served.submit([1], ENDLESS)
    next(handle)
    handle.cancel()
    handle.cancel()
    rest = list(handle)
    assert rest[-1].finish_reason == "abort"
    assert list(handle) == []
    eventually(lambda: idle(served))


def test_a_handle_nobody_holds_is_cancelled(served: AsyncEngine) -> None:
    FaultyBackend.fault = slowly
    for delta in served.submit([1], ENDLESS):
        assert delta.token_ids
        break
    gc.collect()
    eventually(lambda: idle(served))


def test_close_while_running_says_so() -> None:
    FaultyBackend.fault = slowly
    engine = AsyncEngine(make_engine(max_model_len=4096, max_num_seqs=1))
    running, waiting = engine.submit([1], ENDLESS), engine.submit([2], ENDLESS)
    next(running)
    engine.close()
    engine.close()
    for handle in (running, waiting):
        with pytest.raises(RequestError, match=r"it was closed\. Load it again"):
            list(handle)
    for use in (lambda: engine.submit([1], GREEDY), lambda: engine.logits([1]), engine.stats):
        with pytest.raises(RequestError, match="it was closed"):
            use()
    assert not engine._loop.thread.is_alive()


def test_a_step_that_takes_for_ever_does_not_hold_up_close(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def stuck(x: torch.Tensor) -> torch.Tensor:
        release.wait(200)
        return x

    monkeypatch.setattr("qwenrt.engine.loop._CLOSE_TIMEOUT", 0.2)
    FaultyBackend.fault = stuck
    engine = AsyncEngine(make_engine())
    handle = engine.submit([1], GREEDY)
    time.sleep(0.1)
    engine.close()
    assert engine._loop.thread.is_alive()  # it was not waited for
    with pytest.raises(RequestError, match="closed"):
        next(handle)
    release.set()
    engine._loop.thread.join(200)
    assert not engine._loop.thread.is_alive()


def test_closing_lets_go_of_the_cache() -> None:
    engine = make_engine()
    cache = weakref.ref(engine.runner.cache.layers[0].k)
    served = AsyncEngine(engine)
    del engine
    list(served.submit([1], GREEDY))
    served.close()
    gc.collect()
    assert cache() is None


def test_an_engine_nobody_holds_ends_its_thread_but_not_an_answer_being_read() -> None:
    served = AsyncEngine(make_engine())
    thread = served._loop.thread
    handle = served.submit([1], GREEDY)
    del served
    gc.collect()
    assert len(list(handle)) == 8
    del handle
    gc.collect()
    thread.join(200)
    assert not thread.is_alive()


def test_a_failed_step_is_raised_to_its_readers_and_others_go_on(served: AsyncEngine) -> None:
    def out_of_memory(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no")

    FaultyBackend.fault = out_of_memory
    handle = served.submit([1], GREEDY)
    with pytest.raises(CapacityError, match="OutOfMemoryError: no"):
        list(handle)
    assert list(handle) == []
    FaultyBackend.fault = None
    assert len(list(served.submit([1], GREEDY))) == 8


def test_what_fails_between_two_steps_is_raised_to_its_asker_alone(
    served: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(work: Callable[[], object]) -> Future[object]:
        """A thread of its own, so that an answer that never comes fails the test."""
        answer: Future[object] = Future()

        def run() -> None:
            try:
                answer.set_result(work())
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return answer

    def out_of_memory(model: Qwen, hidden: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Qwen, "logits", out_of_memory)
    with pytest.raises(CapacityError, match="OutOfMemoryError: no"):
        ask(lambda: served.last_logits([[1, 2]], [3])).result(200)
    monkeypatch.undo()
    with pytest.raises(RequestError, match="reading texts: an empty list"):
        ask(lambda: served.pooled([], len)).result(200)
    with pytest.raises(BackendError, match="between two steps: ZeroDivisionError: a fault of ours"):
        ask(lambda: served._between_steps(fault_of_ours)).result(200)
    assert served.last_logits([[1, 2], [5]], [3, 4]).shape == (2, 2)
    assert len(list(served.submit([1], GREEDY))) == 8


def fault_of_ours(engine: object) -> torch.Tensor:
    raise ZeroDivisionError("a fault of ours")


def test_a_broken_loop_fails_everyone_instead_of_hanging() -> None:
    engine = make_engine()

    def broken() -> list[tuple[object, int]]:
        raise ZeroDivisionError("a fault of ours")

    engine.scheduler.schedule = broken  # type: ignore[assignment, method-assign]
    served = AsyncEngine(engine)
    with pytest.raises(
        BackendError, match=r"ended with ZeroDivisionError: a fault of ours\. Load the model again"
    ):
        list(served.submit([1], GREEDY))
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        served.submit([1], GREEDY)
    served.close()


def test_steps_go_on_while_others_keep_asking_for_logits(served: AsyncEngine) -> None:
    """What is asked for while something is computed waits for a step: two who ask all the time stop no stream."""
    inbox = served._loop.inbox
    asked: list[int] = []

    def again(engine: object) -> torch.Tensor:
        asked.append(1)
        if len(asked) < 1000:
            inbox.put(Compute(again, Future()))
        return torch.zeros(1)

    handle = served.submit([1, 2, 3], GREEDY)
    inbox.put(Compute(again, Future()))
    assert len(list(handle)) == 8 and len(asked) < 1000


def test_an_idle_engine_sleeps(served: AsyncEngine) -> None:
    turns, turn = [], served._loop._turn
    served._loop._turn = lambda: turns.append(turn())  # type: ignore[method-assign]
    list(served.submit([1], GREEDY))
    eventually(lambda: idle(served))
    before = len(turns)
    time.sleep(0.3)
    assert len(turns) - before <= 1 and turns  # the one that waits took the question whether it was idle


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_is_told_so(served: AsyncEngine) -> None:
    handle = served.submit([1], GREEDY)
    list(served.submit([1], GREEDY))

    def child(answers: multiprocessing.connection.Connection) -> None:  # type: ignore[name-defined]
        found = []
        for use in (lambda: served.submit([1], GREEDY), lambda: next(handle), lambda: served.logits([1])):
            try:
                use()
            except BackendError as error:
                found.append(str(error))
        served.close()
        answers.send(found)

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(200), "the child hangs"
    found = ours.recv()
    process.join(200)
    assert len(found) == 3 and process.exitcode == 0
    assert all("Load the model after the fork" in message for message in found)
    assert len(list(handle)) == 8, "the parent goes on"


def test_the_interpreter_ends_with_a_live_engine() -> None:
    script = """
        import atexit, sys
        atexit.register(lambda: print("the end"))  # registered first: runs last
        sys.path.insert(0, ".")
        from qwenrt.engine.async_engine import AsyncEngine
        from qwenrt.sampling_params import SamplingParams
        from tests.engine.conftest import make_engine
        engine = AsyncEngine(make_engine(max_model_len=4096))
        handle = engine.submit([1], SamplingParams(max_tokens=None, ignore_eos=True))
        next(handle)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=root, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "the end\n"
