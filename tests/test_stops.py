"""What ends an answer: stop strings are about what a reader gets, not about thoughts and calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from tests.model.parrot import CHATML, IN_THOUGHT, THINKS, parrot
from tests.model.tiny_models import load

SAID = ["The Question", ": is what", "</think>", "\n\n", "It is 42.", "\nQuestion", ": more"]
CALL = '<tool_call>\n{"name": "f", "arguments": {"q": "Question: x"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
ASKED = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 60}
STOPS = ["\nQuestion:", "Question:"]

Say = Callable[..., qwenrt.LLM]


@pytest.fixture
def say(tmp_path: Path) -> Any:
    loaded = []

    def model(words: list[str], template: str = CHATML) -> qwenrt.LLM:
        loaded.append(load(parrot(tmp_path / str(len(loaded)), words, template)))
        return loaded[-1]

    yield model
    for llm in loaded:
        llm.close()


def both(llm: qwenrt.LLM, **options: Any) -> qwenrt.Generation:
    """The whole answer, after a look that the stream says the same."""
    asked = {**ASKED, **options}
    whole = llm.chat(**asked)
    deltas = list(llm.stream(**asked))
    for index, choice in enumerate(whole.choices or (whole,)):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == choice.text
        assert "".join(delta.reasoning for delta in own) == choice.reasoning
        assert [token for delta in own for token in delta.token_ids] == choice.token_ids
        assert own[-1].finish_reason == choice.finish_reason and own[-1].usage is not None
        assert own[-1].usage.completion_tokens == choice.usage.completion_tokens == len(choice.token_ids)
        called = [call["function"] for call in choice.message.get("tool_calls", [])]
        assert [call["function"] for call in own[-1].tool_calls or []] == called
        pieces = [piece for delta in own for piece in delta.calls]
        assert [piece.name for piece in pieces if piece.id] == [function["name"] for function in called]
        assert "".join(piece.arguments for piece in pieces) == "".join(each["arguments"] for each in called)
    return whole


@pytest.mark.parametrize(
    ("template", "words"), [(IN_THOUGHT, SAID), (THINKS, ["<think>", *SAID])], ids=["prompt", "model"]
)
def test_a_stop_string_waits_for_the_answer(say: Say, template: str, words: list[str]) -> None:
    llm = say(words, template)
    free = both(llm)
    assert (free.text, free.reasoning) == ("It is 42.\nQuestion: more", "The Question: is what")
    for options in ({}, {"n": 2}, {"thinking_budget": 50}, {"min_tokens": 3}):
        found = both(llm, stop=STOPS, **options)
        for choice in found.choices or (found,):
            assert (choice.text, choice.reasoning) == ("It is 42.", "The Question: is what")
            assert choice.finish_reason == "stop" and len(choice.token_ids) == len(words)
            assert choice.message["content"] == "It is 42."


def test_the_thought_is_searched_where_that_is_asked_for(say: Say) -> None:
    llm = say(SAID, IN_THOUGHT)
    found = both(llm, stop=STOPS, include_reasoning_in_stop=True)
    assert (found.text, found.reasoning, found.finish_reason) == ("", "The", "stop")
    found = both(llm, stop=["</think>"], include_reasoning_in_stop=True)
    assert (found.text, found.reasoning, len(found.token_ids)) == ("", "The Question: is what", 3)
    assert both(llm, stop=["</think>"]).text == both(llm).text


def test_a_stop_token_ends_a_thought_as_well(say: Say) -> None:
    llm = say(SAID, IN_THOUGHT)
    for word, reasoning in ((": is what", "The Question"), ("</think>", "The Question: is what")):
        found = both(llm, stop_token_ids=[llm.tokenizer.added_tokens[word]], stop=STOPS)
        assert (found.text, found.reasoning, found.finish_reason) == ("", reasoning, "stop")


def test_a_thought_over_its_budget_is_not_searched_either(say: Say) -> None:
    llm = say(SAID, IN_THOUGHT)
    for stop, text in (([], "It is 42.\nQuestion: more"), ([*STOPS, "Considering", "The Q"], "It is 42.")):
        found = both(llm, thinking_budget=1, stop=stop, max_tokens=12, min_tokens=3)
        assert found.reasoning.startswith("The Question\n\nConsidering the limited time by the user")
        assert (found.text, found.finish_reason) == (text, "stop")


def test_a_call_is_not_searched(say: Say) -> None:
    llm = say(["Question it.\n", CALL, "\nDone.", " Question:"])
    found = both(llm, tools=TOOLS, stop=["Question:"])
    assert (found.text, found.finish_reason) == ("Question it.\nDone. ", "tool_calls")
    assert found.message["tool_calls"][0]["function"]["arguments"] == '{"q": "Question: x"}'
    found = both(llm, tools=TOOLS, stop=["it"])
    assert (found.text, found.finish_reason) == ("Question ", "stop") and "tool_calls" not in found.message
    found = both(llm, tools=TOOLS, stop=["Question:"], include_reasoning_in_stop=True)
    assert (found.text, found.finish_reason, found.broken_calls) == ("Question it.", "stop", 1)
    assert found.message["tool_calls"][0]["function"]["arguments"] == '{"q": "'
    assert both(llm, stop=["Question:"]).text.endswith('{"q": "')  # without tools it is text like any other


def test_a_completion_is_searched_from_its_start(say: Say) -> None:
    llm = say(["<think>", *SAID], THINKS)
    assert llm.generate("\n", temperature=0, stop=STOPS).text == "<think>The "


def test_a_fenced_call_can_be_sent_back(say: Say) -> None:
    llm = say(
        [
            "Let me",
            " look.",
            "\n```",
            "json",
            '\n{"name": ',
            '"f", "arguments"',
            ': {"q": 1}',
            "}",
            "\n``",
            "`",
        ]
    )
    found = both(llm, tools=TOOLS)
    assert (found.text, found.finish_reason) == ("Let me look.", "tool_calls")
    assert found.message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"q": 1}'}
    result = {"role": "tool", "tool_call_id": found.message["tool_calls"][0]["id"], "content": "x"}
    again = llm.chat(
        messages=[*ASKED["messages"], {**found.message, "content": found.text}, result],  # type: ignore[misc]
        tools=TOOLS,
        temperature=0,
    )
    assert again.finish_reason == "tool_calls"
    assert "```json" in both(llm).text
    others = [{"type": "function", "function": {"name": "g"}}]
    assert "```json" in both(llm, tools=others).text


def test_a_template_that_names_no_tags_gets_calls_as_well(say: Say) -> None:
    llm = say([CALL], CHATML.replace("<tool_call>", ""))
    assert both(llm, tools=TOOLS).finish_reason == "tool_calls"


@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_option_is_a_switch(value: Any) -> None:
    with pytest.raises(qwenrt.RequestError, match="include_reasoning_in_stop"):
        qwenrt.SamplingParams(include_reasoning_in_stop=value)
