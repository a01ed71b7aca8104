"""Answers for Ollama's clients: lines that add up to the whole, durations, errors, and what is told of the model."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.config import ModelConfig, MoeConfig
from qwenrt.outputs import Delta, FinishReason, Generation, Timing, Usage
from qwenrt.text.dialects.answers import Served
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.ollama_answers import (
    DONE_REASONS,
    Writer,
    embed_body,
    embeddings_body,
    loaded,
    rfc3339,
)
from qwenrt.text.dialects.ollama_models import (
    API_VERSION,
    ModelCard,
    architecture,
    architecture_info,
    human_count,
    ps,
    show,
    tags,
    version,
)
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.deltas import joined, stream, token_text
from tests.text.dialects.strategies import unhurried

NOW = 1_800_000_000.25
SERVED = Served("qwen3", "r1", 11, created=1_800_000_000, token_text=token_text, prompt_token_ids=[5, 6])


def writer(kind: str = "chat") -> Writer:
    return Writer(SERVED, Ask(extra=kind), clock=lambda: NOW)


def lines(kind: str, deltas: list[Delta]) -> list[dict[str, Any]]:
    one = writer(kind)
    sent = one.begin() + b"".join(map(one.push, deltas)) + one.end()
    assert sent.endswith(b"\n")
    return [json.loads(line) for line in sent.splitlines()]


def added_up(kind: str, sent: list[dict[str, Any]]) -> dict[str, Any]:
    """The lines of a stream as one body, as a client adds them up."""
    *pieces, last = sent
    assert all(piece["done"] is False for piece in pieces) and last["done"] is True
    texts: dict[str, str] = {}
    calls: list[Any] = []
    logprobs: list[Any] = []
    for line in sent:
        said = line["message"] if kind == "chat" else line
        for name in ("content", "response", "thinking"):
            if name in said:
                texts[name] = texts.get(name, "") + said[name]
        calls += said.get("tool_calls", [])
        logprobs += line.get("logprobs", [])
    body = dict(last)
    if kind == "chat":
        called = {"tool_calls": calls} if calls else {}
        body["message"] = {"role": "assistant", **texts, **called}
    else:
        body |= texts
    return body | ({"logprobs": logprobs} if logprobs else {})


@unhurried
@given(st.sampled_from(["chat", "generate"]), stream(broken=True))
def test_lines_add_up_to_the_whole(kind: str, deltas: list[Delta]) -> None:
    [whole] = joined(deltas)
    body = writer(kind).whole([whole])
    assert added_up(kind, lines(kind, deltas)) == json.loads(json.dumps(body))


def finished(reason: FinishReason, **more: Any) -> Delta:
    return Delta("", [9], reason, usage=Usage(7, 20, 3), timing=Timing(0.25, 0.5, 2.5, 9.5), **more)


def test_the_last_line_has_counts_and_nanoseconds_that_add_up() -> None:
    *_, last = lines("chat", [Delta("a", [1]), finished("stop")])
    assert last == {
        "model": "qwen3",
        "created_at": "2027-01-15T08:00:00.250000Z",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "stop",
        "total_duration": 2_500_000_000,
        "load_duration": 250_000_000,
        "prompt_eval_count": 11,
        "prompt_eval_duration": 250_000_000,
        "eval_count": 20,
        "eval_duration": 2_000_000_000,
    }


def test_without_times_no_duration_is_nothing() -> None:
    [last] = lines("generate", [Delta("", [9], "stop")])
    assert {value for name, value in last.items() if name.endswith("duration")} == {1}
    assert last["context"] == [5, 6, 9] and last["response"] == ""


def test_every_way_to_end_has_a_reason() -> None:
    assert set(DONE_REASONS) == set(get_args(FinishReason))
    for reason in get_args(FinishReason):
        *_, last = lines("chat", [finished(reason)])
        assert ("error" in last) == (reason == "error")
        assert last.get("done_reason") == (None if reason == "error" else DONE_REASONS[reason])
        made = Generation("", [], reason, Usage())
        assert writer().whole([made])["done_reason"] == DONE_REASONS[reason]
    assert DONE_REASONS["timeout"] == DONE_REASONS["abort"] == "length"


def call(arguments: str, name: str = "f") -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("arguments", ['{"a": [1, "杭州"]}', "{}", ""])
def test_calls_come_whole_with_objects(arguments: str) -> None:
    first, _ = lines("chat", [finished("tool_calls", tool_calls=[call(arguments)])])
    function = {"index": 0, "name": "f", "arguments": json.loads(arguments or "{}")}
    assert first["message"] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "function": function}],
    }


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "3", "null", "nothing", "[" * 5000])
def test_a_call_without_an_object_is_text(arguments: str) -> None:
    first, last = lines("chat", [finished("tool_calls", tool_calls=[call(arguments)])])
    assert first["message"] == {
        "role": "assistant",
        "content": f'{{"name": "f", "arguments": {arguments}}}',
    }
    assert last["done_reason"] == "stop"


def test_an_error_is_the_last_line() -> None:
    one = writer()
    sent = one.push(Delta("a", [1])) + one.fail(Problem("internal", "broken")) + one.end()
    assert json.loads(sent.splitlines()[-1]) == {"error": "broken"}


def test_a_ping_is_a_line_that_adds_nothing() -> None:
    ping = json.loads(writer().ping())
    assert ping["message"]["content"] == "" and ping["done"] is False
    assert json.loads(writer("generate").ping())["response"] == ""


def test_a_load_is_answered_at_once() -> None:
    assert loaded(SERVED, Ask(extra="chat")) == {
        "model": "qwen3",
        "created_at": "2027-01-15T08:00:00.000000Z",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "load",
    }
    assert loaded(SERVED, Ask(extra="generate"))["response"] == ""


def test_vectors() -> None:
    body = embed_body(SERVED, [[0.5, 0.25]], seconds=2.0)
    assert body["embeddings"] == [[0.5, 0.25]] and body["prompt_eval_count"] == 11
    assert body["total_duration"] == 2_000_000_000
    assert embed_body(SERVED, [[3.0, 4.0, 5.0], [0.0, 0.0, 1.0]], 2)["embeddings"] == [[0.6, 0.8], [0.0, 0.0]]
    with pytest.raises(Problem, match="this model's vectors have 1"):
        embed_body(SERVED, [[2.0]], 5)
    assert embeddings_body([0.5]) == {"embedding": [0.5]}


CONFIG = ModelConfig(
    "qwen3_moe", 1000, 64, 2, 4, 2, 16, 192, 1e-6, 1e6, 16, 4096, 4096, moe=MoeConfig(8, 2, 32)
)


def card(name: str = "org/qwen3", **changes: Any) -> ModelCard:
    fields = {
        "name": name,
        "architecture": architecture(CONFIG),
        "parameters": 30_500_000_000,
        "quantization": "int4",
        "context_length": 4096,
        "capabilities": ("completion", "tools", "thinking"),
        "size": 123456,
        "modified": NOW,
        "info": architecture_info(CONFIG),
        "sampling": {"temperature": 0.6, "top_k": 20, "stop": ("<x>",), "seed": 3},
        "version": "0.1",
    }
    return ModelCard(**(fields | changes))


def test_show_tells_the_context_and_what_the_model_can() -> None:
    told = json.loads(json.dumps(show(card())))
    info = told["model_info"]
    assert info["general.architecture"] == "qwen3moe"
    assert info["qwen3moe.context_length"] == 4096
    assert info["qwen3moe.block_count"] == 2 and info["qwen3moe.expert_count"] == 8
    assert told["capabilities"] == ["completion", "tools", "thinking"]
    assert told["template"] == "" and told["details"]["parameter_size"] == "30.5B"
    assert [line.split(maxsplit=1) for line in told["parameters"].splitlines()] == [
        ["temperature", "0.6"],
        ["top_k", "20"],
        ["stop", '"<x>"'],
    ]


def test_tags_and_ps_list_what_is_served() -> None:
    [listed] = tags([card()])["models"]
    assert listed["name"] == listed["model"] == "org/qwen3" and listed["size"] == 123456
    assert listed["details"]["quantization_level"] == "int4" and listed["modified_at"] == rfc3339(NOW)
    [running] = ps([card()], NOW)["models"]
    assert running["size_vram"] == 0 and running["context_length"] == 4096
    assert ps([card()], NOW, in_vram=True)["models"][0]["size_vram"] == 123456
    assert datetime.fromisoformat(running["expires_at"].replace("Z", "+00:00")).year > 2100


def test_digests_differ_where_models_do() -> None:
    digests = {card().digest, card("other").digest, card(quantization="int8").digest, card(info={}).digest}
    assert len(digests) == 4 and card().digest == card().digest
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


def test_the_version_is_one_that_clients_accept() -> None:
    told = version("0.1")
    assert told == {"version": API_VERSION, "qwenrt": "0.1"}
    assert tuple(map(int, API_VERSION.split("."))) >= (0, 6, 4)


@pytest.mark.parametrize(
    ("count", "text"), [(7_615_616_512, "7.6B"), (494_032_768, "494.03M"), (1500, "1.50K"), (12, "12")]
)
def test_counts_as_people_write_them(count: int, text: str) -> None:
    assert human_count(count) == text
