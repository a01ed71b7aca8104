"""Ollama's dialect and the vectors of all dialects, over a socket."""

from __future__ import annotations

import array
import base64
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

import qwenrt
from tests.server.asking import GENERATE, OLLAMA, ask, chat, lines, serve
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
PROMPTS: list[str] = []


def reply(prompt: str) -> str:
    PROMPTS.append(prompt)
    said = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    if "JSON" in said:
        return '{"b": 1}'
    if "weather" in said:
        return '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    return "Fine." if prompt.endswith("</think>\n\n") else "<think>\nhm\n</think>\n\nFine."


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(reply, max_model_len=1024) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM) -> Iterator[Serving]:
    with serve(llm) as running:
        yield running


@pytest.mark.parametrize("path", [OLLAMA, GENERATE])
def test_it_streams_unless_told_otherwise_and_ends_with_counts(served: Serving, path: str) -> None:
    body = chat() if path == OLLAMA else {"model": "m", "prompt": "Hello"}
    status, headers, stream = ask(served, path, body)
    came = lines(stream)
    assert status == 200 and headers["content-type"].startswith("application/x-ndjson")
    assert [line["done"] for line in came] == [False] * (len(came) - 1) + [True]
    whole = ask(served, path, {**body, "stream": False})[2]
    assert whole["done"] and whole["done_reason"] == "stop"
    for done in (came[-1], whole):
        assert done["prompt_eval_count"] > 0 and done["eval_count"] > 0
        names = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
        assert all(isinstance(done[name], int) and done[name] > 0 for name in names)

    def text(line: dict[str, Any]) -> str:
        return str(line["message"]["content"] if path == OLLAMA else line["response"])

    assert "".join(map(text, came)) == text(whole) == "Fine."


def test_thoughts_are_asked_for(served: Serving) -> None:
    for think, thinks in ((True, True), ("low", True), (False, False)):
        message = ask(served, OLLAMA, chat(stream=False, think=think))[2]["message"]
        assert ("thinking" in message) is thinks and message["content"] == "Fine."


def test_formats_are_json_or_a_schema(served: Serving) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [7]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for text, form, value in (("give JSON", "json", {"b": 1}), ("x", schema, {"a": 7})):
        answer = ask(served, OLLAMA, chat(text, stream=False, format=form, think=False))[2]
        assert answer["done_reason"] == "stop" and json.loads(answer["message"]["content"]) == value
    assert ask(served, OLLAMA, chat(format="yaml"))[0] == 400


def test_a_context_that_is_too_large_is_refused_and_never_cut(served: Serving) -> None:
    assert ask(served, OLLAMA, chat(stream=False, options={"num_ctx": 1024}))[0] == 200
    status, _, told = ask(served, OLLAMA, chat(options={"num_ctx": 1025}))
    assert status == 400 and "1025" in told["error"] and "1024" in told["error"]
    status, _, told = ask(served, OLLAMA, chat("word " * 2000))
    assert status == 400 and "1024" in told["error"]
    answer = ask(served, OLLAMA, chat(stream=False, options={"num_predict": 2}, keep_alive="5m"))[2]
    assert answer["eval_count"] == 2 and answer["done_reason"] == "length"


def test_a_context_is_read_again_where_its_ids_are_this_models(served: Serving) -> None:
    body = {"model": "m", "prompt": "one", "stream": False}
    first = ask(served, GENERATE, body)[2]
    assert ask(served, GENERATE, {**body, "prompt": "two", "context": first["context"]})[0] == 200
    assert "one" in PROMPTS[-1] and "two" in PROMPTS[-1]
    for wrong in ([1, 999999], [-1]):
        status, _, told = ask(served, GENERATE, {**body, "context": wrong})
        assert status == 400 and "context" in told["error"]


def test_calls_and_their_results_by_place(served: Serving) -> None:
    answer = ask(served, OLLAMA, chat("weather", tools=[TOOL]))[2]
    calls = [call for line in lines(answer) for call in line["message"].get("tool_calls", ())]
    assert [call["function"] for call in calls] == [{"index": 0, "name": "weather", "arguments": {}}]
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    for result in (
        {"role": "tool", "content": "warm"},
        {"role": "tool", "tool_name": "weather", "content": "warm"},
    ):
        messages = [*chat("weather")["messages"], asked, result]
        assert ask(served, OLLAMA, chat(messages=messages, tools=[TOOL], stream=False))[0] == 200
        assert "<tool_response>\nwarm" in PROMPTS[-1]
    stray = {"role": "tool", "tool_call_id": "nobody", "content": "stray"}
    assert ask(served, OLLAMA, chat(messages=[stray], stream=False, tools=[]))[0] == 200
    assert "stray" in PROMPTS[-1]


def test_what_the_model_is(served: Serving) -> None:
    shown = ask(served, "/api/show", {"model": "m"})[2]
    assert {"completion", "tools", "thinking", "embedding"} <= set(shown["capabilities"])
    assert [value for key, value in shown["model_info"].items() if key.endswith(".context_length")] == [1024]
    assert ask(served, "/api/tags")[2]["models"][0]["name"]
    assert ask(served, "/api/ps")[2]["models"][0]["size"] > 0
    assert ask(served, "/api/version")[2]["version"]


@pytest.mark.parametrize("name", ["pull", "push", "create", "copy", "delete", "blobs/sha256:abc"])
def test_what_would_change_the_machine_is_501(served: Serving, name: str) -> None:
    method = "DELETE" if name == "delete" else "POST"
    status, _, told = ask(served, f"/api/{name}", {"model": "m"}, method=method)
    assert status == 501 and isinstance(told["error"], str)


def test_a_body_without_a_type_with_a_mark_or_a_charset_is_json(served: Serving) -> None:
    raw = json.dumps(chat(stream=False)).encode()
    assert ask(served, OLLAMA, raw)[0] == 200
    assert ask(served, OLLAMA, b"\xef\xbb\xbf" + raw)[0] == 200
    assert ask(served, OLLAMA, raw, content_type="application/json; charset=utf-8")[0] == 200
    assert ask(served, OLLAMA, raw, content_type="text/plain")[0] == 200
    twice = ask(served, OLLAMA, b'{"stream": true, ' + raw[1:])[2]  # the last counts, as it does elsewhere
    assert twice["done"] is True
    assert ask(served, OLLAMA, raw.replace(b"Hello", b"\\ud800"))[0] == 400
    assert ask(served, OLLAMA, raw.replace(b"Hello", b"\xff"))[0] == 400


# ---- vectors


def norm(vector: list[float]) -> float:
    return math.hypot(*vector)


@pytest.fixture(scope="module")
def vectors() -> Iterator[Serving]:
    """A model with weights: the scripted one's vectors are nothing."""
    with qwenrt.load("demo", progress=False, max_model_len=256) as loaded, serve(loaded) as running:
        yield running


def test_vectors_of_texts_and_of_their_ids(vectors: Serving) -> None:
    texts = ["Paris is a city.", "杭州"]
    told = ask(vectors, "/v1/embeddings", {"model": "m", "input": texts})[2]
    assert [one["index"] for one in told["data"]] == [0, 1] and told["usage"]["prompt_tokens"] > 0
    ids = [ask(vectors, "/tokenize", {"model": "m", "prompt": text})[2]["tokens"] for text in texts]
    again = ask(vectors, "/v1/embeddings", {"model": "m", "input": ids})[2]
    for one, other in zip(told["data"], again["data"], strict=True):
        assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-4)
    coded = ask(vectors, "/v1/embeddings", {"model": "m", "input": texts, "encoding_format": "base64"})[2]
    values = array.array("f", base64.b64decode(coded["data"][0]["embedding"]))
    assert list(values) == pytest.approx(told["data"][0]["embedding"], abs=1e-6)


def test_ids_of_another_vocabulary_are_refused(vectors: Serving) -> None:
    for given, param in (([1, 151643], "input[0][1]"), ([[1], [2, 99999]], "input[1][1]")):
        status, _, told = ask(vectors, "/v1/embeddings", {"model": "m", "input": given})
        assert status == 400 and told["error"]["param"] == param and "vocabulary" in told["error"]["message"]


def test_2048_texts_in_base64(vectors: Serving) -> None:
    body = {"model": "m", "input": ["a"] * 2048, "encoding_format": "base64"}
    status, _, told = ask(vectors, "/v1/embeddings", body)
    assert status == 200 and len(told["data"]) == 2048
    assert ask(vectors, "/v1/embeddings", {**body, "input": ["a"] * 2049})[0] == 400


def test_ollamas_vectors_are_cut_or_not(vectors: Serving) -> None:
    told = ask(vectors, "/api/embed", {"model": "m", "input": ["a", "b"]})[2]
    assert len(told["embeddings"]) == 2 and told["prompt_eval_count"] > 0
    short = ask(vectors, "/api/embed", {"model": "m", "input": "a", "dimensions": 8})[2]["embeddings"]
    assert len(short[0]) == 8 and norm(short[0]) == pytest.approx(1, abs=1e-5)
    first = told["embeddings"][0][:8]
    assert short[0] == pytest.approx([value / norm(first) for value in first], abs=1e-5)
    assert ask(vectors, "/api/embeddings", {"model": "m", "prompt": "a"})[2]["embedding"]
    assert ask(vectors, "/api/embed", {"model": "m", "input": []})[2]["embeddings"] == []
    long = "word " * 2000
    assert ask(vectors, "/api/embed", {"model": "m", "input": long})[0] == 200  # cut, as Ollama does
    status, _, refused = ask(vectors, "/api/embed", {"model": "m", "input": long, "truncate": False})
    assert status == 400 and "tokens" in refused["error"]
    assert ask(vectors, "/v1/embeddings", {"model": "m", "input": long})[0] == 400


def test_reranking_and_scores(vectors: Serving) -> None:
    documents = ["Paris", "a fish", "France"]
    told = ask(vectors, "/v1/rerank", {"model": "m", "query": "capital", "documents": documents, "top_n": 2})
    if told[0] == 200:  # the built-in model may have no words for yes and no
        scores = [one["relevance_score"] for one in told[2]["results"]]
        assert len(scores) == 2 and scores == sorted(scores, reverse=True)
        pairs = ask(vectors, "/v1/score", {"model": "m", "text_1": "capital", "text_2": documents})[2]
        assert len(pairs["data"]) == 3
    else:
        assert told[0] == 400 and told[2]["error"]["message"]
