"""Answers to chat completions: chunks that join to the whole body, and what each of them says."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.outputs import CallDelta, Delta, FinishReason, Generation, Timing, TokenLogprob, Usage
from qwenrt.text.dialects.answers import Served, json_bytes
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.openai_bodies import ERRORS, FINISH, error_body
from qwenrt.text.dialects.openai_chat_writer import ChatWriter
from qwenrt.text.dialects.openai_fields import Wishes
from qwenrt.text.dialects.problem import STATUS, Problem
from tests.text.dialects.strategies import Written, unhurried, written

SERVED = Served(
    "Qwen-7B-Chat",
    "req-1",
    prompt_tokens=7,
    created=1_700_000_000,
    token_text=lambda token: (f"t{token}", bytes([token % 256])),
)


def writer(**wishes: Any) -> ChatWriter:
    return ChatWriter(SERVED, Ask(extra=Wishes(**wishes)))


def events(stream: bytes) -> list[Any]:
    """The data of a stream's events, which end with [DONE]."""
    lines = stream.decode().split("\n\n")
    assert lines[-1] == "" and lines[-2] == "data: [DONE]"
    assert all(line.startswith("data: ") and "\n" not in line for line in lines[:-1])
    return [json.loads(line[6:]) for line in lines[:-2]]


def streamed(of: ChatWriter, deltas: list[Delta]) -> list[Any]:
    return events(b"".join([of.begin(), *map(of.push, deltas), of.end()]))


def joined(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """Messages by index, as a client joins them."""
    messages: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            into = messages.setdefault(choice["index"], {"content": "", "calls": {}, "finish": None})
            assert into["finish"] is None, "nothing follows the end of a choice"
            into["finish"] = choice["finish_reason"]
            delta = choice["delta"]
            for key in ("content", "reasoning_content", "reasoning", "role"):
                if key in delta:
                    into[key] = into.get(key, "") + delta[key]
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["type"] == "function" and call["index"] not in into["calls"]
                    into["calls"][call["index"]] = {
                        "id": call["id"],
                        "type": "function",
                        "function": call["function"],
                    }
                else:
                    into["calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            if old := delta.get("function_call"):
                call = into.setdefault("function_call", {"arguments": ""})
                call.update({"name": old["name"]} if "name" in old else {})
                call["arguments"] += old["arguments"]
    return messages


@unhurried
@given(written(), st.booleans())
def test_joined_chunks_are_the_whole_body(answers: Written, usage: bool) -> None:
    count = len(answers.choices)
    chunks = streamed(writer(choices=count, drawn=count, usage=usage), answers.deltas)
    body = json.loads(json_bytes(writer(choices=count, drawn=count).whole(answers.choices)))
    assert body["object"] == "chat.completion"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    messages = joined(chunks)
    assert sorted(messages) == [choice["index"] for choice in body["choices"]] == list(range(count))
    for choice in body["choices"]:
        message, pieces = choice["message"], messages[choice["index"]]
        assert pieces["content"] == (message["content"] or "")
        assert pieces["role"] == message["role"] == "assistant"
        assert pieces["finish"] == choice["finish_reason"] in ("stop", "length", "tool_calls")
        assert pieces.get("reasoning") == pieces.get("reasoning_content") == message.get("reasoning_content")
        assert message.get("reasoning") == message.get("reasoning_content")
        assert list(pieces["calls"].values()) == message.get("tool_calls", [])
    if usage:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == body["usage"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
    else:
        assert all("usage" not in chunk for chunk in chunks)


@unhurried
@given(written(choices=1))
def test_functions_get_a_function_call_whole_and_in_pieces(answers: Written) -> None:
    pieces = joined(streamed(writer(old_calls=True), answers.deltas))[0]
    [choice] = writer(old_calls=True).whole(answers.choices)["choices"]
    assert pieces["calls"] == {} and "tool_calls" not in choice["message"]
    assert pieces.get("function_call") == choice["message"].get("function_call")
    assert pieces["finish"] == choice["finish_reason"]
    calls = answers.choices[0].message.get("tool_calls")
    assert (choice["finish_reason"] == "function_call") == bool(calls)
    if calls:
        assert choice["message"]["function_call"] == calls[0]["function"]


def test_calls_that_come_whole_at_the_end_are_told_in_one_piece() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    chunks = streamed(writer(), [Delta("", [1], "tool_calls", usage=Usage(7, 1), tool_calls=[call])])
    assert joined(chunks)[0]["calls"] == {0: call}
    pieces = [
        Delta("", calls=(CallDelta(0, "call_1", "get", "{}"),)),
        Delta("", [], "tool_calls", tool_calls=[call]),
    ]
    assert joined(streamed(writer(), pieces))[0]["calls"] == {0: call}


def test_what_shows_nothing_sends_nothing() -> None:
    assert writer().push(Delta("", [1, 2])) == b""
    assert writer().ping().startswith(b":")


def test_the_first_chunks_give_each_choice_its_role() -> None:
    chunks = events(writer(choices=2, drawn=2).begin() + b"data: [DONE]\n\n")
    assert [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"]) for chunk in chunks] == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
    ]


@pytest.mark.parametrize("reason", get_args(FinishReason))
def test_every_reason_has_a_word_that_clients_know(reason: FinishReason) -> None:
    words = ("stop", "length", "tool_calls", "content_filter", "function_call")
    for old in (False, True):
        [choice] = writer(old_calls=old).whole([Generation("x", [], reason, Usage())])["choices"]
        assert choice["finish_reason"] in words
    told = choice.get("qwenrt", {}).get("finish_reason")
    assert told == (reason if reason in ("timeout", "abort", "error") else None)


def test_the_table_of_reasons_is_total() -> None:
    assert set(FINISH) == set(get_args(FinishReason))


def test_usage_counts_prompts_once_and_answers_all() -> None:
    usages = [Usage(7, 10, 4, 3), Usage(7, 20, 6, 1)]
    choices = [Generation("x", [], "stop", usage, timing=Timing(1 / 3, 1, 2, 3)) for usage in usages]
    body = writer(choices=2, drawn=2).whole(choices)
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 30,
        "total_tokens": 37,
        "prompt_tokens_details": {"cached_tokens": 6},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    assert body["qwenrt"] == {
        **{"cached_tokens": 6, "computed_tokens": 1},
        **{"queue_s": 0.333333, "first_token_s": 1, "total_s": 2, "tokens_per_s": 3},
    }
    assert (body["created"], body["model"], body["system_fingerprint"]) == (
        1_700_000_000,
        "Qwen-7B-Chat",
        "qwenrt",
    )


def test_usage_can_be_told_with_every_chunk() -> None:
    deltas = [Delta("a", [1, 2]), Delta("b", [3], "stop", usage=Usage(7, 3))]
    chunks = streamed(writer(usage=True, usage_always=True), deltas)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 2, 3, 3]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {7}


LOGPROBS = [TokenLogprob(65, -0.5, {65: -0.5, 300: -2.0}), TokenLogprob(66, float("-inf"))]


def test_logprobs_have_text_and_bytes_and_no_infinity() -> None:
    expected = [
        {
            "token": "t65",
            "logprob": -0.5,
            "bytes": [65],
            "top_logprobs": [
                {"token": "t65", "logprob": -0.5, "bytes": [65]},
                {"token": "t300", "logprob": -2.0, "bytes": [44]},
            ],
        },
        {"token": "t66", "logprob": -9999.0, "bytes": [66], "top_logprobs": []},
    ]
    deltas = [Delta("", [65], logprobs=LOGPROBS[:1]), Delta("x", [66], "stop", logprobs=LOGPROBS[1:])]
    chunks = streamed(writer(logprobs=2), deltas)
    told = [
        entry
        for chunk in chunks
        for c in chunk["choices"]
        for entry in (c["logprobs"] or {"content": []})["content"]
    ]
    assert told == expected
    generation = Generation("x", [65, 66], "stop", Usage(), LOGPROBS)
    assert writer(logprobs=2).whole([generation])["choices"][0]["logprobs"]["content"] == expected
    assert writer().whole([generation])["choices"][0]["logprobs"] is None
    assert b"t65" not in writer().push(deltas[1])


def test_best_of_gives_the_likeliest() -> None:
    drawn = [
        Generation(str(value), [1], "stop", Usage(7, 1), [TokenLogprob(1, value)])
        for value in (-3.0, -1.0, -2.0)
    ]
    body = writer(choices=2, drawn=3).whole(drawn)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["-1.0", "-2.0"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["logprobs"] for choice in body["choices"]] == [None, None]
    assert body["usage"]["completion_tokens"] == 3


def test_a_failure_is_an_event_and_not_an_end() -> None:
    data = writer().fail(Problem("internal", "it broke"))
    assert json.loads(data.removeprefix(b"data: "))["error"]["message"] == "it broke"
    assert b"[DONE]" not in data


def test_progress_is_told_as_llama_server_does() -> None:
    [chunk] = events(writer().progress(100, 20, 60, 0.25) + b"data: [DONE]\n\n")
    assert chunk["prompt_progress"] == {"total": 100, "cache": 20, "processed": 60, "time_ms": 250}
    assert chunk["choices"] == []


def test_ids_are_not_guessed() -> None:
    first, second = writer(), writer()
    assert first.id != second.id and re.fullmatch(r"chatcmpl-[0-9a-f]{32}", first.id)
    assert streamed(first, [])[0]["id"] == first.id == first.whole([])["id"]


def test_every_problem_has_a_body() -> None:
    assert set(ERRORS) == set(STATUS)
    for kind in STATUS:
        body = error_body(Problem(kind, "asked: found. Do this.", param="messages[1].role"))["error"]
        assert set(body) == {"message", "type", "param", "code"}
        assert body["param"] == "messages[1].role" and body["message"] == "asked: found. Do this."
    missing = error_body(Problem("not_found", "no such model", param="model"))
    assert missing["error"]["code"] == "model_not_found"


def test_a_prompt_that_does_not_fit_is_told_in_the_words_that_agents_parse() -> None:
    body = error_body(Problem.context_length(9000, 8192))["error"]
    assert body["code"] == "context_length_exceeded" and body["type"] == "invalid_request_error"
    match = re.search(r"maximum context length is (\d+) tokens", body["message"])
    assert match is not None and match[1] == "8192"
    assert "9000" in body["message"]
