"""Promises that the engine keeps, seen from a socket: guesses, prefixes that stay, steps that are short or stand."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from qwenrt.engine.constraint import Constraint
from qwenrt.engine.grammar import Grammars
from tests.server.asking import CHAT, COMPLETIONS, Gate, ask, chat, events, joined, read, sent, serve
from tests.server.scripted import scripted_llm
from tests.server.wire import request, until

ROUND = ("One potato, two potatoes, three. " * 6).strip()


def test_guesses_give_the_same_answer_in_fewer_steps() -> None:
    with scripted_llm(lambda prompt: ROUND, max_model_len=4096) as llm, serve(llm) as served:
        steps, texts = [], []
        for fields in ({}, {"draft": "lookup"}, {"draft": None}):
            before = llm.stats()["steps"]
            told = events(ask(served, CHAT, chat("x", stream=True, max_tokens=400, **fields))[2])
            texts.append(joined(told))
            steps.append(llm.stats()["steps"] - before)
        assert texts == [ROUND] * 3 and 2 * steps[1] < min(steps[0], steps[2])
        scraped = ask(served, "/metrics")[2].decode()
        accepted = [line for line in scraped.splitlines() if line.startswith("qwenrt_accepted_tokens_total")]
        assert accepted and float(accepted[0].split()[-1]) > 10
        assert ask(served, CHAT, chat("x", draft="guess"))[0] == 400


def test_a_prompt_with_another_ntk_factor_shares_nothing() -> None:
    """Keys are rotated with a factor of the whole prompt: 1 up to the 512 tokens of the demo's training, then 3, 7."""
    with qwenrt.load("demo", progress=False) as llm, serve(llm) as served:
        block, ids = int(llm.stats()["block_size"]), [300 + 7 * n % 2000 for n in range(1100)]

        def cached(length: int) -> int:
            body = {"model": "m", "prompt": ids[:length], "max_tokens": 1, "temperature": 0}
            status, _, told = ask(served, COMPLETIONS, body)
            assert status == 200 and told["usage"]["prompt_tokens"] == length
            return int(told["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert [cached(length) for length in (500, 540, 1030)] == [0, 0, 0]  # each begins with the one before
        for length in (512, 600, 1100):  # of the same three factors
            before = {512: 500, 600: 540, 1100: 1030}[length]
            assert before - block < cached(length) <= before


def test_a_prefix_is_found_after_a_restart(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "You are an agent with many tools. " * 60}]

    def opened() -> qwenrt.LLM:
        return scripted_llm(lambda prompt: "Yes.", max_model_len=4096, prefix_store=tmp_path)

    def cached(served: object, text: str) -> int:
        body = {"model": "m", "messages": [*messages, {"role": "user", "content": text}]}
        status, _, told = ask(served, CHAT, body)  # type: ignore[arg-type]
        assert status == 200
        return int(told["usage"]["prompt_tokens_details"]["cached_tokens"])

    with opened() as llm, serve(llm) as served:
        found = [cached(served, text) for text in "abc"][-1]
        assert found > 100
        until(lambda: llm.stats()["stored_blocks_written"] >= found // llm.stats()["block_size"])
    with opened() as llm, serve(llm) as served:
        assert cached(served, "d") == found
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept and not any(path.stat().st_mode & 0o077 for path in kept)
    for path in kept:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # torn: as if there were none
    with opened() as llm, serve(llm) as served:
        assert cached(served, "e") == 0


def test_a_step_that_does_not_end_is_not_ready_and_alive() -> None:
    with scripted_llm(lambda prompt: "Yes.", max_model_len=4096) as llm, serve(llm, watchdog=0.2) as served:
        gate = Gate(llm)
        assert ask(served, "/ready")[0] == 200
        with gate.closed(), served.wire(request("POST", CHAT, body=json.dumps(chat()).encode())) as wire:
            assert gate.waiting.wait(30)
            until(lambda: ask(served, "/ready")[0] == 503)
            assert ask(served, "/health")[0] == 200
            gate._open.set()
            assert wire.response()[0] == 200
        until(lambda: ask(served, "/ready")[0] == 200)


def test_an_answer_that_takes_longer_than_the_server_allows_is_cut() -> None:
    text = "and so on " * 1500
    with scripted_llm(lambda prompt: text, max_model_len=8192) as llm:
        Gate(llm).before = lambda step: threading.Event().wait(0.005)
        with serve(llm, request_timeout=0.1) as served:
            for fields in ({}, {"timeout": 600}):  # nobody asks for more than that
                [choice] = ask(served, CHAT, chat(max_tokens=8000, **fields))[2]["choices"]
                assert choice["finish_reason"] == "length" and choice["qwenrt"]["finish_reason"] == "timeout"
                assert text.startswith(choice["message"]["content"])


def test_side_requests_do_not_drive_out_the_conversation() -> None:
    """Beside its conversation an agent asks for a title and much else that begins alike, in a cache of 4096 tokens."""
    with (
        scripted_llm(lambda prompt: "Yes.", max_model_len=4096, max_num_seqs=1) as llm,
        serve(llm) as served,
    ):
        block = int(llm.stats()["block_size"])
        assert block * llm.stats()["total_blocks"] == 4096
        preamble = {"role": "system", "content": "You are an agent with many tools. " * 20}

        def turn(*said: str) -> tuple[int, int]:
            """(tokens of a prompt, those of them that were found): the user and the assistant take turns."""
            roles = ("user", "assistant")
            spoken = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
            usage = ask(served, CHAT, {"model": "m", "messages": [preamble, *spoken]})[2]["usage"]
            return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

        main = ["The task: " + "look at this " * 200]
        first, _ = turn(*main)
        _, shared = turn("a title, please")
        main += ["Yes.", "go on"]
        _, found = turn(*main)
        assert found >= first - block > 2 * shared
        computed = [
            asked - known for asked, known in (turn(f"{n} " + f"aside {n} " * 100) for n in range(20))
        ]
        assert sum(computed) > 4096
        assert turn("0 " + "aside 0 " * 100)[1] <= shared + block, "what was asked once has made room"
        assert turn(*main, "Yes.", "and on")[1] >= first - block, "what was asked twice has not"


@pytest.mark.parametrize(("target_ms", "longest"), [(None, 0.25), (100, 0.1), (0, 2.0)])
def test_a_long_prompt_beside_an_answer_keeps_a_step_under_its_target(
    target_ms: int | None, longest: float
) -> None:
    """By a clock that steps move: each takes 50 ms where anybody decodes, and a millisecond for a prompt's token."""
    options: dict[str, Any] = {"max_model_len": 8192, "max_num_batched_tokens": 2048}
    with (
        scripted_llm(lambda prompt: "and so on " * 1500, step_target_ms=target_ms, **options) as llm,
        serve(llm) as served,
    ):
        gate = Gate(llm)
        [stack] = gate.engine.runner.stacks
        run, now = stack.run, gate.engine.target.clock()
        steps: list[tuple[int, int, float]] = []  # rows that decode, tokens of prompts, seconds

        def timed(step: Any, before: Any = None) -> Any:
            nonlocal now
            decoding = sum(count == 1 for count in step.q_lens)
            tokens = step.num_tokens - decoding
            steps.append((decoding, tokens, (0.05 if decoding else 0.0) + 0.001 * tokens))
            now += steps[-1][2]
            return run(step, before)

        stack.run = timed
        gate.engine.target.clock = lambda: now
        with served.wire(sent(CHAT, chat("x y " * 1500, stream=True))) as wire:  # nobody decodes yet
            wire.read_until(b"and")
            with (
                gate.closed(),
                served.wire(sent(CHAT, chat("z w " * 1500, max_tokens=2))) as other,
            ):
                until(lambda: len(served.application.service.running) == 2)  # type: ignore[attr-defined]
                gate._open.set()
                status, _, told = other.response()
        assert status == 200 and json.loads(told)["usage"]["completion_tokens"] == 2
        assert max(tokens for decoding, tokens, _ in steps if not decoding) == 2048
        beside = [(tokens, seconds) for decoding, tokens, seconds in steps if decoding and tokens]
        assert sum(tokens for tokens, _ in beside) > 2048
        if target_ms == 0:
            assert max(seconds for _, seconds in beside) > longest
        else:
            assert 0.95 * longest < max(seconds for _, seconds in beside) <= longest + 1e-6


CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}


def test_a_grammar_is_compiled_beside_the_event_loop_and_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    began, may_end, compiled = threading.Event(), threading.Event(), Grammars._compiled

    def slowly(self: Grammars, grammar: Any) -> Any:
        began.set()
        assert may_end.wait(30)
        return compiled(self, grammar)

    monkeypatch.setattr(Grammars, "_compiled", slowly)
    with scripted_llm(lambda prompt: '{"city": "Rome"}', max_model_len=4096) as llm, serve(llm) as served:
        with served.wire(sent(CHAT, chat(response_format=FORMAT, reasoning_effort="none"))) as wire:
            assert began.wait(30)
            assert ask(served, "/health")[0] == 200 and ask(served, "/ready")[0] == 200
            assert ask(served, CHAT, chat())[0] == 200  # a whole answer, step by step
            may_end.set()
            status, _, told = read(wire)
        assert status == 200 and json.loads(told["choices"][0]["message"]["content"]) == {"city": "Rome"}


def test_what_a_grammar_allows_is_computed_while_a_step_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    order: list[str] = []
    with scripted_llm(lambda prompt: '{"city": "Rome"}', max_model_len=4096) as llm, serve(llm) as served:
        [stack] = Gate(llm).engine.runner.stacks
        run, computed = stack.run, Constraint._computed

        def launched(*args: Any) -> Any:
            order.append("launched")
            outcome = run(*args)
            return replace(outcome, fetched=lambda: (order.append("waited for"), outcome.fetched())[1])

        def mask(self: Constraint) -> Any:
            order.append("mask")
            return computed(self)

        monkeypatch.setattr(stack, "run", launched)
        monkeypatch.setattr(Constraint, "_computed", mask)
        body = chat(response_format=FORMAT, reasoning_effort="none", max_tokens=6)
        assert ask(served, CHAT, body)[0] == 200
    assert order == ["launched", "mask", "waited for"] * 6


def test_an_answer_is_the_same_whoever_else_is_answered() -> None:
    words = ("France", "Japan", "one", "two words", "a longer question, with a comma", "x", "杭州", "Hello")

    with qwenrt.load("demo", progress=False) as llm, serve(llm, max_queue=100) as served:

        def answer(number: int) -> str:
            fields = {"seed": number % 8, "temperature": float(number % 2), "max_tokens": 12}
            status, _, told = ask(served, CHAT, chat(f"What is {words[number % 8]}?", **fields))
            assert status == 200
            return str(told["choices"][0]["message"]["content"])

        alone = [answer(number) for number in range(8)]
        for clients in (8, 64):
            with ThreadPoolExecutor(clients) as together:
                assert list(together.map(answer, range(clients))) == alone * (clients // 8)
