"""Anthropic's Messages: what answers look like, as events and whole."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given

from qwenrt.outputs import CallDelta, Delta, FinishReason, Generation, Usage
from qwenrt.text.dialects import anthropic
from qwenrt.text.dialects.answers import Served
from qwenrt.text.dialects.anthropic_answers import ERROR_TYPES, STOP_REASONS, Extra
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.problem import STATUS, Problem
from qwenrt.text.dialects.signed_thoughts import SignedThoughts
from tests.text.dialects.deltas import disorder, joined, stream, token_text
from tests.text.dialects.events import events, message_of
from tests.text.dialects.strategies import unhurried

THOUGHTS = SignedThoughts(b"key")
SERVED = Served("qwen", "req_1", 100, token_text=token_text)
NO_STOP = {"stop_sequence": None, "stop_details": None, "container": None}
LAST = Delta("", [9], "stop", usage=Usage(100, 12, 64, 3))


def writer(stop: tuple[str, ...] = (), hidden: bool = False, served: Served = SERVED) -> anthropic.Writer:
    return anthropic.Writer(served, Ask(extra=Extra(THOUGHTS, stop, hidden)))


def written(*deltas: Delta, **options: Any) -> list[dict[str, Any]]:
    one = writer(**options)
    return events(b"".join([one.begin(), *map(one.push, deltas), one.end()]))


def test_the_events_of_a_thought_a_text_and_a_call() -> None:
    found = written(
        Delta("", [1], reasoning="hm"),
        Delta("", [1], reasoning="m"),
        Delta("I look", [2]),
        Delta(" it up.", [2]),
        Delta("", [3], calls=(CallDelta(0, "call_7", "f", ""),)),
        Delta("", [3], calls=(CallDelta(0, arguments='{"a":'),)),
        Delta("", [3], calls=(CallDelta(0, arguments=" 1}"),)),
        Delta("", [9], "tool_calls", usage=Usage(100, 12, 64, 3)),
    )
    assert [event["type"] for event in found] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = found[0]["message"]
    assert start["id"].startswith("msg_") and start["role"] == "assistant" and start["model"] == "qwen"
    assert start["usage"] | {"input_tokens": 100, "output_tokens": 0} == start["usage"]
    deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert deltas == [
        {"type": "thinking_delta", "thinking": "hm"},
        {"type": "thinking_delta", "thinking": "m"},
        {"type": "signature_delta", "signature": THOUGHTS.signature("hmm")},
        {"type": "text_delta", "text": "I look"},
        {"type": "text_delta", "text": " it up."},
        {"type": "input_json_delta", "partial_json": '{"a":'},
        {"type": "input_json_delta", "partial_json": " 1}"},
    ]
    blocks = [event["content_block"] for event in found if event["type"] == "content_block_start"]
    assert blocks == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": "", "citations": None},
        {"type": "tool_use", "id": "toolu_7", "name": "f", "caller": {"type": "direct"}, "input": {}},
    ]
    assert found[-2]["delta"] == {**NO_STOP, "stop_reason": "tool_use"}


def test_the_model_is_named_as_it_was_asked_for() -> None:
    """Claude Code 2.1.197 leaves out the thoughts of a message whose model is not the one it asked for."""
    one = anthropic.Writer(SERVED, Ask(model="claude-opus-4-8", extra=Extra(THOUGHTS)))
    assert events(one.begin())[0]["message"]["model"] == "claude-opus-4-8"
    assert one.whole([Generation("a", [1], "stop", Usage())])["model"] == "claude-opus-4-8"


def test_usage_counts_what_came_from_the_cache_apart() -> None:
    usage = written(Delta("a", [1]), LAST)[-2]["usage"]
    assert usage == {
        "input_tokens": 36,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 64,
        "output_tokens": 12,
        "output_tokens_details": {"thinking_tokens": 3},
        "server_tool_use": None,
    }
    whole = writer().whole([Generation("a", [1], "stop", Usage(100, 12, 64, 3))])
    assert whole["usage"] | usage == whole["usage"]


def test_calls_that_come_whole_are_written_as_well() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = message_of(written(Delta("x", [1], "tool_calls", usage=Usage(), tool_calls=[call])))
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    assert message["content"][1]["input_json"] == '{"a": 1}'


def test_text_after_a_call_is_a_block_of_its_own() -> None:
    message = message_of(
        written(
            Delta("a", [1], calls=(CallDelta(0, "call_1", "f", "{"),)),
            Delta("\nb", [1], calls=(CallDelta(0, arguments="}"), CallDelta(1, "call_2", "g", "{}"))),
            LAST,
        )
    )
    assert [block.get("text", block.get("name")) for block in message["content"]] == ["a", "f", "\nb", "g"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        (' {"a": 1}', {"a": 1}),
        ("", {}),
        ("Beijing", {"input": "Beijing"}),
        ("[1]", {"input": "[1]"}),
        ('"x"', {"input": '"x"'}),
    ],
)
def test_arguments_are_an_object_whatever_the_model_wrote(arguments: str, expected: Any) -> None:
    pieces = [Delta("", [1], calls=(CallDelta(0, "call_1", "f", ""),))]
    pieces += [Delta("", [1], calls=(CallDelta(0, arguments=char),)) for char in arguments]
    assert json.loads(message_of(written(*pieces, LAST))["content"][0]["input_json"]) == expected
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = Generation("", [1], "tool_calls", Usage(), message={"content": None, "tool_calls": [call]})
    assert writer().whole([answer])["content"][0]["input"] == expected


def test_a_hidden_thought_stands_in_its_signature() -> None:
    found = written(Delta("", [1], reasoning="secret"), Delta("a", [1]), LAST, hidden=True)
    block = message_of(found)["content"][0]
    assert block == {"type": "thinking", "thinking": "", "signature": THOUGHTS.packed("secret")}
    answer = Generation("a", [1], "stop", Usage(), message={"content": "a", "reasoning_content": "secret"})
    assert writer(hidden=True).whole([answer])["content"][0] == block


@pytest.mark.parametrize("reason", get_args(FinishReason))
def test_every_end_has_a_word(reason: FinishReason) -> None:
    assert STOP_REASONS[reason] in ("end_turn", "max_tokens", "tool_use")
    if reason != "error":
        found = written(Delta("a", [1], reason, usage=Usage()))
        assert found[-2]["delta"]["stop_reason"] == STOP_REASONS[reason]
        whole = writer().whole([Generation("a", [1], reason, Usage())])
        assert whole["stop_reason"] == STOP_REASONS[reason]


def test_an_answer_that_broke_off_ends_in_an_error() -> None:
    found = written(Delta("a", [1]), Delta("", [], "error"))
    assert found[-1]["type"] == "error" and found[-1]["error"]["type"] == "api_error"
    with pytest.raises(Problem, match="broke off"):
        writer().whole([Generation("a", [1], "error", Usage())])


def bytes_of(token: int) -> tuple[str, bytes]:
    """Token 256 ends the answer; the others are bytes."""
    text = "<|im_end|>" if token == 256 else chr(token)
    return text, text.encode()


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        (b"one STOP", ("STOP",), "STOP"),
        (b"one STOP", ("ST", "OP"), "OP"),
        (b"one STOP more", ("STOP",), None),
        (b"one STO", ("STOP",), None),
        ([*b"one", 256], ("e", "|", "im_end"), None),
        (b"one", (), None),
    ],
)
def test_which_sequence_ended_the_answer_is_seen_in_its_last_tokens(
    tokens: Any, stop: tuple[str, ...], expected: str | None
) -> None:
    served = Served("qwen", "r", 1, token_text=bytes_of)
    reason = "end_turn" if expected is None else "stop_sequence"
    ids = list(tokens)
    found = written(
        *(Delta("", [token]) for token in ids[:-1]), Delta("", ids[-1:], "stop"), stop=stop, served=served
    )
    assert found[-2]["delta"] == {**NO_STOP, "stop_reason": reason, "stop_sequence": expected}
    whole = writer(stop, served=served).whole([Generation("", ids, "stop", Usage())])
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, expected)


@pytest.mark.parametrize("kind", STATUS)
def test_every_kind_of_problem_has_a_body(kind: Any) -> None:
    body = anthropic.error_body(Problem(kind, "what went wrong"), "req_1")
    assert body["type"] == "error" and body["request_id"] == "req_1"
    assert body["error"]["type"] == ERROR_TYPES[kind]
    one = writer()
    (event,) = events(one.fail(Problem(kind, "what went wrong")))
    assert event == body


def test_a_prompt_that_does_not_fit_is_told_in_claude_codes_words() -> None:
    error = anthropic.error_body(Problem.context_length(9000, 8192))["error"]
    assert error == {
        "type": "invalid_request_error",
        "message": "prompt is too long: 9000 tokens > 8192 maximum",
    }


@unhurried
@given(stream(broken=True))
def test_any_pieces_are_a_valid_stream_of_the_whole_message(deltas: list[Delta]) -> None:
    message = message_of(written(*deltas))
    (answer,) = joined(deltas)
    whole = writer().whole([answer])
    blocks = message["content"]
    for kind, field in (("thinking", "thinking"), ("text", "text")):
        for made in (blocks, whole["content"]):
            said = answer.reasoning if kind == "thinking" else answer.text
            assert "".join(block[field] for block in made if block["type"] == kind) == said
    calls = [block for block in blocks if block["type"] == "tool_use"]
    others = [block for block in whole["content"] if block["type"] == "tool_use"]
    for streamed, block in zip(calls, others, strict=True):
        text = streamed.pop("input_json")
        assert {**streamed, "input": block["input"]} == block
        if text.startswith("{"):
            try:
                assert json.loads(text) == block["input"]
            except ValueError:
                assert block["input"] == {"input": text}
    for field in ("stop_reason", "usage", "model", "role", "type"):
        assert message[field] == whole[field]


@unhurried
@given(disorder())
def test_pieces_in_any_order_are_a_valid_stream(deltas: list[Delta]) -> None:
    message = message_of(written(*deltas, LAST))
    assert "".join(block.get("text", "") for block in message["content"]) == "".join(
        delta.text for delta in deltas
    )
