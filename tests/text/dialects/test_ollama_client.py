"""The `ollama` package reads what is written for it, and what it sends is understood."""

from __future__ import annotations

from typing import Any

import pytest

from qwenrt.outputs import CallDelta, Delta, Timing, TokenLogprob, Usage
from qwenrt.text.dialects import ollama as dialect
from qwenrt.text.dialects.answers import Served, json_bytes
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.ollama_answers import Writer, embed_body, embeddings_body, loaded
from qwenrt.text.dialects.ollama_models import ModelCard, ps, show, tags
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.deltas import joined, token_text

httpx = pytest.importorskip("httpx")
ollama = pytest.importorskip("ollama")

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "杭州"}'}}
ANSWER = [
    Delta("", [1], reasoning="I wonder. ", logprobs=[TokenLogprob(1, -0.5, {1: -0.5, 2: -1.5})]),
    Delta("It is ", [2], logprobs=[TokenLogprob(2, -0.25)]),
    Delta("warm.", [3], logprobs=[TokenLogprob(3, -0.125)]),
    Delta("", [4], calls=(CallDelta(0, "c1", "weather", '{"city": '),), logprobs=[TokenLogprob(4, 0.0)]),
    Delta(
        "",
        [5],
        "tool_calls",
        calls=(CallDelta(0, arguments='"杭州"}'),),
        tool_calls=[CALL],
        usage=Usage(11, 5),
        timing=Timing(0.1, 0.2, 1.2, 4.0),
    ),
]
CARD = ModelCard("qwen3", "qwen3", 600_000_000, "int4", 4096, ("completion", "tools"), 10**9, 1_800_000_000.0)
SERVED = Served("qwen3", "r1", 11, token_text=token_text)


class Server:
    """The dialect as a transport of httpx; ``asked`` is the last request it understood."""

    def __init__(self) -> None:
        self.asked: Any = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        try:
            status, content = 200, self._answer(request.url.path.removeprefix("/api/"), request.content)
        except Problem as problem:
            status, content = problem.status, json_bytes(dialect.error_body(problem))
        return httpx.Response(status, content=content)

    def _answer(self, path: str, body: bytes) -> bytes:
        if path in ("tags", "ps", "show"):
            told = {"tags": lambda: tags([CARD]), "ps": lambda: ps([CARD], 0.0), "show": lambda: show(CARD)}
            return json_bytes(told[path]())
        if path == "embed":
            self.asked = dialect.read_embed(dialect.decode_embed(body))
            return json_bytes(
                embed_body(SERVED, [[3.0, 4.0, 0.5] for _ in self.asked.texts], self.asked.dimensions)
            )
        if path == "embeddings":
            self.asked = dialect.read_embed(dialect.decode_embeddings(body))
            return json_bytes(embeddings_body([0.5, 0.25]))
        if path in dialect.NOT_SERVED:
            raise dialect.not_served(path)
        return self._written(path, body)

    def _written(self, path: str, body: bytes) -> bytes:
        if path == "chat":
            asked = dialect.decode_chat(body)
            self.asked = dialect.read_chat(asked, 4096)
        else:
            asked = dialect.decode_generate(body)
            self.asked = dialect.read_generate(asked, 4096)
        if dialect.is_load(asked):
            return json_bytes(loaded(SERVED, self.asked))
        return answered(self.asked)


def answered(ask: Ask) -> bytes:
    writer = Writer(SERVED, ask)
    if not ask.stream:
        return json_bytes(writer.whole(joined(ANSWER)))
    pieces = [writer.ping(), *map(writer.push, ANSWER)]
    last = writer.fail(Problem("internal", "broken")) if ask.model == "breaks" else writer.end()
    return writer.begin() + b"".join(pieces) + last


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(server: Server) -> Any:
    return ollama.Client(transport=httpx.MockTransport(server))


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: where
    """
    return city


def test_a_chat_with_tools(server: Server, client: Any) -> None:
    messages = [{"role": "user", "content": "Is it warm?"}]
    answer = client.chat(
        "qwen3",
        messages,
        tools=[weather],
        options={"temperature": 0},
        think=True,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.message.content == "It is warm." and answer.message.thinking == "I wonder. "
    [call] = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "杭州"})
    assert answer.done and answer.done_reason == "stop" and answer.eval_count == 5
    assert [entry.token for entry in answer.logprobs] == ["<1>", "<2>", "<3>", "<4>"]
    assert [top.token for top in answer.logprobs[0].top_logprobs] == ["<1>", "<2>"]
    assert server.asked.tools[0]["function"]["parameters"]["properties"]["city"]["type"] == "string"
    assert server.asked.sampling == {"temperature": 0.0, "max_tokens": None, "logprobs": 2}
    client.chat(
        "qwen3", [*messages, answer.message, {"role": "tool", "content": "20", "tool_name": "weather"}]
    )
    assert [message["role"] for message in server.asked.messages] == ["user", "assistant", "tool"]
    assert server.asked.messages[1]["reasoning_content"] == "I wonder. "


def test_a_stream_says_the_same(client: Any) -> None:
    parts = list(client.chat("qwen3", [{"role": "user", "content": "?"}], stream=True))
    assert "".join(part.message.content for part in parts) == "It is warm."
    assert "".join(part.message.thinking or "" for part in parts) == "I wonder. "
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    assert [call.function.arguments for call in calls] == [{"city": "杭州"}]
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_duration == 1_000_000_000


def test_generate(server: Server, client: Any) -> None:
    answer = client.generate("qwen3", "hello", system="be brief", format={"type": "object"})
    assert answer.response == "It is warm." and answer.thinking == "I wonder. "
    assert [message["role"] for message in server.asked.messages] == ["system", "user"]
    parts = list(client.generate("qwen3", "hello", raw=True, stream=True))
    assert "".join(part.response for part in parts) == "It is warm."
    assert server.asked.prompts == ("hello",)
    assert client.generate("qwen3").done_reason == client.chat("qwen3").done_reason == "load"


def test_a_stream_that_breaks_raises(client: Any) -> None:
    parts = client.chat("breaks", [{"role": "user", "content": "?"}], stream=True)
    with pytest.raises(ollama.ResponseError, match="broken"):
        list(parts)


def test_vectors(server: Server, client: Any) -> None:
    assert client.embed("qwen3", ["a", "b"], dimensions=2).embeddings == [[0.6, 0.8]] * 2
    assert server.asked.dimensions == 2
    assert client.embeddings("qwen3", "a").embedding == [0.5, 0.25]


def test_the_model_is_listed_and_shown(client: Any) -> None:
    assert [model.model for model in client.list().models] == ["qwen3"]
    assert client.ps().models[0].context_length == 4096
    shown = client.show("anything")
    assert shown.modelinfo["qwen3.context_length"] == 4096 and shown.capabilities == ["completion", "tools"]


def test_what_is_not_served_is_an_error_with_a_sentence(client: Any) -> None:
    for ask in (
        lambda: client.pull("x"),
        lambda: client.push("x"),
        lambda: client.create("x", from_="y"),
        lambda: client.delete("x"),
        lambda: client.copy("x", "y"),
    ):
        with pytest.raises(ollama.ResponseError, match="is not served") as caught:
            ask()
        assert caught.value.status_code == 501
    with pytest.raises(ollama.ResponseError, match="131072") as caught:
        client.generate("qwen3", "x", options={"num_ctx": 131072})
    assert caught.value.status_code == 400
