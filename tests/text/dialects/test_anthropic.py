"""Anthropic's Messages: what requests ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.structure import Grammar
from qwenrt.text.dialects import anthropic
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.problem import Problem
from qwenrt.text.dialects.signed_thoughts import SignedThoughts
from tests.text.dialects import agent_turns
from tests.text.dialects.strategies import JSON, unhurried
from tests.text.dialects.thoughts import thought

THOUGHTS = SignedThoughts(b"key")
TOOL = {"name": "f", "description": "does f", "input_schema": {"type": "object", "properties": {"a": {}}}}
HOSTED = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}


def ask(messages: Any = "hello", **fields: Any) -> Ask:
    if isinstance(messages, str):
        messages = [user(messages)]
    body = json.dumps({"max_tokens": 10, "messages": messages, **fields}).encode()
    return anthropic.read(anthropic.decode(body), THOUGHTS)


def problem(messages: Any = "hello", **fields: Any) -> Problem:
    with pytest.raises(Problem) as raised:
        ask(messages, **fields)
    return raised.value


def user(*content: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": content[0] if len(content) == 1 and isinstance(content[0], str) else content,
    }


def assistant(*content: Any) -> dict[str, Any]:
    return user(*content) | {"role": "assistant"}


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


def use(call_id: str = "t1", name: str = "f", **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def result(content: Any = "done", call_id: str = "t1", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def thinking(thought: str, signature: str | None = None) -> dict[str, Any]:
    signature = THOUGHTS.signature(thought) if signature is None else signature
    return {"type": "thinking", "thinking": thought, "signature": signature}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def called(call_id: str = "t1", name: str = "f", arguments: str = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CALL = assistant(use())
CALLED = [said("user", "q"), said("assistant", None, tool_calls=[called()])]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("a")], [said("user", "a")]),
        ([user(text("a"))], [said("user", "a")]),
        ([user(text("a"), text("b"))], [said("user", "a\n\nb")]),
        ([user("a"), user("b")], [said("user", "a\n\nb")]),
        ([user()], [said("user", "")]),
        ([user(text("a", cache_control={"type": "ephemeral"}, citations=None))], [said("user", "a")]),
        (
            [user("a"), assistant(text("b"), text("c")), user("d")],
            [said("user", "a"), said("assistant", "bc"), said("user", "d")],
        ),
        (
            [user("a"), assistant("b"), assistant("c"), user("d")],
            [said("user", "a"), said("assistant", "b\n\nc"), said("user", "d")],
        ),
        ([user("a"), assistant("b")], [said("user", "a"), said("assistant", "b")]),
        ([assistant("b"), user("c")], [said("assistant", "b"), said("user", "c")]),
        (
            [user("q"), assistant(text("x"), use(a=1, b="ü")), user(result())],
            [
                said("user", "q"),
                said("assistant", "x", tool_calls=[called(arguments='{"a": 1, "b": "ü"}')]),
                said("tool", "done", tool_call_id="t1"),
            ],
        ),
        (
            [user("q"), CALL, user(result([text("a"), text("b")]))],
            [*CALLED, said("tool", "a\n\nb", tool_call_id="t1")],
        ),
        ([user("q"), CALL, user(result(None))], [*CALLED, said("tool", "", tool_call_id="t1")]),
        (
            [user("q"), CALL, user(result("no such file", is_error=True))],
            [*CALLED, said("tool", "Error: no such file", tool_call_id="t1")],
        ),
        (
            [user("q"), CALL, user(text("and stop"), result())],
            [*CALLED, said("tool", "done", tool_call_id="t1"), said("user", "and stop")],
        ),
        (
            [user("q"), CALL, user(result(), text("<system-reminder>r</system-reminder>"))],
            [*CALLED, said("tool", "done\n\n<system-reminder>r</system-reminder>", tool_call_id="t1")],
        ),
    ],
)
def test_messages_become_turns(messages: Any, expected: Any) -> None:
    assert ask(messages).messages == expected


@pytest.mark.parametrize(
    ("system", "head"),
    [
        (None, None),
        ("", None),
        ("s", "s"),
        ([text("a"), text("b", cache_control={"type": "ephemeral"})], "a\n\nb"),
        ([text("x-anthropic-billing-header: cch=1;"), text("a")], "a"),
        ([text("x-anthropic-billing-header: cch=1;")], None),
        ("x-anthropic-billing-header is a header.", "x-anthropic-billing-header is a header."),
    ],
)
def test_the_system_text(system: Any, head: str | None) -> None:
    expected = [said("user", "hello")] if head is None else [said("system", head), said("user", "hello")]
    assert ask(system=system).messages == expected


S = {"role": "system", "content": [text("S")]}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([S, user("a")], [said("system", "h"), said("user", "S\n\na")]),
        ([user("a"), S], [said("system", "h"), said("user", "a\n\nS")]),
        ([user("a"), S, user("b")], [said("system", "h"), said("user", "a\n\nS\n\nb")]),
        (
            [user("a"), assistant("b"), S],
            [said("system", "h"), said("user", "a"), said("assistant", "b"), said("user", "S")],
        ),
        (
            [user("q"), CALL, user(result()), S],
            [said("system", "h"), *CALLED, said("tool", "done\n\nS", tool_call_id="t1")],
        ),
    ],
)
def test_system_messages_are_told_where_they_stand_never_in_the_head(messages: Any, expected: Any) -> None:
    assert ask(messages, system="h").messages == expected


def test_without_a_system_text_the_first_system_messages_are_it() -> None:
    assert ask([S, S, user("a"), S]).messages == [said("system", "S\n\nS"), said("user", "a\n\nS")]


def test_a_thought_counts_when_it_returns_unchanged() -> None:
    def thought(*blocks: Any) -> Any:
        messages = ask([user("a"), assistant(*blocks, text("b")), user("c")]).messages
        assert messages is not None
        return messages[1].get("reasoning_content")

    assert thought(thinking("t")) == "t"
    assert thought(thinking("t"), thinking("u")) == "t\nu"
    assert thought(thinking("t", THOUGHTS.signature("t2"))) is None
    assert thought(thinking("t", "")) is None
    assert thought({"type": "thinking", "thinking": "t"}) is None
    assert thought(thinking("", THOUGHTS.packed("hidden"))) == "hidden"
    assert thought({"type": "redacted_thinking", "data": THOUGHTS.packed("hidden")}) == "hidden"
    assert thought({"type": "redacted_thinking", "data": "of somebody else"}) is None


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([user("q"), CALL], "messages[1]"),
        ([user(result())], "messages[0].content[0].tool_use_id"),
        ([user("q"), CALL, user(text("x"), result(call_id="t2"))], "messages[2].content[1].tool_use_id"),
        ([user(text("x"), {"type": "image", "source": {}})], "messages[0].content[1]"),
        ([user({"type": "document", "source": {}})], "messages[0].content[0]"),
        (
            [user("q"), CALL, user(result([{"type": "image", "source": {}}]))],
            "messages[2].content[0].content[0]",
        ),
        ([user({"type": "wonder"})], "messages[0].content[0].type"),
        ([user(thinking("t"))], "messages[0].content[0].type"),
        ([user("q"), assistant(use(name=""))], "messages[1].content[0].name"),
        ([user("q"), assistant(use(call_id=""))], "messages[1].content[0].id"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([user("a"), {"role": "user", "content": 5}], "messages[1].content"),
        ([{"role": "user"}], "messages[0].content"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(messages: Any, param: str) -> None:
    found = problem(messages)
    assert (found.kind, found.param) == ("invalid_request", param)
    assert param in found.message


def test_images_are_refused_by_what_the_model_lacks() -> None:
    assert "reads text only" in problem([user({"type": "image", "source": {}})]).message


def test_tools_with_and_without_a_type_are_functions() -> None:
    function = {"name": "f", "description": "does f", "parameters": TOOL["input_schema"]}
    for tool in (TOOL, {"type": "custom", **TOOL}, {**TOOL, "cache_control": {"type": "ephemeral"}}):
        assert ask(tools=[tool]).tools == [{"type": "function", "function": function}]
    assert ask(tools=[{"name": "g"}]).tools == [
        {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}}
    ]


def test_hosted_tools_are_passed_over_and_named() -> None:
    made = ask(tools=[HOSTED, TOOL, HOSTED, {"type": "b\r\nad", "name": "x"}])
    assert [tool["function"]["name"] for tool in made.tools] == ["f"]
    assert made.ignored == ("web_search_20250305", "tool")


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, "auto", True),
        ({"type": "auto"}, "auto", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any"}, "required", True),
        ({"type": "any", "disable_parallel_tool_use": False}, "required", True),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "f"}, {"name": "f"}, True),
        ({"type": "tool", "name": "web_search"}, "auto", True),
    ],
)
def test_the_choice_of_a_tool(choice: Any, expected: Any, parallel: bool) -> None:
    made = ask(tools=[TOOL, HOSTED], tool_choice=choice)
    assert (made.tool_choice, made.parallel_tool_calls) == (expected, parallel)


def test_a_choice_that_cannot_be_made() -> None:
    assert problem(tools=[TOOL], tool_choice={"type": "tool", "name": "g"}).param == "tool_choice.name"
    assert problem(tool_choice={"type": "any"}).param == "tool_choice"
    assert problem(tools=[TOOL, TOOL]).param == "tools[1].name"
    assert problem(tools=[{"name": ""}]).param == "tools[0].name"
    assert ask(tools=[HOSTED], tool_choice={"type": "any"}).tool_choice == "auto"


@pytest.mark.parametrize(
    ("fields", "enable", "budget"),
    [
        ({}, False, None),
        ({"thinking": None}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, True, 2000),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "adaptive"}}, True, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, True, 1024),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, True, None),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, False, None),
        ({"output_config": {"effort": "medium"}}, False, None),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 9}, "output_config": {"effort": "low"}},
            True,
            9,
        ),
    ],
)
def test_thinking_and_effort(fields: Any, enable: bool | None, budget: int | None) -> None:
    made = ask(**fields)
    assert thought(made) == (enable, budget, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "some"}}, "thinking.type"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"output_format": {"type": "json_schema"}}, "output_format"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ],
)
def test_values_that_are_refused(fields: Any, param: str) -> None:
    assert problem(**fields).param == param


def test_max_tokens_is_required_to_write_and_not_to_count() -> None:
    body = json.dumps({"messages": [user("a")], "system": "s"}).encode()
    with pytest.raises(Problem, match="max_tokens: it is missing"):
        anthropic.decode(body)
    counted = anthropic.read(anthropic.decode_count(body), THOUGHTS)
    assert counted.messages == ask("a", system="s").messages
    assert anthropic.count_body(12) == {"input_tokens": 12}


def test_what_is_counted_is_what_is_written() -> None:
    body = json.dumps(agent_turns.claude_code(4)).encode()
    written = anthropic.read(anthropic.decode(body), THOUGHTS)
    counted = anthropic.read(anthropic.decode_count(body), THOUGHTS)
    for field in ("messages", "tools", "tool_choice", "enable_thinking"):
        assert getattr(counted, field) == getattr(written, field)


def test_sampling() -> None:
    made = ask(stop_sequences=["a", "b"], temperature=0.5, top_p=0.9, top_k=7, max_tokens=128000, stream=True)
    assert made.sampling == {
        "max_tokens": 128000,
        "stop": ["a", "b"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
    }
    assert made.stream and made.include_usage and not ask().stream
    assert ask(temperature=None, top_k=None).sampling == {"max_tokens": 10}
    assert ask(temperature=0, top_p=0).sampling == {"max_tokens": 10, "temperature": 0, "top_k": 1}


@pytest.mark.parametrize("where", ["output_format", "output_config"])
def test_a_schema_is_a_grammar(where: str) -> None:
    wanted = {"type": "json_schema", "schema": {"type": "object"}}
    made = ask(**{where: wanted if where == "output_format" else {"format": wanted}})
    assert made.sampling["grammar"] == Grammar.json_schema({"type": "object"})


def test_a_message_of_the_assistant_that_is_last_stays_last() -> None:
    assert ask([user("a"), assistant("b")]).messages[-1]["role"] == "assistant"


def test_what_is_no_prompt_never_reaches_it() -> None:
    body = agent_turns.claude_code(2, session=7)
    made = anthropic.read(anthropic.decode(json.dumps(body).encode()), agent_turns.THOUGHTS)
    prompt = json.dumps([made.messages, made.tools])
    for word in ("x-anthropic", "cache_control", "ephemeral", "user_0000", "context_management"):
        assert word not in prompt
    assert made.model == "claude-opus-4-8" and made.sampling["max_tokens"] == 32000


def test_the_side_request_for_a_title_is_read() -> None:
    made = anthropic.read(anthropic.decode(json.dumps(agent_turns.claude_code_title()).encode()), THOUGHTS)
    assert made.sampling["grammar"].kind == "json_schema"


BLOCK = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["text", "thinking", "redacted_thinking", "tool_use", "tool_result", "image", "odd"]
        )
    },
    optional={
        "text": st.sampled_from(["", "hi", "x-anthropic-a", "<system-reminder>"]) | JSON,
        "thinking": st.text(max_size=3),
        "signature": st.text(max_size=3),
        "data": st.text(max_size=20),
        "id": st.sampled_from(["", "t1", "t2"]),
        "tool_use_id": st.sampled_from(["t1", "t2"]),
        "name": st.sampled_from(["f", "", "a\nb"]),
        "input": JSON,
        "content": st.just("x") | JSON,
        "is_error": st.booleans(),
    },
)
BODY = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(-1, 10) | JSON,
        "messages": st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["user", "assistant", "system"]),
                    "content": st.text(max_size=3) | st.lists(BLOCK, max_size=4) | JSON,
                }
            ),
            max_size=5,
        ),
    },
    optional={
        "system": st.text(max_size=3) | st.lists(BLOCK, max_size=2) | JSON,
        "tools": st.lists(st.sampled_from([TOOL, HOSTED, {"name": "g"}]), max_size=3) | JSON,
        "tool_choice": st.sampled_from([{"type": "any"}, {"type": "tool", "name": "f"}]) | JSON,
        "thinking": st.sampled_from([{"type": "adaptive"}, {"type": "enabled", "budget_tokens": 5}]) | JSON,
        "output_config": st.sampled_from(
            [{"effort": "low"}, {"format": {"type": "json_schema", "schema": {}}}]
        )
        | JSON,
        "stop_sequences": JSON,
        "top_p": st.floats() | JSON,
        "stream": JSON,
    },
)


@unhurried
@given(BODY)
def test_any_body_is_an_ask_or_a_problem(body: Any) -> None:
    try:
        made = anthropic.read(anthropic.decode(json.dumps(body).encode()), THOUGHTS)
    except Problem as found:
        assert found.kind in ("invalid_request", "invalid_json")
        return
    assert made.messages and not made.messages[-1].get("tool_calls")
    assert {message["role"] for message in made.messages} <= {"system", "user", "assistant", "tool"}
