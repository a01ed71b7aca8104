"""reasoning_effort, and system messages within a conversation, over a socket in every dialect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.asking import CHAT, DASHSCOPE, MESSAGES, RESPONSES, ask, serve
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving

OLLAMA = "/api/chat"
USER = {"role": "user", "content": "Q"}
LATE = [{"role": "system", "content": "A"}, USER, {"role": "assistant", "content": "R"}]
LATE += [{"role": "system", "content": "B"}, USER]
PROMPTS: list[str] = []


def reply(prompt: str) -> str:
    PROMPTS.append(prompt)
    return "Fine." if prompt.endswith("</think>\n\n") else "Hm.\n</think>\n\nFine."


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with scripted_llm(reply, max_model_len=4096, chat="strict") as llm, serve(llm) as running:
        yield running


def asked(effort: str) -> list[tuple[str, dict[str, Any]]]:
    """The same effort in each dialect."""
    one = {"model": "m", "messages": [USER]}
    return [
        (CHAT, {**one, "reasoning_effort": effort}),
        (CHAT, {**one, "chat_template_kwargs": {"reasoning_effort": effort}}),
        (RESPONSES, {"model": "m", "input": "Q", "reasoning": {"effort": effort}}),
        (
            MESSAGES,
            {**one, "max_tokens": 99, "thinking": {"type": "adaptive"}, "output_config": {"effort": effort}},
        ),
        (OLLAMA, {**one, "stream": False, "think": effort}),
        (
            DASHSCOPE,
            {"model": "m", "input": {"messages": [USER]}, "parameters": {"reasoning_effort": effort}},
        ),
    ]


@pytest.mark.parametrize(
    ("effort", "told"), [("low", "Be brief."), ("high", "Be thorough."), ("max", "Be thorough.")]
)
def test_the_template_is_told_the_effort_in_every_dialect(served: Serving, effort: str, told: str) -> None:
    for path, body in asked(effort):
        assert ask(served, path, body)[0] == 200, path
        assert PROMPTS[-1].startswith(f"{told}\n<|im_start|>user") and PROMPTS[-1].endswith("<think>\n"), path


def test_none_is_no_thought_and_an_unknown_word_is_refused(served: Serving) -> None:
    for path, body in asked("none"):
        if path != MESSAGES:  # whose own switch says that there is to be one
            assert ask(served, path, body)[0] == 200 and PROMPTS[-1].endswith("</think>\n\n"), path
    for path, body in asked("utmost"):
        status, _, answer = ask(served, path, body)
        assert status == 400 and "'utmost'" in str(answer) and "none, minimal, low, medium" in str(answer), (
            path
        )


def late() -> list[tuple[str, dict[str, Any]]]:
    """A system message within a conversation, in the dialects that have such."""
    return [
        (CHAT, {"model": "m", "messages": LATE}),
        (OLLAMA, {"model": "m", "messages": LATE, "stream": False}),
        (DASHSCOPE, {"model": "m", "input": {"messages": LATE}}),
    ]


def test_a_late_system_message_is_a_bad_request_that_says_what_to_do(served: Serving) -> None:
    for path, body in late():
        status, _, answer = ask(served, path, body)
        told = str(answer)
        assert status == 400 and "messages[3]: a system message behind 3 others" in told, (path, told)
        assert "--merge-system-messages" in told, path
    agents = {
        "model": "m",
        "instructions": "A",
        "input": LATE[1:],
    }  # in these dialects it goes into the user's turn
    assert ask(served, RESPONSES, agents)[0] == 200 and "user\nB\n\nQ<|im_end|>" in PROMPTS[-1]


def test_or_its_text_joins_the_first_where_the_server_is_told_to() -> None:
    merging = scripted_llm(reply, max_model_len=4096, chat="strict", merge_system_messages=True)
    with merging as llm, serve(llm) as running:
        for path, body in late():
            assert ask(running, path, body)[0] == 200, path
            assert PROMPTS[-1].startswith("<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\nQ"), path
