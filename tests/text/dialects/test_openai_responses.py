"""OpenAI's Responses: what requests ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.outputs import Generation, Usage
from qwenrt.structure import Grammar
from qwenrt.text.dialects import openai_responses
from qwenrt.text.dialects.answers import Served
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.problem import Problem
from qwenrt.text.dialects.responses_tools import input_of_custom, joined
from qwenrt.text.dialects.signed_thoughts import SignedThoughts
from tests.text.dialects import agent_turns
from tests.text.dialects.strategies import JSON, unhurried
from tests.text.dialects.thoughts import thought

THOUGHTS = SignedThoughts(b"key")
FUNCTION = {
    "type": "function",
    "name": "f",
    "description": "does f",
    "parameters": {"type": "object"},
    "strict": True,
}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
CUSTOM = {"type": "custom", "name": "patch", "description": "Patches.", "format": GRAMMAR}
NAMESPACE = {"type": "namespace", "name": "mcp__notes", "tools": [FUNCTION, {"type": "computer"}]}
SEARCH = {"type": "web_search", "external_web_access": False}


def ask(given: Any = "hello", earlier: bytes = b"[]", **fields: Any) -> Ask:
    body = json.dumps({"model": "m", "input": given, **fields}).encode()
    return openai_responses.read(openai_responses.decode(body), THOUGHTS, earlier)


def problem(given: Any = "hello", **fields: Any) -> Problem:
    with pytest.raises(Problem) as raised:
        ask(given, **fields)
    return raised.value


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content, **more}


def parts(kind: str, *texts: str) -> list[dict[str, Any]]:
    return [{"type": kind, "text": text} for text in texts]


def call(call_id: str = "c1", name: str = "f", arguments: str = "{}", **more: Any) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": "fc_1",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        **more,
    }


def output(result: Any = "done", call_id: str = "c1", kind: str = "function_call_output") -> dict[str, Any]:
    return {"type": kind, "call_id": call_id, "output": result}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def called(name: str = "f", arguments: str = "{}", call_id: str = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", [said("user", "a")]),
        ([{"role": "user", "content": "a"}], [said("user", "a")]),
        ([message("user", parts("input_text", "a", "b"))], [said("user", "a\n\nb")]),
        ([message("user", "a"), message("user", "b")], [said("user", "a\n\nb")]),
        (
            [
                message("user", "a"),
                message("assistant", parts("output_text", "b", "c")),
                message("user", "d"),
            ],
            [said("user", "a"), said("assistant", "bc"), said("user", "d")],
        ),
        (
            [
                message("user", "a"),
                message("assistant", [{"type": "refusal", "refusal": "no"}]),
                message("user", "d"),
            ],
            [said("user", "a"), said("assistant", "no"), said("user", "d")],
        ),
        (
            [message("user", "a"), message("assistant", "b"), message("assistant", "c")],
            [said("user", "a"), said("assistant", "b\n\nc")],
        ),
        (
            [message("user", "a"), message("assistant", "b"), call(), output()],
            [
                said("user", "a"),
                said("assistant", "b", tool_calls=[called()]),
                said("tool", "done", tool_call_id="c1"),
            ],
        ),
        (
            [
                message("user", "a"),
                call(),
                call("c2"),
                output(call_id="c2"),
                output(parts("input_text", "x", "y")),
            ],
            [
                said("user", "a"),
                said("assistant", None, tool_calls=[called(), called(call_id="c2")]),
                said("tool", "done", tool_call_id="c2"),
                said("tool", "x\n\ny", tool_call_id="c1"),
            ],
        ),
        (
            [message("user", "a"), call(name="find", namespace="mcp__notes"), output()],
            [
                said("user", "a"),
                said("assistant", None, tool_calls=[called("mcp__notes__find")]),
                said("tool", "done", tool_call_id="c1"),
            ],
        ),
        (
            [
                message("user", "a"),
                {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": '*** "ü"\n'},
                output(kind="custom_tool_call_output"),
            ],
            [
                said("user", "a"),
                said("assistant", None, tool_calls=[called("patch", '{"input": "*** \\"ü\\"\\n"}')]),
                said("tool", "done", tool_call_id="c1"),
            ],
        ),
        (
            [message("user", "q"), call(), output(), message("developer", "D")],
            [
                said("user", "q"),
                said("assistant", None, tool_calls=[called()]),
                said("tool", "done\n\nD", tool_call_id="c1"),
            ],
        ),
    ],
)
def test_items_become_turns(given: Any, expected: Any) -> None:
    assert ask(given).messages == expected


def test_instructions_are_the_head_and_developers_speak_where_they_stand() -> None:
    items = [message("developer", "D"), message("user", "a"), message("system", "S")]
    assert ask(items, instructions="I").messages == [said("system", "I"), said("user", "D\n\na\n\nS")]
    assert ask(items).messages == [said("system", "D"), said("user", "a\n\nS")]


@pytest.mark.parametrize(
    ("item", "thought"),
    [
        ({"encrypted_content": THOUGHTS.packed("t"), "summary": []}, "t"),
        ({"encrypted_content": THOUGHTS.packed("t")[:-1] + "A", "summary": []}, None),
        ({"encrypted_content": "gAAAA", "summary": parts("summary_text", "s")}, None),
        ({"content": parts("reasoning_text", "t"), "summary": parts("summary_text", "s")}, "t"),
        ({"content": None, "summary": parts("summary_text", "s")}, "s"),
        ({"content": [], "summary": []}, None),
    ],
)
def test_a_thought_counts_when_it_returns_unchanged(item: Any, thought: str | None) -> None:
    items = [
        message("user", "a"),
        {"type": "reasoning", **item},
        message("assistant", "b"),
        message("user", "c"),
    ]
    messages = ask(items).messages
    assert messages is not None and messages[1].get("reasoning_content") == thought


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ("", "{}"),
        ("Beijing", "Beijing"),
        ('{"cmd": ["l', '{"input": "{\\"cmd\\": [\\"l"}'),
        ('{"a": 1, "a": 2}', '{"input": "{\\"a\\": 1, \\"a\\": 2}"}'),
    ],
)
def test_arguments_that_no_template_could_write_are_a_text(arguments: str, expected: str) -> None:
    messages = ask([message("user", "a"), call(arguments=arguments), output()]).messages
    assert messages is not None and messages[1]["tool_calls"] == [called(arguments=expected)]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, "input"),
        ([], "input"),
        ([message("developer", "d")], "input"),
        ([message("user", "a"), call()], "input"),
        ([message("user", "a"), {"type": "item_reference", "id": "x"}], "input[1]"),
        ([{"type": "web_search_call"}], "input[0]"),
        ([message("user", [{"type": "input_image", "image_url": "http://x"}])], "input[0].content[0]"),
        ([message("user", [*parts("input_text", "a"), {"type": "input_file"}])], "input[0].content[1]"),
        ([message("robot", "a")], "input[0].role"),
        ([{"content": "a"}], "input[0].role"),
        ([message("user", "a"), output()], "input[1].call_id"),
        ([message("user", "a"), call(), output(call_id="c2")], "input[2].call_id"),
        ([message("user", "a"), call(), output([{"type": "input_image"}])], "input[2].output[0]"),
        ([message("user", "a"), call(name="")], "input[1].name"),
        ([message("user", "a"), call("")], "input[1].call_id"),
        ([message("user", 5)], "input[0].content"),
        (5, "input"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(given: Any, param: str) -> None:
    found = problem(given)
    assert (found.kind, found.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools[1].name"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]},
            "tools[0].tools[0].name",
        ),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
    ],
)
def test_values_that_are_refused(fields: Any, param: str) -> None:
    assert problem(**fields).param == param


def test_tools_of_three_kinds_are_functions_and_hosted_ones_are_named() -> None:
    made = ask(tools=[FUNCTION, CUSTOM, NAMESPACE, SEARCH, SEARCH])
    functions = [tool["function"] for tool in made.tools]
    assert functions[0] == {
        "name": "f",
        "description": "does f",
        "parameters": {"type": "object"},
        "strict": True,
    }
    assert functions[1]["name"] == "patch"
    assert functions[1]["description"] == "Patches.\n\nThe input must follow this lark grammar:\nstart: /x/"
    assert functions[1]["parameters"]["required"] == ["input"]
    assert functions[2] == {**functions[0], "name": "mcp__notes__f"}
    assert made.ignored == ("computer", "web_search")


@pytest.mark.parametrize(
    ("choice", "expected", "left"),
    [
        (None, "auto", ["f", "patch", "mcp__notes__f"]),
        ("none", "none", ["f", "patch", "mcp__notes__f"]),
        ("required", "required", ["f", "patch", "mcp__notes__f"]),
        ({"type": "function", "name": "f"}, {"name": "f"}, ["f", "patch", "mcp__notes__f"]),
        ({"type": "custom", "name": "patch"}, {"name": "patch"}, ["f", "patch", "mcp__notes__f"]),
        (
            {"type": "function", "name": "f", "namespace": "mcp__notes"},
            {"name": "mcp__notes__f"},
            ["f", "patch", "mcp__notes__f"],
        ),
        ({"type": "web_search"}, "auto", ["f", "patch", "mcp__notes__f"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "patch"}]},
            "required",
            ["patch"],
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]},
            "none",
            ["f", "patch", "mcp__notes__f"],
        ),
    ],
)
def test_the_choice_of_a_tool(choice: Any, expected: Any, left: list[str]) -> None:
    made = ask(tools=[FUNCTION, CUSTOM, NAMESPACE, SEARCH], tool_choice=choice)
    assert made.tool_choice == expected
    assert [tool["function"]["name"] for tool in made.tools] == left


def test_a_required_tool_that_only_the_vendor_has_is_left_to_the_model() -> None:
    assert ask(tools=[SEARCH], tool_choice="required").tool_choice == "auto"


@pytest.mark.parametrize(
    ("name", "namespace", "expected"),
    [("f", None, "f"), ("f", "", "f"), ("f", "n", "n__f"), ("f", "mcp__n__", "mcp__n__f")],
)
def test_joined_names(name: str, namespace: str | None, expected: str) -> None:
    assert joined(name, namespace) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"input": "a\\nb"}', "a\nb"),
        ('{"input": 5}', '{"input": 5}'),
        ('{"patch": "a"}', '{"patch": "a"}'),
        ("*** Begin", "*** Begin"),
        ("[", "["),
    ],
)
def test_the_input_of_a_custom_tool(arguments: str, expected: str) -> None:
    assert input_of_custom(arguments) == expected


@pytest.mark.parametrize(
    ("effort", "enable", "budget"),
    [
        (None, None, None),
        ("none", False, None),
        ("low", True, 1024),
        ("high", True, None),
        ("xhigh", True, None),
    ],
)
def test_effort(effort: str | None, enable: bool | None, budget: int | None) -> None:
    made = ask(reasoning={"effort": effort, "summary": "auto"})
    assert thought(made) == (enable, budget, None)


def test_sampling() -> None:
    made = ask(max_output_tokens=128000, temperature=0.5, top_p=0.9, stream=True, parallel_tool_calls=False)
    assert made.sampling == {"max_tokens": 128000, "temperature": 0.5, "top_p": 0.9}
    assert made.stream and not made.parallel_tool_calls
    plain = ask(max_output_tokens=None, temperature=None, top_p=None)
    assert plain.sampling == {} and plain.parallel_tool_calls and not plain.stream
    assert ask(temperature=0, top_p=0).sampling == {"temperature": 0, "top_k": 1}


@pytest.mark.parametrize(
    ("wanted", "grammar"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar.json_object()),
        (
            {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": False},
            Grammar.json_schema({"type": "object"}),
        ),
    ],
)
def test_the_form_of_the_answer(wanted: Any, grammar: Grammar | None) -> None:
    assert ask(text={"format": wanted, "verbosity": "low"}).sampling.get("grammar") == grammar


def test_what_is_counted_is_what_is_written() -> None:
    body = json.dumps(agent_turns.codex(4)).encode()
    written = openai_responses.read(openai_responses.decode(body), THOUGHTS)
    counted = openai_responses.read(openai_responses.decode_count(body), THOUGHTS)
    for field in ("messages", "tools", "tool_choice", "enable_thinking"):
        assert getattr(counted, field) == getattr(written, field)
    assert openai_responses.count_body(5) == {"object": "response.input_tokens", "input_tokens": 5}


def test_what_is_no_prompt_never_reaches_it() -> None:
    made = openai_responses.read(
        openai_responses.decode(json.dumps(agent_turns.codex(2, session=7)).encode()), agent_turns.THOUGHTS
    )
    prompt = json.dumps([made.messages, made.tools])
    for word in ("session-7", "rs_0", "msg_1", "web_search", "qwenrt1."):
        assert word not in prompt
    assert made.ignored == ("web_search",)


def test_a_kept_conversation_goes_on() -> None:
    first = ask([message("user", "q")], reasoning={"effort": "low"}, tools=[NAMESPACE])
    assert first.extra.store and not ask(store=False).extra.store
    writer = openai_responses.Writer(Served("qwen", "r", 3), first)
    function = {"name": "mcp__notes__f", "arguments": '{"a": 1}'}
    answer = {
        "content": "x",
        "reasoning_content": "t",
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    writer.whole([Generation("x", [1], "tool_calls", Usage(), message=answer)])
    kept = openai_responses.kept_items(first, writer)
    following = ask([output()], earlier=kept, previous_response_id=writer.response["id"])
    assert following.messages == [
        said("user", "q"),
        said("assistant", "x", reasoning_content="t", tool_calls=[called("mcp__notes__f", '{"a": 1}')]),
        said("tool", "done", tool_call_id="c1"),
    ]
    assert json.loads(following.extra.items)[-1] == output()


ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(
            [
                "message",
                "reasoning",
                "function_call",
                "function_call_output",
                "custom_tool_call",
                "custom_tool_call_output",
                "item_reference",
            ]
        )
        | JSON,
        "role": st.sampled_from(["user", "assistant", "developer", "robot"]),
        "content": st.text(max_size=3)
        | st.lists(st.sampled_from(parts("input_text", "a")), max_size=2)
        | JSON,
        "call_id": st.sampled_from(["c1", "c2", ""]),
        "name": st.sampled_from(["f", "", "a\nb"]),
        "namespace": st.sampled_from(["n", ""]) | JSON,
        "arguments": st.sampled_from(["{}", "{", "x"]) | JSON,
        "input": st.text(max_size=3) | JSON,
        "output": st.text(max_size=3) | JSON,
        "summary": JSON,
        "encrypted_content": st.sampled_from(["qwenrt1.", "qwenrt1.AAAA", "é"]) | JSON,
    },
)
BODY = st.fixed_dictionaries(
    {"input": st.text(max_size=3) | st.lists(ITEM, max_size=6) | JSON},
    optional={
        "instructions": st.text(max_size=3) | JSON,
        "tools": st.lists(st.sampled_from([FUNCTION, CUSTOM, NAMESPACE, SEARCH]), max_size=3) | JSON,
        "tool_choice": st.sampled_from(["auto", "required", {"type": "allowed_tools", "tools": []}]) | JSON,
        "reasoning": st.sampled_from([{"effort": "low"}]) | JSON,
        "text": st.sampled_from([{"format": {"type": "json_schema", "schema": {}}}]) | JSON,
        "top_p": st.floats() | JSON,
        "include": st.just(["reasoning.encrypted_content"]) | JSON,
        "store": JSON,
        "metadata": JSON,
    },
)


@unhurried
@given(BODY)
def test_any_body_is_an_ask_or_a_problem(body: Any) -> None:
    try:
        made = openai_responses.read(openai_responses.decode(json.dumps(body).encode()), THOUGHTS)
    except Problem as found:
        assert found.kind in ("invalid_request", "invalid_json")
        return
    assert made.messages and not made.messages[-1].get("tool_calls")
    openai_responses.Writer(Served("qwen", "r"), made).begin()
