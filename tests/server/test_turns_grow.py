"""The next turn of an agent computes what is new and nothing else, through the whole server.

The conversations are those of tests/text/dialects/agent_turns.py: five turns each of Claude Code, Codex and Qwen Code,
in their sizes. How many tokens a turn computed is what the agent is told, and what the engine counts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

import qwenrt
from qwenrt.server import app
from qwenrt.server.settings import ServeSettings
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving, request, serving
from tests.text.dialects.agent_turns import ANSWERS, TURNS, Answer
from tests.text.dialects.events import events, message_of, response_of
from tests.text.dialects.test_growing_prompts import AGENTS

PATHS = {"claude_code": "/v1/messages", "codex": "/v1/responses", "qwen_code": "/v1/chat/completions"}
ROOM = 100_000  # tokens: an agent's prompt has up to 45,000 in a vocabulary whose tokens are two characters


def written(answer: Answer) -> str:
    """An answer as a Qwen3-Coder writes it."""
    calls = "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
        + "</function>\n</tool_call>"
        for name, arguments in answer.calls
    )
    return answer.said + ("\n\n" if answer.said and calls else "") + calls


def reply(prompt: str) -> str:
    turn = prompt.count("<|im_start|>assistant\n") - 1
    return written(ANSWERS[turn]) if turn < len(ANSWERS) else "Added."


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(reply, ROOM, "xml", max_num_batched_tokens=8192) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM) -> Iterator[Serving]:
    settings = ServeSettings(port=0, drain=0)
    application = app(llm, settings)
    with serving(application, settings, hooks=application.hooks(lambda: None)) as running:
        yield running


def usage_of(agent: str, stream: bytes) -> tuple[int, int, int]:
    """(tokens of the prompt, those of them from the cache, tokens of the answer), as the agent is told."""
    if agent == "claude_code":
        usage = message_of(events(stream))["usage"]
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, cached, usage["output_tokens"]
    if agent == "codex":
        usage = response_of(events(stream))["usage"]
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"], usage["output_tokens"]
    chunks = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: {")]
    usage = chunks[-1]["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]


def run(served: Serving, agent: str, session: int) -> list[tuple[int, int, int]]:
    """The usage of each turn of a session, whose answers go back as that client sends them."""
    answers: list[Any] = []
    usages = []
    for turn in range(TURNS):
        body = json.dumps(AGENTS[agent].body(turn, answers, session), ensure_ascii=False).encode()
        with served.wire(request("POST", PATHS[agent], {}, body)) as wire:
            status, _, stream = wire.response()
        assert status == 200, stream
        answers.append(AGENTS[agent].answer(stream))
        usages.append(usage_of(agent, stream))
    return usages


@pytest.mark.parametrize("agent", PATHS)
def test_a_turn_computes_what_is_new(agent: str, served: Serving, llm: qwenrt.LLM) -> None:
    block = int(llm.stats()["block_size"])
    computed_before = llm.stats()["prompt_tokens_computed"]
    usages = run(served, agent, session=1)
    for turn, ((before, _, answer), (prompt, cached, _)) in enumerate(itertools.pairwise(usages)):
        computed, new = prompt - cached, prompt - before
        told = f"turn {turn + 2}: {computed} computed, {new} new, {answer} of these the answer's"
        # all that there was but for the block that was not full
        assert cached >= before + answer - block, told
        assert computed <= 1.1 * new + 1, told
    computed = llm.stats()["prompt_tokens_computed"] - computed_before
    assert computed == sum(prompt - cached for prompt, cached, _ in usages)  # the engine says the same
    [(first, cached, _), *_] = run(served, agent, session=2)
    assert first - cached <= block  # another session begins with the same tokens
