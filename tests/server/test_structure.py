"""Answers that are held to a structure, asked for in every way there is, over a socket."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import qwenrt
from tests.server.asking import (
    CHAT,
    COMPLETIONS,
    DASHSCOPE,
    GENERATE,
    MESSAGES,
    OLLAMA,
    RESPONSES,
    ask,
    chat,
    dashscope,
    events,
    joined,
    serve,
)
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["杭州", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WRITTEN = '{"city": "杭州"}'
WRITES = {
    "loop": '{"city":' + " " * 3000,
    "thinks": f"<think>\nno JSON at all\n</think>\n\n{WRITTEN}",
    "word": "maybe",
}


def reply(prompt: str) -> str:
    said = prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
    return WRITES.get(said, WRITTEN)


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(reply, max_model_len=8192) as loaded:
        yield loaded


def test_what_grammars_share_is_built_before_anybody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_llm(reply) as fresh:
        built, build = threading.Event(), fresh.build_grammars
        monkeypatch.setattr(fresh, "build_grammars", lambda: (build(), built.set()))
        with serve(fresh) as running:
            assert built.wait(100)
            assert ask(running, "/health")[0] == 200
        grammars = fresh._assembled.engine._alive().grammars
        assert grammars._vocabulary is not None and grammars.num_compiled == 0


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM) -> Iterator[Serving]:
    with serve(llm) as running:
        yield running


def said(path: str, told: Any) -> str:
    """The text of a whole answer in any dialect."""
    if path == CHAT:
        return str(told["choices"][0]["message"]["content"])
    if path == COMPLETIONS:
        return str(told["choices"][0]["text"])
    if path == RESPONSES:
        return str(told["output"][-1]["content"][0]["text"])
    if path == MESSAGES:
        return str(told["content"][-1]["text"])
    if path == DASHSCOPE:
        return str(told["output"]["text"])
    return str(told["message"]["content"] if path == OLLAMA else told["response"])


NAMED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
WAYS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat(response_format={"type": "json_object"})),
    (CHAT, chat(response_format=NAMED)),
    (CHAT, chat(response_format={**NAMED, "json_schema": {**NAMED["json_schema"], "strict": False}})),
    (CHAT, chat(structured_outputs={"json": SCHEMA})),
    (CHAT, chat(structured_outputs={"json": json.dumps(SCHEMA)})),
    (CHAT, chat(guided_json=SCHEMA)),
    (CHAT, chat(guided_choice=[WRITTEN, "no"])),
    (CHAT, chat(guided_regex=r'\{"city": ".*"\}')),
    (CHAT, chat(guided_grammar='start: "{" /[^}]*/ "}"')),
    (COMPLETIONS, {"model": "m", "prompt": "x", "guided_json": SCHEMA}),
    (
        RESPONSES,
        {
            "model": "m",
            "input": "x",
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        },
    ),
    (MESSAGES, chat(max_tokens=500, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})),
    (OLLAMA, chat(stream=False, format=SCHEMA, think=False)),
    (OLLAMA, chat(stream=False, format="json", think=False)),
    (GENERATE, {"model": "m", "prompt": "x", "stream": False, "format": SCHEMA, "think": False}),
    (DASHSCOPE, dashscope(response_format={"type": "json_object"}, enable_thinking=False)),
]


@pytest.mark.parametrize(("path", "body"), WAYS)
def test_every_way_to_ask_gives_what_was_asked_for(served: Serving, path: str, body: dict[str, Any]) -> None:
    status, _, told = ask(served, path, body)
    assert status == 200 and json.loads(said(path, told)) == {"city": "杭州"}
    assert "杭州" in said(path, told)  # as it is, not escaped


def test_a_model_that_would_say_something_else_is_held_to_it(served: Serving) -> None:
    for fields in ({"temperature": 0}, {"temperature": 1.0, "seed": 7}):
        body = chat("word", guided_choice=["yes", "never"], reasoning_effort="none", **fields)
        assert said(CHAT, ask(served, CHAT, body)[2]) in ("yes", "never")
        held = chat("word", response_format=NAMED, reasoning_effort="none", max_tokens=100, **fields)
        assert json.loads(said(CHAT, ask(served, CHAT, held)[2]))["city"] in ("杭州", "Paris")


def test_the_structure_begins_behind_the_thought(served: Serving) -> None:
    for stream in (False, True):
        told = ask(served, CHAT, chat("thinks", response_format=NAMED, stream=stream))[2]
        if stream:
            assert "no JSON" in joined(events(told), "reasoning") and json.loads(joined(events(told)))
        else:
            message = told["choices"][0]["message"]
            assert "no JSON" in message["reasoning"] and message["content"] == WRITTEN


def test_json_that_is_cut_is_told_and_left_as_it_is(served: Serving) -> None:
    choice = ask(served, CHAT, chat(response_format=NAMED, max_tokens=4, reasoning_effort="none"))[2][
        "choices"
    ][0]
    assert choice["finish_reason"] == "length" and WRITTEN.startswith(choice["message"]["content"])


def test_white_space_does_not_run_on(served: Serving) -> None:
    body = chat("loop", response_format=NAMED, max_tokens=2000, temperature=0, reasoning_effort="none")
    choice = ask(served, CHAT, body)[2]["choices"][0]
    assert choice["finish_reason"] == "stop" and len(choice["message"]["content"]) < 200


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED: dict[str, Any] = {
    "no type": {"type": "wizard"},
    "type of a number": {"type": 3},
    "depth": nested(200),
    "nothing": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "remote": {"$ref": "https://example.com/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "unknown place": {"$ref": "#/$defs/none"},
    "not": {"not": {"type": "string"}},
    "regex": {"type": "string", "pattern": "("},
    "catastrophic": {"type": "string", "pattern": "(" * 200 + "a*" + ")*" * 200},
    "large": {"anyOf": [{"const": f"{i:05d}"} for i in range(5000)]},
    "unsupported": {
        "type": "array",
        "uniqueItems": True,
        "items": {"type": "string"},
        "contains": {"type": "string"},
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_schemas_that_cannot_be_kept_are_400_with_their_place(served: Serving, name: str) -> None:
    began = time.process_time()
    for path, body in (
        (
            CHAT,
            chat(
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": REFUSED[name]}}
            ),
        ),
        (OLLAMA, chat(format=REFUSED[name])),
    ):
        status, _, told = ask(served, path, body)
        assert status == 400, (path, told)
        message = told["error"] if path == OLLAMA else told["error"]["message"]
        assert len(message) < 2000 and "Traceback" not in message
    assert time.process_time() - began < 5  # a magnitude: it takes milliseconds


def test_schemas_that_allow_much_are_served(served: Serving) -> None:
    recursive = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "next": {"$ref": "#/$defs/node"}},
            }
        },
    }
    for schema in (True, {}, recursive, {"type": "object", "additionalProperties": True}):
        body = chat(guided_json=schema, max_tokens=100, reasoning_effort="none")
        status, _, told = ask(served, CHAT, body)
        assert status == 200 and json.loads(said(CHAT, told)) == {"city": "杭州"}, told
    many = {"enum": [f"value {i}" for i in range(3000)]}
    status, _, told = ask(
        served, CHAT, chat("word", guided_json=many, max_tokens=60, reasoning_effort="none")
    )
    assert status in (200, 400)
    if status == 200:
        assert json.loads(said(CHAT, told)).startswith("value ")


def test_two_structures_at_once_are_one_too_many(served: Serving) -> None:
    status, _, told = ask(served, CHAT, chat(guided_json=SCHEMA, guided_regex="a"))
    assert status == 400 and told["error"]["param"] == "guided_regex"


def test_a_structure_beside_tools_may_be_a_call_instead(served: Serving) -> None:
    tool = {
        "type": "function",
        "function": {"name": "go", "parameters": {"type": "object", "properties": {}}},
    }
    body = chat(response_format=NAMED, tools=[tool], reasoning_effort="none")
    choice = ask(served, CHAT, body)[2]["choices"][0]
    assert choice["message"].get("tool_calls") or json.loads(choice["message"]["content"]) == {"city": "杭州"}
