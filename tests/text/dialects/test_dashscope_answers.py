"""Answers for DashScope's clients: the last event, or all together, say what the whole does."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.outputs import CallDelta, Delta, FinishReason, Generation, Usage
from qwenrt.text.dialects.answers import Served
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.dashscope import Form
from qwenrt.text.dialects.dashscope_answers import EVERY_PIECE, FINISH_REASONS, Writer
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.deltas import joined, mixed, stream, token_text
from tests.text.dialects.strategies import unhurried

SERVED = Served("qwen3", "r1", 11, token_text=token_text)


def writer(*, as_message: bool = True, incremental: bool = False) -> Writer:
    return Writer(SERVED, Ask(extra=Form(as_message, incremental)))


def events(one: Writer, deltas: list[Delta]) -> list[Any]:
    """The data of all events."""
    sent = one.begin() + b"".join(map(one.push, deltas)) + one.end()
    told = []
    for number, event in enumerate(sent.decode().split("\n\n")[:-1], 1):
        first, kind, status, data = event.split("\n")
        assert (first, kind, status) == (f"id:{number}", "event:result", ":HTTP_STATUS/200")
        told.append(json.loads(data.removeprefix("data:")))
    return told


def added(whole: dict[str, Any], piece: dict[str, Any]) -> dict[str, Any]:
    """What a client has of a choice after one more incremental piece."""
    message, more = whole.setdefault("message", {"role": "assistant", "content": ""}), piece["message"]
    for name in ("content", "reasoning_content"):
        if name in more:
            message[name] = message.get(name, "") + more[name]
    for call in more.get("tool_calls", []):
        calls = message.setdefault("tool_calls", [])
        if call["index"] == len(calls):
            calls.append(call)
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if "logprobs" in piece:
        whole.setdefault("logprobs", {"content": []})["content"] += piece["logprobs"]["content"]
    return whole | {"index": piece["index"], "finish_reason": piece["finish_reason"]}


@unhurried
@given(st.lists(stream(), min_size=1, max_size=3), st.lists(st.integers(0, 5), max_size=40))
def test_the_last_events_say_what_the_whole_does(streams: list[list[Delta]], order: list[int]) -> None:
    given_order = [
        [Delta(**{**vars(piece), "index": index}) for piece in one] for index, one in enumerate(streams)
    ]
    deltas = mixed(given_order, order)
    whole = json.loads(json.dumps(writer().whole(joined(deltas))))["output"]["choices"]
    last: dict[int, Any] = {}
    for event in events(writer(), deltas):
        [choice] = event["output"]["choices"]
        last[choice["index"]] = choice
    assert [last[index] for index in sorted(last)] == whole
    so_far: dict[int, Any] = {}
    for event in events(writer(incremental=True), deltas):
        [choice] = event["output"]["choices"]
        so_far[choice["index"]] = added(so_far.get(choice["index"], {}), choice)
    assert [so_far[index] for index in sorted(so_far)] == whole


@unhurried
@given(stream())
def test_a_text_is_cumulative_or_adds_up(deltas: list[Delta]) -> None:
    deltas = [Delta(**{**vars(piece), "calls": (), "tool_calls": None}) for piece in deltas]
    whole = json.loads(json.dumps(writer(as_message=False).whole(joined(deltas))))["output"]
    cumulative = [event["output"] for event in events(writer(as_message=False), deltas)]
    assert cumulative[-1] == whole
    for before, after in pairwise(cumulative):
        assert before["finish_reason"] == "null" and after["text"].startswith(before["text"])
    pieces = [event["output"] for event in events(writer(as_message=False, incremental=True), deltas)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert "".join(piece.get("reasoning_content", "") for piece in pieces) == whole.get(
        "reasoning_content", ""
    )


ENDED = Delta("!", [2], "stop", usage=Usage(11, 2, 3, 1))


def test_events_count_tokens_as_they_come() -> None:
    first, last = events(writer(), [Delta("hi", [1]), ENDED])
    assert first["usage"]["input_tokens"] == 11 and first["usage"]["output_tokens"] == 1
    assert first["usage"]["total_tokens"] == 12 and first["request_id"] == "r1"
    assert last["usage"] == {
        "input_tokens": 11,
        "output_tokens": 2,
        "total_tokens": 13,
        "input_tokens_details": {"cached_tokens": 3},
        "prompt_tokens_details": {"cached_tokens": 3},
        "output_tokens_details": {"reasoning_tokens": 1},
    }


def test_whole_choices_count_the_prompt_once() -> None:
    made = Generation("a", [1], "stop", Usage(11, 2, 3))
    assert writer().whole([made, made])["usage"]["total_tokens"] == 15


def test_pieces_of_a_call_have_its_name_once() -> None:
    deltas = [
        Delta("", [1], calls=(CallDelta(0, "c1", "f", "{"),)),
        Delta("", [2], calls=(CallDelta(0, arguments="}"),)),
        ENDED,
    ]
    told = events(writer(incremental=True), deltas)
    calls = [event["output"]["choices"][0]["message"].get("tool_calls") for event in told]
    assert calls == [
        [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{"}}],
        [{"index": 0, "id": "", "type": "function", "function": {"arguments": "}"}}],
        None,
    ]


def test_calls_that_come_whole_are_told_at_the_end() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    deltas = [Delta("x", [1]), Delta("", [2], "tool_calls", tool_calls=[call])]
    for incremental in (True, False):
        [choice] = events(writer(incremental=incremental), deltas)[-1]["output"]["choices"]
        assert choice["message"]["tool_calls"] == [{"index": 0, **call}]


def test_a_long_answer_is_not_written_again_for_every_token() -> None:
    pieces = [Delta("word ", [1]) for _ in range(40_000)]
    one = writer(as_message=False)
    sizes = [len(one.push(piece)) for piece in [*pieces, ENDED]]
    written, early = 5 * len(pieces), EVERY_PIECE // 5
    assert all(sizes[:early]) and sizes[-1] > written
    assert sum(sizes) < 300 * written + early * EVERY_PIECE


def test_every_way_to_end_has_a_reason() -> None:
    assert set(FINISH_REASONS) == set(get_args(FinishReason))
    for reason in get_args(FinishReason):
        whole = writer(as_message=False).whole([Generation("", [], reason, Usage())])
        assert whole["output"]["finish_reason"] == FINISH_REASONS[reason]
        if reason != "error":
            [told] = events(writer(as_message=False), [Delta("", [1], reason)])
            assert told["output"]["finish_reason"] == FINISH_REASONS[reason]


@pytest.mark.parametrize("by_delta", [True, False])
def test_an_error_is_the_last_event(by_delta: bool) -> None:
    one = writer()
    one.push(Delta("a", [1]))
    sent = one.push(Delta("", [], "error")) if by_delta else one.fail(Problem("timeout", "too slow"))
    first, kind, comment, status, data, *rest = sent.decode().split("\n")
    code, number = ("InternalError", 500) if by_delta else ("RequestTimeOut", 504)
    assert (first, kind) == ("id:2", "event:error")
    assert (comment, status, rest) == (f":HTTP_STATUS/{number}", f"status:{number}", ["", ""])
    told = json.loads(data.removeprefix("data:"))
    assert told["code"] == code and told["request_id"] == "r1"
    assert one.push(Delta("b", [1])) == one.end() == b""


def test_a_ping_is_a_comment() -> None:
    assert writer().ping().startswith(b":") and writer().ping().endswith(b"\n\n")
