"""The whole server over a socket, with the built-in model: every dialect answers, and every error in its words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

import qwenrt
from qwenrt.server import app
from qwenrt.server.settings import ServeSettings
from tests.server.asking import ask
from tests.server.wire import Serving, request, serving, until

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
USER = [{"role": "user", "content": QUESTION}]
# A whole answer of each dialect: where it is asked, how, and where its text is.
DIALECTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "chat": (
        "/v1/chat/completions",
        {"model": "m", "messages": USER},
        lambda body: body["choices"][0]["message"]["content"],
    ),
    "responses": (
        "/v1/responses",
        {"model": "m", "input": QUESTION},
        lambda body: body["output"][0]["content"][0]["text"],
    ),
    "messages": (
        "/v1/messages",
        {"model": "m", "max_tokens": 50, "messages": USER},
        lambda body: body["content"][0]["text"],
    ),
    "ollama": (
        "/api/chat",
        {"model": "m", "stream": False, "messages": USER},
        lambda body: body["message"]["content"],
    ),
    "generate": (
        "/api/generate",
        {"model": "m", "stream": False, "prompt": QUESTION},
        lambda body: body["response"],
    ),
    "dashscope": (
        "/api/v1/services/aigc/text-generation/generation",
        {"model": "m", "input": {"messages": USER}},
        lambda body: body["output"]["text"],
    ),
}


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with qwenrt.load("demo", progress=False, max_model_len=8192) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM) -> Iterator[Serving]:
    settings = ServeSettings(port=0, drain=0)
    application = app(llm, settings)
    with serving(application, settings, hooks=application.hooks(lambda: None)) as running:
        yield running


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_has_the_models_answer(served: Serving, dialect: str) -> None:
    path, body, text = DIALECTS[dialect]
    status, headers, answer = ask(served, path, body)
    assert status == 200 and text(answer) == ANSWER
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/v1/chat/completions", {"model": "m", "messages": USER, "stream": True}, b"data: [DONE]\n\n"),
        (
            "/v1/completions",
            {"model": "m", "prompt": "Paris", "stream": True, "max_tokens": 4},
            b"data: [DONE]\n\n",
        ),
        ("/v1/responses", {"model": "m", "input": QUESTION, "stream": True}, b'"status":"completed"'),
        (
            "/v1/messages",
            {"model": "m", "max_tokens": 50, "messages": USER, "stream": True},
            b"event: message_stop",
        ),
        ("/api/chat", {"model": "m", "messages": USER}, b'"done":true'),
    ],
)
def test_every_dialect_streams_to_its_end(
    served: Serving, path: str, body: dict[str, Any], end: bytes
) -> None:
    status, headers, came = ask(served, path, body)
    assert status == 200 and end in came and came.count(b"\n") > 4
    assert headers["x-accel-buffering"] == "no" and headers["cache-control"] == "no-store"


def test_dashscopes_stream_is_asked_for_by_a_header(served: Serving) -> None:
    path, body, _ = DIALECTS["dashscope"]
    status, headers, came = ask(served, path, body, **{"x-dashscope-sse": "enable"})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert came.rstrip().splitlines()[-1].startswith(b"data:") and ANSWER.encode() in came


@pytest.mark.parametrize("dialect", DIALECTS)
def test_errors_are_in_the_words_of_their_dialect(served: Serving, dialect: str) -> None:
    path, _, _ = DIALECTS[dialect]
    status, _, body = ask(served, path, b"{")
    assert status == 400
    told = body.get("message") or body["error"]
    assert "JSON" in (told if isinstance(told, str) else told["message"])


def test_a_prompt_that_does_not_fit_is_told_in_the_words_that_agents_parse(served: Serving) -> None:
    long = [{"role": "user", "content": "word " * 9000}]
    status, _, body = ask(served, "/v1/chat/completions", {"model": "m", "messages": long})
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 8192 tokens" in body["error"]["message"]
    status, _, body = ask(served, "/v1/messages", {"model": "m", "max_tokens": 9, "messages": long})
    assert status == 400 and "prompt is too long: " in body["error"]["message"]
    assert body["error"]["message"].endswith(" tokens > 8192 maximum")


def test_max_tokens_beyond_the_context_are_cut_and_told(served: Serving) -> None:
    body = {"model": "m", "max_tokens": 128000, "messages": USER}
    status, headers, answer = ask(served, "/v1/messages", body)
    assert status == 200 and answer["content"][0]["text"] == ANSWER
    assert 8000 < int(headers["x-qwenrt-max-tokens"]) < 8192


def test_counts_are_those_of_the_usage(served: Serving) -> None:
    body = {"model": "m", "max_tokens": 50, "messages": USER}
    _, _, counted = ask(served, "/v1/messages/count_tokens", body)
    _, _, answer = ask(served, "/v1/messages", body)
    usage = answer["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    _, _, rendered = ask(served, "/v1/chat/completions/render", {"model": "m", "messages": USER})
    assert rendered["count"] == counted["input_tokens"] == len(rendered["prompt_token_ids"])
    _, _, tokens = ask(served, "/tokenize", {"model": "m", "messages": USER})
    assert tokens["tokens"] == rendered["prompt_token_ids"]
    _, _, text = ask(served, "/detokenize", {"tokens": tokens["tokens"]})
    assert text["prompt"] == rendered["prompt"]


def test_a_cancelled_stream_leaves_the_engine(served: Serving, llm: qwenrt.LLM) -> None:
    body = {"model": "m", "messages": USER, "stream": True, "ignore_eos": True, "max_tokens": 8000}
    with served.wire(request("POST", "/v1/chat/completions", {}, json.dumps(body).encode())) as wire:
        wire.read_until(b"capital")
        assert llm.stats()["running"] == 1
    until(lambda: llm.stats()["running"] == 0)
    until(lambda: served.tasks == 0)


def test_a_whole_answer_that_nobody_waits_for_leaves_the_engine(served: Serving, llm: qwenrt.LLM) -> None:
    body = {"model": "m", "messages": USER, "ignore_eos": True, "max_tokens": 8000}
    with served.wire(request("POST", "/v1/chat/completions", {}, json.dumps(body).encode())):
        until(lambda: llm.stats()["running"] == 1)
    until(lambda: llm.stats()["running"] == 0)


def test_a_stream_goes_on_without_its_connection_and_can_be_read_again(served: Serving) -> None:
    name = "0f8fad5b-d9cb-469f-a165-70867728950e"
    body = {"model": "m", "messages": USER, "stream": True, "ignore_eos": True, "max_tokens": 300}
    sent = request("POST", "/v1/chat/completions", {"x-conversation-id": name}, json.dumps(body).encode())
    with served.wire(sent) as wire:
        wire.read_until(b"capital")
    _, _, whole = ask(served, f"/v1/stream?conv_id={name}&from=0")
    assert (
        whole.endswith(b"data: [DONE]\n\n") and b"capital" in whole and b'"finish_reason":"length"' in whole
    )
    _, _, rest = ask(served, f"/v1/stream/{name}?from=1000")
    assert rest == whole[1000:]
    status, _, _ = ask(served, f"/v1/stream/{name}?from={len(whole) + 1}")
    assert status == 400
    assert ask(served, f"/v1/stream/{name}", method="DELETE")[0] == 200
    assert ask(served, f"/v1/stream/{name}")[0] == 404


def test_an_id_that_can_be_guessed_keeps_no_stream(served: Serving) -> None:
    body = {"model": "m", "messages": USER, "stream": True}
    status, _, told = ask(served, "/v1/chat/completions", body, **{"x-conversation-id": "chat-1"})
    assert status == 400 and "128 bits" in told["error"]["message"]


def test_what_the_server_says_of_itself(served: Serving) -> None:
    with served.wire(request("HEAD", "/", {"connection": "close"})) as wire:
        assert wire.rest().startswith(b"HTTP/1.1 200")
    assert ask(served, "/health")[2] == ask(served, "/ready")[2] == {"status": "ok"}
    assert ask(served, "/version")[2] == {"version": qwenrt.__version__}
    assert ask(served, "/server_info")[2]["max_model_len"] == 8192
    assert ask(served, "/v1/models")[2]["data"][0]["max_model_len"] == 8192
    assert ask(served, "/v1/models/demo")[2]["id"] == "demo"
    assert ask(served, "/v1/loads")[2]["free_blocks"] == ask(served, "/v1/loads")[2]["total_blocks"]
    assert b"qwenrt_requests_total" in ask(served, "/metrics")[2]


def test_every_route_is_described_and_every_description_is_a_route(served: Serving, llm: qwenrt.LLM) -> None:
    _, _, document = ask(served, "/openapi.json")
    for path, methods in document["paths"].items():
        given = {one["name"] for one in methods.get("get", {}).get("parameters", ()) if one["in"] == "path"}
        assert given == set(re.findall(r"{(\w+)}", path))
    for path, methods in document["paths"].items():
        for method in methods:
            probe = path.replace("{name}", "demo").replace("{id}", "resp_none")
            status, _, _ = ask(served, probe, b"{}" if method == "post" else None)
            assert status != 405 and (status != 404 or "{" in path or path == "/v1/stream"), (method, path)


def test_what_was_not_foreseen_is_no_stack_trace(
    served: Serving, llm: qwenrt.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(llm, "prepare", broken)
    status, _, body = ask(served, "/v1/chat/completions", {"model": "m", "messages": USER})
    assert status == 500 and "secret" not in json.dumps(body) and "RuntimeError" in body["error"]["message"]
