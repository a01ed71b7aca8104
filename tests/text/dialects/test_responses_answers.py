"""OpenAI's Responses: what answers look like, as events and whole."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.outputs import CallDelta, Delta, FinishReason, Generation, Usage
from qwenrt.text.dialects import openai_responses
from qwenrt.text.dialects.answers import Served
from qwenrt.text.dialects.openai_responses import Writer
from qwenrt.text.dialects.problem import Problem
from qwenrt.text.dialects.responses_answers import STATUSES
from qwenrt.text.dialects.signed_thoughts import SignedThoughts
from tests.text.dialects.deltas import disorder, joined, stream
from tests.text.dialects.events import events, response_of
from tests.text.dialects.strategies import unhurried

THOUGHTS = SignedThoughts(b"key")
TOOLS = [
    {"type": "function", "name": "tool0", "parameters": {}},
    {"type": "custom", "name": "tool1"},
    {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
]
PACKED = {"include": ["reasoning.encrypted_content"]}
SUMMARY = {"reasoning": {"summary": "auto", "effort": "high"}}


def writer(**fields: Any) -> Writer:
    body = json.dumps({"model": "m", "input": "q", "tools": TOOLS, **fields}).encode()
    ask = openai_responses.read(openai_responses.decode(body), THOUGHTS)
    return Writer(Served("qwen", "req_1", 100, created=1000), ask)


def written(*deltas: Delta, **fields: Any) -> list[dict[str, Any]]:
    one = writer(**fields)
    return events(b"".join([one.begin(), *map(one.push, deltas), one.end()]))


def test_the_events_of_a_thought_a_text_and_a_call() -> None:
    found = written(
        Delta("", [1], reasoning="h"),
        Delta("", [1], reasoning="m"),
        Delta("I ", [2]),
        Delta("look.", [2]),
        Delta("", [3], calls=(CallDelta(0, "call_7", "n__f", ""),)),
        Delta("", [3], calls=(CallDelta(0, arguments='{"a":'),)),
        Delta("", [3], calls=(CallDelta(0, arguments=" 1}"),)),
        Delta("", [9], "tool_calls", usage=Usage(100, 12, 64, 3)),
    )
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    response = response_of(found)
    thought, message, call = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}] and thought["summary"] == []
    assert "encrypted_content" not in thought
    assert message["content"] == [
        {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}
    ]
    assert message["status"] == "completed" and message["role"] == "assistant"
    assert call == {
        "id": call["id"],
        "type": "function_call",
        "status": "completed",
        "call_id": "call_7",
        "name": "f",
        "namespace": "n",
        "arguments": '{"a": 1}',
    }
    assert response["usage"] == {
        "input_tokens": 100,
        "input_tokens_details": {"cached_tokens": 64},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 112,
    }


def test_a_custom_call_comes_as_its_input() -> None:
    arguments = '{"input": "*** Begin\\n\\"ü\\""}'
    pieces = [Delta("", [1], calls=(CallDelta(0, "call_1", "tool1", ""),))]
    pieces += [Delta("", [1], calls=(CallDelta(0, arguments=char),)) for char in arguments]
    found = written(*pieces, Delta("", [9], "tool_calls", usage=Usage()))
    (item,) = response_of(found)["output"]
    assert item["type"] == "custom_tool_call" and item["name"] == "tool1"
    assert item["input"] == '*** Begin\n"ü"' and "arguments" not in item


def test_a_summary_is_the_thought_where_one_is_asked_for() -> None:
    found = written(Delta("", [1], reasoning="hm"), Delta("a", [1], "stop", usage=Usage()), **SUMMARY)
    kinds = [event["type"].removeprefix("response.") for event in found[2:8]]
    assert kinds == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    thought = response_of(found)["output"][0]
    assert thought["summary"] == [{"type": "summary_text", "text": "hm"}] and "content" not in thought


def test_a_thought_is_packed_where_it_is_asked_for() -> None:
    found = written(
        Delta("", [1], reasoning="hm"), Delta("a", [1], "stop", usage=Usage()), **PACKED, **SUMMARY
    )
    assert response_of(found)["output"][0]["encrypted_content"] == THOUGHTS.packed("hm")


def test_what_the_request_said_is_repeated() -> None:
    wanted = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    one = writer(
        instructions="I",
        metadata={"a": "b"},
        temperature=0.5,
        max_output_tokens=9,
        store=False,
        tool_choice="required",
        parallel_tool_calls=False,
        text={"format": wanted},
        prompt_cache_key="k",
        **SUMMARY,
    )
    response = events(one.begin())[0]["response"]
    for key, value in {
        "object": "response",
        "status": "in_progress",
        "instructions": "I",
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "top_p": 1.0,
        "max_output_tokens": 9,
        "store": False,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "text": {"format": {**wanted, "description": None}},
        "reasoning": {"effort": "high", "summary": "auto"},
        "prompt_cache_key": "k",
        "model": "qwen",
        "created_at": 1000,
        "output": [],
        "usage": None,
        "error": None,
    }.items():
        assert response[key] == value, key
    assert response["tools"] == [
        {"type": "function", "name": "tool0", "description": None, "parameters": {}, "strict": None},
        *TOOLS[1:],
    ]


@pytest.mark.parametrize("reason", get_args(FinishReason))
def test_every_end_has_a_status(reason: FinishReason) -> None:
    found = written(Delta("a", [1], reason, usage=Usage()))
    response = response_of(found)
    assert response["status"] == STATUSES[reason]
    incomplete = response["status"] == "incomplete"
    assert response["incomplete_details"] == ({"reason": "max_output_tokens"} if incomplete else None)
    assert response["output"][0]["status"] == (
        "completed" if response["status"] == "completed" else "incomplete"
    )
    assert (response["error"] is not None) == (reason == "error")
    answer = Generation("a", [1], reason, Usage())
    if reason == "error":
        with pytest.raises(Problem, match="broke off"):
            writer().whole([answer])
    else:
        assert writer().whole([answer])["status"] == STATUSES[reason]


def test_a_failure_ends_the_open_item_and_the_response() -> None:
    one = writer()
    parts = [one.begin(), one.push(Delta("half", [1])), one.fail(Problem("queue_timeout", "too long"))]
    response = response_of(events(b"".join(parts)))
    assert response["status"] == "failed" and response["error"]["message"] == "too long"
    assert response["output"][0]["status"] == "incomplete"
    assert one.response["status"] == "failed"


def test_a_ping_is_no_event() -> None:
    assert events(writer().ping()) == []


def test_a_deleted_response() -> None:
    assert openai_responses.deleted_body("resp_1") == {"id": "resp_1", "object": "response", "deleted": True}


@unhurried
@given(stream(broken=True), st.sampled_from([{}, PACKED, SUMMARY, PACKED | SUMMARY]))
def test_any_pieces_are_a_valid_stream_of_the_whole_response(
    deltas: list[Delta], fields: dict[str, Any]
) -> None:
    one = writer(**fields)
    streamed = response_of(events(b"".join([one.begin(), *map(one.push, deltas), one.end()])))
    (answer,) = joined(deltas)
    whole = json.loads(
        json.dumps(writer(**fields).whole([answer]), default=lambda value: value.__struct_fields__)
    )

    def texts(response: dict[str, Any]) -> dict[str, Any]:
        items = response["output"]
        thoughts = [item for item in items if item["type"] == "reasoning"]
        calls = [{**item, "id": "", "status": ""} for item in items if item["type"].endswith("_call")]
        return {
            "thought": "".join(
                part["text"] for item in thoughts for part in item.get("content") or item["summary"]
            ),
            "packed": [item.get("encrypted_content") for item in thoughts],
            "said": "".join(item["content"][0]["text"] for item in items if item["type"] == "message"),
            "calls": calls,
        }

    assert texts(streamed) == texts(whole)
    assert texts(whole)["thought"] == answer.reasoning and texts(whole)["said"] == answer.text
    for key in ("status", "incomplete_details", "model", "created_at"):
        assert streamed[key] == whole[key]
    assert streamed["usage"] == whole["usage"]
    assert one.response["output"] == streamed["output"]


@unhurried
@given(disorder())
def test_pieces_in_any_order_are_a_valid_stream(deltas: list[Delta]) -> None:
    output = response_of(written(*deltas, Delta("", [9], "stop", usage=Usage())))["output"]
    said = "".join(item["content"][0]["text"] for item in output if item["type"] == "message")
    assert said == "".join(delta.text for delta in deltas)
