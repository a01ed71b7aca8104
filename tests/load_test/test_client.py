"""The client against servers that answer, and that do not: over sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("h11")
pytest.importorskip("msgspec")

from qwenrt.errors import RequestError
from qwenrt.load_test.client import Answer, EventStream, OpenAIServer
from qwenrt.load_test.connections import Address
from qwenrt.load_test.workloads import TOOLS, Request
from tests.load_test import fake_openai as fake
from tests.load_test.fake_openai import Behaviour, content, fake_openai

REQUEST = Request(({"role": "user", "content": "hello"},), 6, TOOLS)


def ask(*script: Behaviour, times: int = 1, **options: Any) -> list[Answer]:
    """What ``times`` requests in turn get."""

    async def whole(url: str) -> list[Answer]:
        server = OpenAIServer(Address.of(url), model="m", **options)
        answers = [await server.ask(REQUEST) for _ in range(times)]
        server.close()
        return answers

    with fake_openai(*script) as server:
        return asyncio.run(whole(server.url))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("https://host/v1/", "https://host:443/v1"),
        ("http://[::1]:11434/compatible-mode/v1", "http://[::1]:11434/compatible-mode/v1"),
    ],
)
def test_a_server_s_address(url: str, said: str) -> None:
    address = Address.of(url)
    assert f"{address}{address.path}" == said


@pytest.mark.parametrize(
    "url", ["ftp://host", "http://", "http://host:99999", "http://me:secret@host", "http://h?a=b"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(RequestError, match="Give one like"):
        Address.of(url)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_however_they_are_cut(size: int) -> None:
    sent = b': comment\r\ndata: {"a": 1}\r\n\r\ndata:two\n\nevent: x\ndata: [DONE]\n\n'
    stream, found = EventStream(), []
    for start in range(0, len(sent), size):
        found += stream.feed(sent[start : start + size])
    assert found == [b'{"a": 1}', b"two", b"[DONE]"]


def test_an_answer() -> None:
    (answer,) = ask(fake.GOOD)
    assert answer.failure is None and answer.finished
    assert answer.text == "one two three"
    assert len(answer.pieces) == 3, "the events without text are none"
    assert (
        answer.pieces == sorted(answer.pieces)
        and answer.pieces[0] >= 0
        and answer.pieces[-1] <= answer.seconds
    )
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (7, 6, 4)


def test_an_answer_whose_events_are_cut_anywhere() -> None:
    events = [content(text) for text in ("ein", "s ", "zwei ", "三")]
    (answer,) = ask(fake.streams(*events, fake.FINISH, fake.USAGE, "[DONE]", cut=5))
    assert answer.failure is None and answer.text == "eins zwei 三" and len(answer.pieces) == 4


def test_thoughts_calls_and_completions_are_text_too() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "read_file", "arguments": '{"pa'}}
    rest = {"index": 0, "function": {"arguments": 'th": "a"}'}}
    (answer,) = ask(
        fake.streams(
            {"choices": [{"delta": {"reasoning_content": "hm"}}]},
            {"choices": [{"delta": {"reasoning": "m"}}]},
            {"choices": [{"text": "so"}]},
            {"choices": [{"delta": {"tool_calls": [call]}}]},
            {"choices": [{"delta": {"tool_calls": [rest]}, "finish_reason": "tool_calls"}]},
            {"choices": [], "usage": None},
        )
    )
    assert answer.failure is None and len(answer.pieces) == 5
    assert (answer.reasoning, answer.text, answer.output_tokens) == ("hmm", "so", None)
    function = {"name": "read_file", "arguments": '{"path": "a"}'}
    assert answer.calls == [{"id": "c1", "type": "function", "function": function}]


@pytest.mark.parametrize(
    ("behaviour", "kind", "said"),
    [
        (fake.refuses("500 Oops", "no JSON at all"), "HTTP 500", "no JSON at all"),
        (fake.refuses("400 Bad", {"error": {"message": "too long"}}), "HTTP 400", "too long"),
        (fake.refuses("404 No", {"error": "no such model"}), "HTTP 404", "no such model"),
        (fake.refuses("422 No", {"detail": [{"loc": 1}]}), "HTTP 422", "[{'loc': 1}]"),
        (fake.refuses("200 OK", {"choices": []}), "not a stream", "choices"),
        (fake.drops, "connection lost", ""),
        (fake.closes_without_a_word, "connection lost", ""),
        (
            fake.streams(content("a"), {"error": {"message": "out of memory"}}),
            "error in the stream",
            "out of memory",
        ),
        (fake.streams(content("a"), content("b")), "cut off", "after 2 events"),
        (fake.streams(fake.FINISH, "[DONE]"), "no text", "empty"),
        (fake.streams("{not json"), "unreadable event", "JSON is malformed"),
        (fake.streams({"choices": [{"delta": {"content": 7}}]}), "unreadable event", "content"),
    ],
)
def test_failures_have_a_kind(behaviour: Behaviour, kind: str, said: str) -> None:
    (answer,) = ask(behaviour)
    assert answer.failure is not None
    assert answer.failure.kind == kind and said in answer.failure.said


def test_an_answer_that_takes_too_long() -> None:
    (answer,) = ask(fake.never_ends, timeout=0.05)
    assert (
        answer.failure is not None and answer.failure.kind == "timed out" and "0.05 s" in answer.failure.said
    )


def test_who_is_refused_is_told_for_how_long() -> None:
    error = {"error": {"message": "queue full"}}
    first, second = ask(fake.refuses("429 Too Many", error, "Retry-After: 3"), fake.GOOD, times=2)
    assert first.failure is not None and (first.failure.kind, first.failure.said) == (
        "HTTP 429",
        "queue full",
    )
    assert first.retry_after == 3 and second.failure is None


def test_a_connection_serves_until_it_is_closed() -> None:
    async def whole(server: fake.FakeOpenAI) -> list[int]:
        client, seen = OpenAIServer(Address.of(server.url), model="m"), []
        for _ in range(4):
            await client.ask(REQUEST)
            seen.append(server.connections)
        client.close()
        return seen

    with fake_openai(fake.GOOD, fake.GOOD, fake.drops, fake.GOOD) as server:
        assert asyncio.run(whole(server)) == [1, 1, 1, 2]


def test_nobody_listens() -> None:
    with fake_openai(fake.GOOD) as server:
        url = server.url
    client = OpenAIServer(Address.of(url), model="m")

    async def whole() -> tuple[Answer, bool]:
        return await client.ask(REQUEST), await client.alive()

    answer, alive = asyncio.run(whole())
    assert answer.failure is not None and answer.failure.kind == "could not connect" and not alive
    with pytest.raises(RequestError, match="Is the server running there"):
        asyncio.run(client.models())


def test_what_is_sent() -> None:
    async def whole(url: str) -> None:
        chat = OpenAIServer(Address.of(url), key="k-1", model="m", extra={"ignore_eos": True})
        assert await chat.models() == ["fake-model"]
        await chat.ask(REQUEST)
        chat.close()
        completions = OpenAIServer(Address.of(url), model="m", endpoint="completions")
        await completions.ask(REQUEST)
        completions.close()

    with fake_openai(fake.GOOD) as server:
        asyncio.run(whole(server.url))
    common = {"model": "m", "max_tokens": 6, "stream": True, "stream_options": {"include_usage": True}}
    chat = {"messages": list(REQUEST.messages), "tools": list(TOOLS), "ignore_eos": True}
    assert server.bodies == [common | chat, common | {"prompt": "user: hello\nassistant:"}]
    _, first, second = server.heads
    assert first.startswith("post /v1/chat/completions ") and "authorization: bearer k-1\r\n" in first
    assert second.startswith("post /v1/completions ") and "authorization" not in second
