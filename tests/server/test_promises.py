"""Promises that the engine keeps, seen from a socket: guesses, prefixes after a restart, a step that does not end."""

from __future__ import annotations

import json
from pathlib import Path

import qwenrt
from tests.server.asking import CHAT, Gate, ask, chat, events, joined, serve
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
