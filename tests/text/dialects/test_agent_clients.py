"""The `anthropic` and `openai` packages read what is written for them, and what they send is understood."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from qwenrt.outputs import CallDelta, Delta, Generation, Usage
from qwenrt.text.dialects import anthropic as messages
from qwenrt.text.dialects import openai_responses as responses
from qwenrt.text.dialects.answers import Served, json_bytes
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.agent_turns import THOUGHTS

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "杭州"}'}}
ANSWER = [
    Delta("", [1], reasoning="I wonder."),
    Delta("It is ", [2]),
    Delta("warm.", [3]),
    Delta("", [4], calls=(CallDelta(0, "call_1", "weather", '{"city": '),)),
    Delta("", [5], calls=(CallDelta(0, arguments='"杭州"}'),)),
    Delta("", [6], "tool_calls", tool_calls=[CALL], usage=Usage(11, 6, 4, 1)),
]
WHOLE = Generation(
    "It is warm.",
    [1],
    "tool_calls",
    Usage(11, 6, 4, 1),
    message={"content": "It is warm.", "reasoning_content": "I wonder.", "tool_calls": [CALL]},
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def transport(package: Any, answer: Callable[[bytes], tuple[int, str, bytes]]) -> Any:
    """An HTTP client of the library that the package uses, with a server behind it that opens no connection."""
    classes = package.DefaultHttpxClient.__mro__
    name = next(one.__module__.partition(".")[0] for one in classes if one.__module__.startswith("httpx"))
    httpx = importlib.import_module(name)

    def respond(request: Any) -> Any:
        status, kind, body = answer(request.content)
        return httpx.Response(status, headers={"content-type": kind}, content=body)

    return httpx.Client(transport=httpx.MockTransport(respond))


def served(dialect: Any) -> Callable[[bytes], tuple[int, str, bytes]]:
    """A server without a model: it writes ANSWER."""

    def answer(body: bytes) -> tuple[int, str, bytes]:
        try:
            ask = dialect.read(dialect.decode(body), THOUGHTS)
        except Problem as problem:
            return problem.status, "application/json", json_bytes(dialect.error_body(problem))
        writer = dialect.Writer(Served("qwen", "req_1", 11), ask)
        if not ask.stream:
            return 200, "application/json", json_bytes(writer.whole([WHOLE]))
        return 200, writer.media_type, b"".join([writer.begin(), *map(writer.push, ANSWER), writer.end()])

    return answer


@pytest.fixture
def claude() -> Any:
    anthropic = pytest.importorskip("anthropic")
    http = transport(anthropic, served(messages))
    return anthropic.Anthropic(api_key="k", base_url="http://local", http_client=http, max_retries=0)


@pytest.fixture
def openai_client() -> Any:
    openai = pytest.importorskip("openai")
    http = transport(openai, served(responses))
    return openai.OpenAI(api_key="k", base_url="http://local/v1", http_client=http, max_retries=0)


CLAUDE: dict[str, Any] = {
    "model": "claude-x",
    "max_tokens": 4000,
    "thinking": {"type": "enabled", "budget_tokens": 2000},
    "tools": [{"name": "weather", "input_schema": SCHEMA}],
}


@pytest.mark.parametrize("stream", [False, True])
def test_the_anthropic_client(claude: Any, stream: bool) -> None:
    history: list[Any] = [{"role": "user", "content": "How is it in 杭州?"}]
    if stream:
        with claude.messages.stream(messages=history, **CLAUDE) as events:
            assert "".join(events.text_stream) == "It is warm."
            message = events.get_final_message()
    else:
        message = claude.messages.create(messages=history, **CLAUDE)
    thought, text, call = message.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "I wonder.", "It is warm.")
    assert (call.name, call.input) == ("weather", {"city": "杭州"})
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (7, 4)
    history.append({"role": "assistant", "content": [block.model_dump() for block in message.content]})
    history.append(
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "20"}]}
    )
    ask = messages.read(messages.decode(json_bytes({**CLAUDE, "messages": history})), THOUGHTS)
    assert ask.messages is not None
    assert ask.messages[1]["content"] == "It is warm." and ask.messages[1]["reasoning_content"] == "I wonder."
    assert ask.messages[1]["tool_calls"][0]["function"] == CALL["function"]
    assert ask.messages[2]["content"] == "20"


def test_the_anthropic_clients_errors(claude: Any) -> None:
    anthropic = pytest.importorskip("anthropic")
    with pytest.raises(anthropic.BadRequestError, match="messages: an empty list"):
        claude.messages.create(messages=[], **CLAUDE)


OPENAI: dict[str, Any] = {
    "model": "gpt-x",
    "include": ["reasoning.encrypted_content"],
    "store": False,
    "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}],
}


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client(openai_client: Any, stream: bool) -> None:
    history: list[Any] = [{"role": "user", "content": "How is it in 杭州?"}]
    if stream:
        with openai_client.responses.stream(input=history, **OPENAI) as events:
            said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            assert said == "It is warm."
            response = events.get_final_response()
    else:
        response = openai_client.responses.create(input=history, **OPENAI)
    assert response.output_text == "It is warm." and response.status == "completed"
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    call = response.output[2]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "杭州"})
    assert response.usage.input_tokens == 11 and response.usage.input_tokens_details.cached_tokens == 4
    history += [item.model_dump(exclude_none=True) for item in response.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "20"})
    ask = responses.read(responses.decode(json_bytes({**OPENAI, "input": history})), THOUGHTS)
    assert ask.messages is not None
    assert ask.messages[1]["content"] == "It is warm." and ask.messages[1]["reasoning_content"] == "I wonder."
    assert ask.messages[1]["tool_calls"] == [CALL]
    assert ask.messages[2]["content"] == "20"


def test_the_openai_clients_errors(openai_client: Any) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as raised:
        openai_client.responses.create(input=[], **OPENAI)
    assert raised.value.param == "input" and raised.value.code == "invalid_value"
