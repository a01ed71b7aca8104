"""A server with more to do than it can, whose clients leave, and whose engine fails: over sockets, in every dialect."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import qwenrt
from qwenrt.errors import BackendError, CapacityError
from tests.server.asking import (
    CHAT,
    COMPLETIONS,
    DASHSCOPE,
    GENERATE,
    MESSAGES,
    OLLAMA,
    RESPONSES,
    STREAMS,
    Gate,
    ask,
    chat,
    dashscope,
    read,
    sent,
    serve,
)
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving, until

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, chat()),
    "completions": (COMPLETIONS, {"model": "m", "prompt": "Hello"}),
    "responses": (RESPONSES, {"model": "m", "input": "Hello"}),
    "messages": (MESSAGES, chat(max_tokens=1000)),
    "ollama": (OLLAMA, chat(stream=False)),
    "generate": (GENERATE, {"model": "m", "prompt": "Hello", "stream": False}),
    "dashscope": (DASHSCOPE, dashscope()),
}
LONG = "and so on " * 1500


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(
        lambda prompt: LONG, max_model_len=8192, max_num_seqs=2, max_num_batched_tokens=128
    ) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def gate(llm: qwenrt.LLM) -> Gate:
    return Gate(llm)


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM, gate: Gate) -> Iterator[Serving]:
    with serve(llm, max_queue=4) as running:
        yield running


def waiting(served: Serving) -> int:
    return int(served.application.admission.figures().waiting)  # type: ignore[attr-defined]


def running(served: Serving) -> int:
    return int(served.application.admission.figures().running)  # type: ignore[attr-defined]


def quiet(served: Serving, gate: Gate) -> None:
    """Nothing is left of any request: no task, no turn, no block, no gauge."""
    until(lambda: served.tasks == 0 and running(served) == waiting(served) == 0)
    gate.idle()
    assert not served.application.service.running  # type: ignore[attr-defined]

    def active() -> bytes:
        served.application.metrics._until = 0.0  # type: ignore[attr-defined]
        return ask(served, "/metrics")[2]

    assert b"\nqwenrt_requests_active 0.0\n" in active()


# ---- the queue


def test_a_full_queue_is_429_with_a_time_to_come_again(served: Serving, gate: Gate) -> None:
    with ExitStack() as stack:
        stack.enter_context(gate.closed())
        for _ in range(4 + 4):  # two run, two wait in the engine, four before it
            stack.enter_context(served.wire(sent(CHAT, chat(max_tokens=2))))
        until(lambda: waiting(served) == 4)
        for name, (path, body) in WHOLE.items():
            status, headers, told = ask(served, path, body)
            assert status == 429 and 1 <= int(headers["retry-after"]) <= 120, name
            assert "wait" in json.dumps(told), name
        assert ask(served, CHAT, chat(stream=True))[0] == 429  # before anything was sent
        assert ask(served, "/ready")[0] == ask(served, "/health")[0] == 200
        assert ask(served, "/v1/loads")[2]["waiting"] >= 4
    quiet(served, gate)


def test_who_waits_too_long_is_told_so_in_each_dialect(llm: qwenrt.LLM, gate: Gate) -> None:
    with serve(llm, queue_timeout=0.02, max_queue=100) as served, ExitStack() as stack:
        stack.enter_context(gate.closed())
        for _ in range(4):
            stack.enter_context(served.wire(sent(CHAT, chat(max_tokens=2))))
        until(lambda: running(served) == 4)
        for name, (path, body) in WHOLE.items():
            status, headers, told = ask(served, path, body)
            assert status == 503 and int(headers["retry-after"]) >= 1, name
            assert "busy" in json.dumps(told), name
    gate.idle()


def test_one_keys_long_prompts_let_another_pass(llm: qwenrt.LLM, gate: Gate) -> None:
    first, second = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
    with serve(llm, api_keys=("one", "two")) as served, ExitStack() as stack:
        hold = stack.enter_context(ExitStack())
        hold.enter_context(gate.closed())
        for _ in range(4):
            stack.enter_context(served.wire(sent(CHAT, chat(max_tokens=2), **first)))
        until(lambda: running(served) == 4)
        slow = [sent(CHAT, chat(f"{i} " + "x y " * 1500, max_tokens=2), **first) for i in range(12)]
        wires = [stack.enter_context(served.wire(one)) for one in slow]
        until(lambda: waiting(served) == 12)
        late = stack.enter_context(served.wire(sent(CHAT, chat("short", max_tokens=2), **second)))
        until(lambda: waiting(served) == 13)
        hold.close()
        assert read(late)[0] == 200
        assert waiting(served) + running(served) > 4  # most of the other key's still wait
        for wire in wires:
            wire.close()
    gate.idle()


def test_priorities_are_clamped_and_come_sooner(llm: qwenrt.LLM, gate: Gate) -> None:
    with serve(llm, max_priority=6) as served, ExitStack() as stack:
        with gate.closed():
            for _ in range(4):
                stack.enter_context(served.wire(sent(CHAT, chat(max_tokens=2))))
            until(lambda: running(served) == 4)
            stack.enter_context(served.wire(sent(CHAT, chat(max_tokens=2, priority=9))))
            stack.enter_context(served.wire(sent(CHAT, chat(max_tokens=2, priority=-3))))
            until(lambda: waiting(served) == 2)
            turns = served.application.admission._turns  # type: ignore[attr-defined]
            assert sorted(ticket.priority for ticket in turns) == [0, 6]
        quiet(served, gate)


# ---- clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("several", [1, 3])
@pytest.mark.parametrize("state", ["queued", "in the engine", "prefilling", "decoding"])
def test_who_leaves_is_gone_in_every_state(
    served: Serving, gate: Gate, state: str, several: int, stream: bool
) -> None:
    prompt = "long ago " * 600 if state == "prefilling" else "Hello"
    body = chat(prompt, stream=stream, n=several, temperature=1, max_tokens=4000)
    with ExitStack() as others:
        if state == "decoding":
            with served.wire(sent(CHAT, body)) as wire:
                if stream:
                    wire.read_until(b"and")
                else:
                    until(lambda: gate.engine.stats()["running"] == min(several, 2))
                    first = gate._steps
                    until(lambda: gate._steps > first + 4)
        else:
            with gate.closed():
                others_first = {"queued": 4, "in the engine": 2, "prefilling": 0}[state]
                for _ in range(others_first):
                    others.enter_context(served.wire(sent(CHAT, chat(max_tokens=50))))
                until(lambda: running(served) == others_first)
                with served.wire(sent(CHAT, body)):
                    if state == "queued":
                        until(lambda: waiting(served) == 1)
                    else:
                        until(lambda: running(served) == others_first + several and gate.waiting.is_set())
                        until(lambda: gate.engine.stats()["pending"])
                if state == "queued" or not stream:
                    until(lambda: served.tasks == others_first)  # before a step was made
    quiet(served, gate)


@pytest.mark.parametrize("name", STREAMS)
def test_who_leaves_a_stream_of_any_dialect_is_gone(served: Serving, gate: Gate, name: str) -> None:
    path, body, headers = STREAMS[name]
    with served.wire(sent(path, body, **headers)) as wire:
        wire.read_until(b"and")
        until(lambda: gate.engine.stats()["running"] == 1)
    quiet(served, gate)


def test_who_leaves_after_the_last_token_harms_nothing(served: Serving, gate: Gate) -> None:
    with served.wire(sent(CHAT, chat(stream=True, max_tokens=3))) as wire:
        wire.read_until(b'"finish_reason":"length"')
    with served.wire(sent(CHAT, chat(max_tokens=3))) as wire:
        wire.response()
    quiet(served, gate)


def test_who_reads_nothing_is_cancelled(llm: qwenrt.LLM, gate: Gate) -> None:
    body = chat(stream=True, logprobs=True, top_logprobs=20, max_tokens=8000)
    with serve(llm, send_buffer=4096, send_seconds=0.1) as served:
        with served.wire(sent(CHAT, body), receive_buffer=4096) as wire:
            wire.read_until(b"and")
            until(lambda: served.tasks == 0)
        quiet(served, gate)


def test_a_half_closed_client_has_gone(served: Serving, gate: Gate) -> None:
    with served.wire(sent(CHAT, chat(stream=True))) as wire:
        wire.read_until(b"and")
        wire.socket.shutdown(1)
        until(lambda: served.tasks == 0)
    quiet(served, gate)


def test_pipelined_requests_are_answered_in_their_order(served: Serving, gate: Gate) -> None:
    with served.wire(
        sent(CHAT, chat(max_tokens=2)) + sent("/version") + sent(CHAT, chat(max_tokens=3))
    ) as wire:
        counts = [read(wire)[2].get("usage", {}).get("completion_tokens") for _ in range(3)]
    assert counts == [2, None, 3]
    quiet(served, gate)


# ---- engines that fail


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("error", [CapacityError, BackendError])
def test_a_failure_in_a_stream_is_an_event_and_its_end(
    served: Serving, gate: Gate, name: str, error: type[Exception]
) -> None:
    path, body, headers = STREAMS[name]

    def fail(step: int) -> None:
        raise error("a step", "the device said no", "Try again.")

    with served.wire(sent(path, body, **headers)) as wire:
        wire.read_until(b"and")
        gate.before = fail
        # the last event, then the stream's end
        head, _, came = wire.read_until(b"0\r\n\r\n").rpartition(b"data:")
        gate.before = lambda step: None
    last = came or head
    assert b"the device said no" in last, last[-400:]
    assert b"[DONE]" not in last and b"message_stop" not in last and b'"status":"completed"' not in last
    quiet(served, gate)
    assert ask(served, CHAT, chat(max_tokens=2))[0] == 200


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("error", "status"), [(CapacityError, 503), (BackendError, 500)])
def test_a_failure_before_a_whole_answer_is_a_status(
    served: Serving, gate: Gate, name: str, error: type[Exception], status: int
) -> None:
    path, body = WHOLE[name]

    def fail(step: int) -> None:
        raise error("a step", "the device said no", "Try again.")

    gate.before = fail
    try:
        got, _, told = ask(served, path, body)
    finally:
        gate.before = lambda step: None
    assert got == status and "the device said no" in json.dumps(told)
    quiet(served, gate)


def test_a_cache_that_runs_full_slows_answers_and_loses_none() -> None:
    def reply(prompt: str) -> str:
        return prompt.rsplit("<|im_start|>user", 1)[-1].split("<|im_end|>")[0].strip() + " word" * 150

    with scripted_llm(reply, max_model_len=512, max_num_seqs=4) as llm, serve(llm) as served:
        gate = Gate(llm)
        blank = gate.engine.blocks._blank
        held = [blank.pop() for _ in range(len(blank) - 30)]  # what is left is enough for any one of them
        with gate.closed(), ExitStack() as stack:
            wires = [stack.enter_context(served.wire(sent(CHAT, chat(f"number {n}")))) for n in range(4)]
            until(lambda: running(served) == 4)
            gate._open.set()
            told = [read(wire)[2]["choices"][0] for wire in wires]
        assert gate.engine.stats()["preemptions"] > 0
        assert [one["message"]["content"] for one in told] == [
            f"number {n}" + " word" * 150 for n in range(4)
        ]
        blank += held
        quiet(served, gate)


def test_an_engine_that_has_ended_is_told_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_llm(lambda prompt: LONG, max_model_len=8192) as llm, serve(llm) as served:
        gate, whole = Gate(llm), sent(MESSAGES, chat(max_tokens=999))
        with served.wire(sent(CHAT, chat(stream=True))) as wire, served.wire(whole) as other:
            wire.read_until(b"and")
            until(lambda: running(served) == 2)

            def broken() -> None:
                raise RuntimeError("the thread is no more")

            monkeypatch.setattr(gate.engine.scheduler, "schedule", broken)
            came = wire.read_until(b"0\r\n\r\n")
            assert b'"error"' in came and b"[DONE]" not in came
            assert read(other)[0] >= 500
        for path in ("/health", "/ready"):
            status, _, told = ask(served, path)
            assert status == 503 and "engine has ended" in told["reason"]
        for name, (path, body) in WHOLE.items():
            assert ask(served, path, body)[0] in (500, 503), name
        for path in ("/v1/loads", "/server_info", "/api/ps"):
            assert ask(served, path)[0] == 503, path
        assert ask(served, "/metrics")[0] == ask(served, "/version")[0] == 200


def test_health_answers_while_a_large_body_is_read_and_the_engine_is_full(
    served: Serving, gate: Gate
) -> None:
    with ExitStack() as stack:
        stack.enter_context(gate.closed())
        for _ in range(4):
            stack.enter_context(served.wire(sent(CHAT, chat())))
        until(lambda: running(served) == 4)
        large = stack.enter_context(served.wire(sent(CHAT, chat("many words " * 600_000))))
        answers = [ask(served, path)[0] for _ in range(20) for path in ("/health", "/ready", "/metrics")]
        assert set(answers) == {200}
        assert read(large)[0] == 400  # too long, in the end
    quiet(served, gate)


# ---- the end of a server


@pytest.mark.parametrize("name", STREAMS)
def test_a_server_that_stops_ends_its_streams_in_their_words(llm: qwenrt.LLM, gate: Gate, name: str) -> None:
    path, body, headers = STREAMS[name]
    gate.before = lambda step: threading.Event().wait(0.01)  # so that it is not over by itself
    try:
        with serve(llm, drain=0.1) as served, served.wire(sent(path, body, **headers)) as wire:
            wire.read_until(b"and")
            served.server.stop()
            came = wire.rest()
    finally:
        gate.before = lambda step: None
    ends = {
        "chat": b"data: [DONE]\n\n",
        "completions": b"data: [DONE]\n\n",
        "responses": b"event: response.incomplete",
        "messages": b"event: message_stop",
        "ollama": b'"done":true',
        "generate": b'"done":true',
        "dashscope": b'"finish_reason":"length"',
    }
    assert ends[name] in came and came.endswith(b"0\r\n\r\n"), came[-500:]
    gate.idle()
