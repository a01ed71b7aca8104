"""Calls that a grammar forces: in each form they are read as calls, with arguments of the tools' schemas."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from qwenrt.engine.grammar import Grammars  # noqa: E402
from qwenrt.errors import RequestError  # noqa: E402
from qwenrt.loading import load_tokenizer  # noqa: E402
from qwenrt.text.replies.call_grammar import call_grammar  # noqa: E402
from qwenrt.text.replies.parser import parse_reply  # noqa: E402
from qwenrt.text.replies.reply_format import ReplyFormat  # noqa: E402
from tests.schemas import random_schema, written  # noqa: E402

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "its name", "maxLength": 30},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["C", "F"]},
            "hours": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        },
        "required": ["city", "days"],
    },
}
NOTE = {
    "name": "write_note",
    "parameters": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "done": {"type": "boolean"},
            "extra": {"$ref": "#/$defs/e"},
        },
        "required": ["text", "extra"],
        "$defs": {"e": {"type": ["object", "null"], "additionalProperties": {"type": "number"}}},
    },
}
NOTHING = {"name": "ping"}
TOOLS: list[Any] = [{"type": "function", "function": function} for function in (WEATHER, NOTE, NOTHING)]
ENDINGS = ("\n</parameter>\n", "\nAction: ")
FORMS = [ReplyFormat(form, "none") for form in ("hermes", "xml", "react")]  # type: ignore[arg-type]


@cache
def grammars() -> Grammars:
    return Grammars(load_tokenizer("demo"))


def answers(
    reply_format: ReplyFormat, tools: list[Any], count: int, seed: int = 0, **asked: Any
) -> list[str]:
    """Random finished answers of the grammar."""
    grammar = call_grammar(reply_format, tools, **asked)
    compiled, tokenizer = grammars().compile(grammar), load_tokenizer("demo")
    found = [
        written(compiled, tokenizer, random.Random(seed + i), most=1500, grammar=grammar, endings=ENDINGS)
        for i in range(count)
    ]
    return [text for text, whole in found if whole]


def check(text: str, reply_format: ReplyFormat, tools: list[Any] = TOOLS, **asked: Any) -> list[str]:
    """The names of the calls in an answer, each of whose arguments fit."""
    calls = parse_reply(text, reply_format, tools=tools, **asked).tool_calls
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    for call in calls:
        function = call["function"]
        jsonschema.validate(json.loads(function["arguments"]), schemas[function["name"]])
    return [call["function"]["name"] for call in calls]


@pytest.mark.parametrize("reply_format", FORMS, ids=["hermes", "xml", "react"])
def test_whatever_is_written_is_calls_whose_arguments_fit(reply_format: ReplyFormat) -> None:
    texts = answers(reply_format, TOOLS, 60)
    assert len(texts) > 30
    called = [check(text, reply_format) for text in texts]
    assert all(called) and {name for names in called for name in names} == {
        "get_weather",
        "write_note",
        "ping",
    }
    if reply_format.calls != "react":
        assert max(map(len, called)) > 1


@pytest.mark.parametrize("reply_format", FORMS, ids=["hermes", "xml", "react"])
def test_one_tool_and_one_call(reply_format: ReplyFormat) -> None:
    texts = answers(reply_format, TOOLS, 20, name="get_weather", single=True)
    assert len(texts) > 10
    for text in texts:
        assert check(text, reply_format) == ["get_weather"]


def test_a_thought_of_react_leads_to_an_action() -> None:
    react = FORMS[2]
    thoughts = answers(react, TOOLS, 40)
    assert any(text.startswith("Thought:") for text in thoughts)
    for text in answers(react, TOOLS, 10, in_thought=True):
        assert len(check(text, react, in_thought=True)) == 1
    grammar = call_grammar(react, TOOLS)
    matcher = grammars().compile(grammar).matcher()
    said = "Thought: I see. Final Answer: none\nAction: ping\nAction Input: {}"
    assert matcher.consume_tokens(load_tokenizer("demo").encode(said)) and matcher.is_accepting()
    for wrong in ("Thought: no\nFinal Answer:", "Thought: " + "ha" * 201, "Hello", "Action: pong"):
        ids = load_tokenizer("demo").encode(wrong + " it is\nAction: ping\nAction Input: {}")
        matcher = grammars().compile(grammar).matcher()
        assert matcher.validate_tokens(ids) < len(ids)


def test_tags_that_are_tokens_are_written_as_tokens() -> None:
    grammar = call_grammar(FORMS[0], TOOLS, tags={"<tool_call>": 1, "</tool_call>": 2})
    assert "<tool_call> " in grammar.text and '"<tool_call>"' not in grammar.text
    assert '"<tool_call>"' in call_grammar(FORMS[0], TOOLS).text


def test_random_tools_in_every_form() -> None:
    ended = 0
    for seed in range(60):
        r = random.Random(seed)
        schema = {
            "type": "object",
            "properties": {"a": random_schema(r, 1), "b": random_schema(r, 1)},
            "required": ["a"],
        }
        tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}]
        for reply_format in (FORMS[0], FORMS[2]):
            try:
                texts = answers(reply_format, tools, 2, seed)
            except RequestError:
                continue
            ended += len(texts)
            assert all(check(text, reply_format, tools) for text in texts)
    assert ended > 120


def test_texts_that_are_listed_and_odd_schemas_in_xml() -> None:
    xml = FORMS[1]
    schema = {
        "type": "object",
        "properties": {
            "mode": {"type": "string", "enum": ["fast", "slow and\nsteady"]},
            "short": {"type": "string", "minLength": 2, "maxLength": 3},
            "maybe": {"type": ["string", "null"]},
            "any": {},
            "<odd>": {"type": "string"},
        },
        "required": ["mode", "short", "maybe", "unlisted"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    texts = answers(xml, tools, 30)
    assert len(texts) > 10
    for text in texts:
        assert set(check(text, xml, tools)) == {"f"}
    for bad in ({"name": "a b"}, {"name": "f", "parameters": schema | {"required": ["<odd>"]}}):
        with pytest.raises(RequestError, match="form of calls"):
            call_grammar(xml, [{"type": "function", "function": bad}])


def test_what_no_grammar_keeps_to_is_left_out_unless_strict() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"oneOf": [{}, {}]}}},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert answers(FORMS[0], tools, 3)
    tools[0]["function"]["strict"] = True  # type: ignore[index]
    with pytest.raises(RequestError, match="uniqueItems"):
        answers(FORMS[0], tools, 1)


def test_qwen_1s_own_descriptions() -> None:
    tools = [
        {
            "name_for_model": "search",
            "parameters": [{"name": "q", "required": True, "schema": {"type": "string"}}, {"name": "n"}],
        }
    ]
    for text in answers(FORMS[2], tools, 5):
        [call] = parse_reply(text, FORMS[2]).tool_calls
        assert call["function"]["name"] == "search" and "q" in json.loads(call["function"]["arguments"])
