"""The `dashscope` package reads what is written for it, and what it sends is understood."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from qwenrt.outputs import CallDelta, Delta, Usage
from qwenrt.text.dialects import dashscope as dialect
from qwenrt.text.dialects.answers import Served, json_bytes
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.dashscope_answers import Writer
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.deltas import joined

requests = pytest.importorskip("requests")
dashscope = pytest.importorskip("dashscope")

URL = "http://127.0.0.1/api/v1"
ARGUMENTS = '{"city": "杭州"}'
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def answer(index: int = 0) -> list[Delta]:
    return [
        Delta("", [1], index=index, reasoning="I wonder."),
        Delta("It is ", [2], index=index),
        Delta("warm\u2028.", [3], index=index),
        Delta("", [4], index=index, calls=(CallDelta(0, "c1", "weather", ARGUMENTS[:5]),)),
        Delta("", [5], index=index, calls=(CallDelta(0, arguments=ARGUMENTS[5:]),)),
        Delta("", [6], "tool_calls", index, usage=Usage(11, 6, 3, 1), tool_calls=[CALL]),
    ]


class Server(requests.adapters.BaseAdapter):
    """The dialect as an adapter of requests; ``asked`` is the last request it understood."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = Ask()

    def close(self) -> None:
        pass

    def send(self, request: Any, **_: Any) -> Any:
        response = requests.Response()
        response.status_code, kind, content = self._answer(request)
        response.headers["content-type"] = kind
        response.raw = io.BytesIO(content)
        response.url, response.request = request.url, request
        return response

    def _answer(self, request: Any) -> tuple[int, str, bytes]:
        assert request.path_url == "/api/v1/services/aigc/text-generation/generation"
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            body = dialect.decode(request.body)
            self.asked = dialect.read(body, dialect.wants_stream(headers))
        except Problem as problem:
            return problem.status, "application/json", json_bytes(dialect.error_body(problem, "r1"))
        writer = Writer(Served("qwen3", "r1", 11), self.asked)
        choices = [answer(index) for index in range(self.asked.sampling.get("n", 1))]
        deltas = [choice[step] for step in range(len(choices[0])) for choice in choices]
        if not self.asked.stream:
            return 200, "application/json", json_bytes(writer.whole(joined(deltas)))
        sent = writer.begin() + writer.ping() + b"".join(map(writer.push, deltas))
        ends = writer.fail(Problem("timeout", "too slow")) if self.asked.model == "breaks" else writer.end()
        return 200, writer.media_type, sent + ends


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def call(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    session = requests.Session()
    session.mount("http://", server)
    monkeypatch.setattr(dashscope, "base_http_api_url", URL)

    def made(model: str = "qwen-turbo", **fields: Any) -> Any:
        given = {} if "prompt" in fields else {"messages": [{"role": "user", "content": "Is it warm?"}]}
        return dashscope.Generation.call(model, api_key="k", session=session, **(given | fields))

    yield made
    session.close()


def test_a_text(server: Server, call: Any) -> None:
    answered = call(prompt="hello", history=[{"user": "u", "bot": "b"}], temperature=0.5, seed=0)
    assert answered.status_code == 200 and answered.request_id == "r1"
    assert answered.output.text == "It is warm\u2028." and answered.output.finish_reason == "tool_calls"
    assert (answered.usage.input_tokens, answered.usage.output_tokens) == (11, 6)
    assert [m["content"] for m in server.asked.messages or ()] == ["u", "b", "hello"]
    assert server.asked.sampling == {"temperature": 0.5, "seed": 0, "max_tokens": None}


def test_a_message_with_calls(server: Server, call: Any) -> None:
    answered = call(result_format="message", tools=[WEATHER], n=2, enable_search=True)
    first, second = answered.output.choices
    assert first.message.content == "It is warm\u2028." and first.message.reasoning_content == "I wonder."
    assert first.message.tool_calls == second.message.tool_calls == [{"index": 0, **CALL}]
    assert answered.usage.output_tokens == 12
    assert server.asked.tools == [WEATHER] and server.asked.ignored == ("enable_search",)


def test_a_stream_says_all_so_far_or_what_is_new(call: Any) -> None:
    cumulative = list(call(stream=True, result_format="message"))
    texts = [part.output.choices[0].message.content for part in cumulative]
    assert texts == ["", "It is ", *["It is warm\u2028."] * 4]
    assert [part.output.choices[0].finish_reason for part in cumulative] == ["null"] * 5 + ["tool_calls"]
    assert cumulative[-1].output.choices[0].message.tool_calls == [{"index": 0, **CALL}]
    assert cumulative[-1].usage.total_tokens == 17
    pieces = list(call(stream=True, result_format="message", incremental_output=True))
    assert "".join(part.output.choices[0].message.content for part in pieces) == "It is warm\u2028."


def test_the_client_adds_pieces_up_itself(server: Server, call: Any) -> None:
    parts = list(call(stream=True, result_format="message", incremental_output=False))
    assert server.asked.extra.incremental  # it asks for pieces, and gives all so far
    message = parts[-1].output.choices[0].message
    assert message.content == "It is warm\u2028." and message.reasoning_content == "I wonder."
    assert message.tool_calls[0]["function"] == CALL["function"]


def test_several_choices_stream_side_by_side(call: Any) -> None:
    last: dict[int, Any] = {}
    for part in call(stream=True, result_format="message", n=2):
        for choice in part.output.choices:
            last[choice.index] = choice
    assert [last[index].message.content for index in (0, 1)] == ["It is warm\u2028."] * 2


def test_a_text_streams(call: Any) -> None:
    parts = list(call(stream=True, prompt="x"))
    assert [part.output.text for part in parts] == ["", "It is ", *["It is warm\u2028."] * 4]
    assert parts[0].output.finish_reason == "null"


def test_errors_have_codes(call: Any) -> None:
    refused = call(temperature=2.5)
    assert (refused.status_code, refused.code, refused.request_id) == (400, "InvalidParameter", "r1")
    assert "parameters.temperature" in refused.message and "[0, 2)" in refused.message
    *_, broken = call("breaks", stream=True)
    assert (broken.status_code, broken.code, broken.message) == (504, "RequestTimeOut", "too slow")
