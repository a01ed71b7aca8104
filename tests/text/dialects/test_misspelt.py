"""Fields that are nearly known are told once, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from qwenrt.text.dialects import anthropic, dashscope, misspelt, ollama, openai_chat

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(autouse=True)
def nothing_told() -> Iterator[None]:
    misspelt._told.clear()
    yield
    misspelt._told.clear()


CASES = [
    (openai_chat, CHAT | {"max_token": 5}, "'max_token'", "max_tokens"),
    (openai_chat, CHAT | {"tool_choise": "none"}, "'tool_choise'", "tool_choice"),
    (anthropic, CHAT | {"max_tokens": 5, "stop_sequence": ["x"]}, "'stop_sequence'", "stop_sequences"),
    (
        dashscope,
        {"model": "m", "input": {"messages": CHAT["messages"]}, "parameters": {"max_tokenss": 5}},
        "'max_tokenss'",
        "max_tokens",
    ),
]


@pytest.mark.parametrize(("dialect", "body", "found", "meant"), CASES)
def test_what_is_nearly_a_field_is_told_once(
    dialect: Any, body: dict[str, Any], found: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        dialect.decode(json.dumps(body).encode())
    (told,) = caplog.messages
    assert found in told and told.endswith(f"is {meant} meant?")


def test_options_within_are_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    ollama.decode_chat(json.dumps(CHAT | {"options": {"num_predic": 3}}).encode())
    (told,) = caplog.messages
    assert "'num_predic'" in told and "num_predict" in told


def test_what_others_know_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    more = {"safety_identifier": "x", "verbosity": "low", "store": True, "cache_salt": "y", "z" * 80: 1}
    openai_chat.decode(json.dumps(CHAT | more).encode())
    assert not caplog.messages


def test_names_are_told_on_one_line_and_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    openai_chat.decode(json.dumps(CHAT | {"max_tokens\n": 5}).encode())
    (told,) = caplog.messages
    assert "\n" not in told
    caplog.clear()
    for i in range(2 * misspelt.MOST_TOLD):
        openai_chat.decode(json.dumps(CHAT | {f"max_completion_tokens{i}": 5}).encode())
    assert len(caplog.messages) == misspelt.MOST_TOLD - 1 == len(misspelt._told) - 1
