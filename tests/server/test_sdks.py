"""The vendors' own packages as users of the server: `openai`, `anthropic`, `ollama`, `dashscope`, whole and async.

They speak over a socket, with a key, to a model that writes what tests/server/assistant.py says.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

import qwenrt
from qwenrt.server import app
from qwenrt.server.settings import ServeSettings
from tests.server.assistant import THOUGHT, WARM, assistant
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving, serving, until

KEY = "key-of-these-tests"
QUESTION = "How is it? 你好"
SAID = f"You said: {QUESTION}"
USER: list[Any] = [{"role": "user", "content": QUESTION}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in 杭州 and Paris?"}]
JSON: list[Any] = [{"role": "user", "content": "As JSON, please."}]
LONG: list[Any] = [{"role": "user", "content": "Something long."}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: dict[str, Any] = {"name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS}
CITIES = [{"city": "杭州"}, {"city": "Paris"}]
AFTER_TOOLS = "They say: 21 degrees; rain"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(assistant, max_model_len=8192, max_num_seqs=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM) -> Iterator[Serving]:
    settings = ServeSettings(port=0, drain=0, max_queue=0, api_keys=(KEY,))  # type: ignore[arg-type]
    application = app(llm, settings)
    with serving(application, settings, hooks=application.hooks(lambda: None)) as running:
        yield running


@pytest.fixture(scope="module")
def weather_model() -> Any:
    pydantic = pytest.importorskip("pydantic")
    return pydantic.create_model("Weather", city=(str, ...), degrees=(int, ...))


# ---- openai


@pytest.fixture(scope="module")
def openai(served: Serving) -> Any:
    package = pytest.importorskip("openai", minversion="3")
    with package.OpenAI(api_key=KEY, base_url=served.url + "/v1", max_retries=0) as client:
        yield client


def openai_tools() -> list[Any]:
    return [{"type": "function", "function": FUNCTION}]


def test_openai_chat(openai: Any) -> None:
    answer = openai.chat.completions.create(model="gpt-5", messages=USER, seed=1, user="u")
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == (SAID, "stop")
    assert choice.message.reasoning_content.strip() == THOUGHT
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 20
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    again = openai.chat.completions.create(model="gpt-5", messages=USER)
    assert again.usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens // 2
    two = openai.chat.completions.create(model="gpt-5", messages=USER, n=2, reasoning_effort="none")
    assert [one.message.content for one in two.choices] == [SAID, SAID]


def test_openai_chat_stream(openai: Any) -> None:
    options = {"include_usage": True}
    chunks = list(
        openai.chat.completions.create(model="m", messages=USER, stream=True, stream_options=options)
    )
    pieces = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(piece.content or "" for piece in pieces) == SAID
    thought = "".join(getattr(piece, "reasoning_content", None) or "" for piece in pieces)
    assert thought.strip() == THOUGHT and len(pieces) > 10
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens > 10


def test_openai_tools_whole_and_streamed(openai: Any) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": WEATHER, "tools": openai_tools()}
    whole = openai.chat.completions.create(**asked).choices[0]
    with openai.chat.completions.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert kinds.count("tool_calls.function.arguments.delta") > 4
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
        calls = choice.message.tool_calls
        assert [json.loads(call.function.arguments) for call in calls] == CITIES
        assert [call.function.name for call in calls] == ["weather"] * 2
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": text}
            for call, text in zip(calls, ("21 degrees", "rain"), strict=True)
        ]
        said = choice.message.model_dump(exclude_none=True)
        after = openai.chat.completions.create(**asked | {"messages": [*WEATHER, said, *results]})
        assert after.choices[0].message.content == AFTER_TOOLS


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_openai_tools_that_must_be_called(openai: Any, choice: Any) -> None:
    asked = {"model": "m", "messages": WEATHER, "tools": openai_tools(), "tool_choice": choice}
    answer = openai.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    [call] = answer.message.tool_calls
    assert json.loads(call.function.arguments) == CITIES[0]


def test_openai_parse(openai: Any, weather_model: Any) -> None:
    answer = openai.chat.completions.parse(model="m", messages=JSON, response_format=weather_model)
    assert answer.choices[0].message.parsed.model_dump() == WARM
    response = openai.responses.parse(model="m", input=JSON, text_format=weather_model)
    assert response.output_parsed.model_dump() == WARM
    with openai.chat.completions.stream(model="m", messages=JSON, response_format=weather_model) as stream:
        assert stream.get_final_completion().choices[0].message.parsed.model_dump() == WARM


def test_openai_parse_of_a_strict_tool(openai: Any) -> None:
    package, pydantic = pytest.importorskip("openai"), pytest.importorskip("pydantic")
    model = pydantic.create_model("weather", city=(str, ...))
    answer = openai.chat.completions.parse(
        model="m", messages=WEATHER, tools=[package.pydantic_function_tool(model)]
    )
    parsed = [call.function.parsed_arguments for call in answer.choices[0].message.tool_calls]
    assert [one.model_dump() for one in parsed] == CITIES


def test_openai_completions(openai: Any) -> None:
    answer = openai.completions.create(model="m", prompt=["one long", "two long"], max_tokens=8, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.finish_reason == "length" and len(choice.logprobs.tokens) == 8
    stream = openai.completions.create(model="m", prompt="one long", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def response_tools() -> list[Any]:
    return [{"type": "function", **FUNCTION, "strict": False}]


def test_openai_responses_go_on_from_each_other(openai: Any) -> None:
    first = openai.responses.create(model="m", input=QUESTION)
    assert first.output_text == SAID and first.status == "completed"
    assert [item.type for item in first.output] == ["reasoning", "message"]
    counted = openai.responses.input_tokens.count(model="m", input=QUESTION)
    assert counted.input_tokens == first.usage.input_tokens
    second = openai.responses.create(model="m", input="And now?", previous_response_id=first.id)
    assert second.output_text == "You said: And now?"
    assert second.usage.input_tokens > first.usage.input_tokens + 20
    assert openai.responses.retrieve(first.id).output_text == SAID
    openai.responses.delete(first.id)
    package = pytest.importorskip("openai")
    with pytest.raises(package.NotFoundError):
        openai.responses.create(model="m", input="And now?", previous_response_id=first.id)


def test_openai_responses_stream_with_tools_and_thoughts(openai: Any) -> None:
    asked = {
        "model": "m",
        "tools": response_tools(),
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "medium", "summary": "auto"},
    }
    history: list[Any] = [*WEATHER]
    with openai.responses.stream(input=history, **asked) as stream:
        events = list(stream)
        response = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert [item.type for item in response.output] == ["reasoning", "message", *["function_call"] * 2]
    assert response.output[0].summary[0].text.strip() == THOUGHT and response.output[0].encrypted_content
    calls = response.output[2:]
    assert [json.loads(call.arguments) for call in calls] == CITIES
    history += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in response.output]
    history += [
        {"type": "function_call_output", "call_id": call.call_id, "output": text}
        for call, text in zip(calls, ("21 degrees", "rain"), strict=True)
    ]
    after = openai.responses.create(input=history, **asked)
    assert after.output_text == AFTER_TOOLS
    cached = after.usage.input_tokens_details.cached_tokens
    assert cached > response.usage.input_tokens + response.usage.output_tokens - 40
    told = openai.responses.input_tokens.count(
        model="m", input=[one for one in history if one.get("type") != "reasoning"], tools=asked["tools"]
    )
    assert told.input_tokens < after.usage.input_tokens  # the thought came back, and is part of the prompt


def test_openai_embeddings(openai: Any) -> None:
    texts = ["one", "two and three"]
    packed = openai.embeddings.create(model="m", input=texts)  # the client asks for base64
    plain = openai.embeddings.create(model="m", input=texts, encoding_format="float")
    assert [one.index for one in packed.data] == [0, 1]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert len(one.embedding) == 8 and one.embedding == pytest.approx(other.embedding)
    assert packed.usage.prompt_tokens == plain.usage.prompt_tokens > 0


def test_openai_models(openai: Any, llm: qwenrt.LLM) -> None:
    [model] = openai.models.list().data
    assert model.id == "scripted-qwen3" and str(llm.name).endswith(model.id)  # never the path that it lies at
    assert model.owned_by and openai.models.retrieve(model.id).id == model.id
    package = pytest.importorskip("openai")
    with pytest.raises(package.NotFoundError) as raised:
        openai.models.retrieve("gpt-5")
    assert raised.value.code == "model_not_found"


def test_openai_errors(openai: Any) -> None:
    package = pytest.importorskip("openai")
    with pytest.raises(package.BadRequestError) as raised:
        openai.chat.completions.create(model="m", messages=USER, temperature=-1)
    assert raised.value.param == "temperature" and raised.value.request_id
    with pytest.raises(package.BadRequestError) as raised:
        openai.chat.completions.create(model="m", messages=USER, n="two")
    assert raised.value.param == "n"
    with pytest.raises(package.BadRequestError) as raised:
        openai.responses.create(model="m", input=QUESTION + " word" * 20000)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(package.AuthenticationError):
        openai.with_options(api_key="another").models.list()


def test_a_full_server_is_a_rate_limit(openai: Any, served: Serving, llm: qwenrt.LLM) -> None:
    package, claude = pytest.importorskip("openai"), pytest.importorskip("anthropic")
    streams = [openai.chat.completions.create(model="m", messages=LONG, stream=True) for _ in range(4)]
    with pytest.raises(package.RateLimitError) as raised:
        openai.chat.completions.create(model="m", messages=USER)
    assert raised.value.code == "rate_limit_exceeded"
    assert int(raised.value.response.headers["retry-after"]) >= 1
    with (
        claude.Anthropic(auth_token=KEY, base_url=served.url, max_retries=0) as client,
        pytest.raises(claude.RateLimitError),
    ):
        client.messages.create(model="m", max_tokens=9, messages=USER)
    for stream in streams:
        stream.close()
    until(lambda: llm.stats()["running"] == 0)  # whoever stops reading stops the engine


def test_openai_async(served: Serving) -> None:
    package = pytest.importorskip("openai", minversion="3")

    async def chat(client: Any) -> str:
        stream = await client.chat.completions.create(model="m", messages=USER, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def respond(client: Any) -> str:
        async with client.responses.stream(model="m", input=QUESTION) as stream:
            return str((await stream.get_final_response()).output_text)

    async def both() -> list[str]:
        async with package.AsyncOpenAI(api_key=KEY, base_url=served.url + "/v1", max_retries=0) as client:
            return await asyncio.gather(chat(client), respond(client))

    assert asyncio.run(both()) == [SAID, SAID]


# ---- anthropic


@pytest.fixture(scope="module")
def claude(served: Serving) -> Any:
    package = pytest.importorskip("anthropic")
    with package.Anthropic(api_key=KEY, base_url=served.url, max_retries=0) as client:
        yield client


CLAUDE: dict[str, Any] = {"model": "claude-opus-4-8", "max_tokens": 4000}
THINKING = {"type": "enabled", "budget_tokens": 2000}
CLAUDE_TOOLS = [{"name": "weather", "description": "Tells the weather.", "input_schema": PARAMETERS}]


def test_anthropic_messages(claude: Any) -> None:
    message = claude.messages.create(messages=USER, system="Be brief.", **CLAUDE)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == SAID and message.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model="m", messages=USER, system="Be brief.")
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    cut = claude.messages.create(messages=LONG, **CLAUDE | {"max_tokens": 5})
    assert cut.stop_reason == "max_tokens"
    stopped = claude.messages.create(messages=USER, stop_sequences=["said"], **CLAUDE)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "said")


def test_anthropic_streams_thoughts_and_tools(claude: Any) -> None:
    asked = CLAUDE | {"tools": CLAUDE_TOOLS, "thinking": THINKING}
    with claude.messages.stream(messages=WEATHER, **asked) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_message()
    assert {"thinking", "signature", "text", "input_json", "content_block_stop", "message_stop"} <= kinds
    thought, text, *calls = message.content
    assert thought.thinking.strip() == THOUGHT and thought.signature and text.text == "I look."
    assert [call.input for call in calls] == CITIES and message.stop_reason == "tool_use"
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": text}
        for call, text in zip(calls, ("21 degrees", "rain"), strict=True)
    ]
    said = {"role": "assistant", "content": [block.to_dict() for block in message.content]}
    history = [*WEATHER, said, {"role": "user", "content": results}]
    after = claude.messages.create(messages=history, **asked)
    assert after.content[-1].text == AFTER_TOOLS
    assert after.usage.cache_read_input_tokens > message.usage.output_tokens
    counted = claude.messages.count_tokens(model="m", messages=history, tools=CLAUDE_TOOLS, thinking=THINKING)
    assert counted.input_tokens == after.usage.input_tokens + after.usage.cache_read_input_tokens


def test_anthropic_parse(claude: Any, weather_model: Any) -> None:
    parsed = claude.messages.parse(messages=JSON, output_format=weather_model, **CLAUDE)
    assert parsed.parsed_output.model_dump() == WARM


def test_anthropics_tool_runner(claude: Any) -> None:
    """It asks the server to hold the conversation, and holds it itself where that is refused in words it knows."""
    package = pytest.importorskip("anthropic")
    asked = []

    @package.beta_tool(name="weather", description="Tells the weather.", input_schema=PARAMETERS)  # type: ignore[untyped-decorator]
    def weather(city: str) -> str:
        asked.append(city)
        return {"杭州": "21 degrees", "Paris": "rain"}[city]

    runner = claude.beta.messages.tool_runner(messages=WEATHER, tools=[weather], **CLAUDE)
    assert runner.until_done().content[-1].text == AFTER_TOOLS and asked == ["杭州", "Paris"]


def test_anthropic_models_and_errors(claude: Any) -> None:
    package = pytest.importorskip("anthropic")
    [model] = claude.models.list().data
    assert (model.id, model.type) == ("scripted-qwen3", "model") and model.display_name
    assert claude.models.retrieve(model.id).created_at.year > 2000
    with pytest.raises(package.BadRequestError, match="messages"):
        claude.messages.create(messages=[], **CLAUDE)
    with pytest.raises(package.BadRequestError, match=r"prompt is too long: \d+ tokens > 8192 maximum"):
        claude.messages.create(messages=[{"role": "user", "content": "word " * 20000}], **CLAUDE)
    with pytest.raises(package.AuthenticationError):
        claude.with_options(api_key="another").models.list()


def test_anthropic_async(served: Serving) -> None:
    package = pytest.importorskip("anthropic")

    async def ask() -> str:
        async with (
            package.AsyncAnthropic(auth_token=KEY, base_url=served.url, max_retries=0) as client,
            client.messages.stream(messages=USER, **CLAUDE) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == SAID


# ---- ollama


@pytest.fixture(scope="module")
def ollama(served: Serving) -> Any:
    package = pytest.importorskip("ollama")
    return package.Client(served.url, headers={"Authorization": f"Bearer {KEY}"})


def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: where
    """
    return city


def test_ollama_chat(ollama: Any) -> None:
    answer = ollama.chat("qwen3", USER, think=True)
    assert answer.message.content == SAID and answer.message.thinking.strip() == THOUGHT
    assert answer.done_reason == "stop" and answer.eval_count > 10 and answer.total_duration > 0
    parts = list(ollama.chat("qwen3", USER, think=False, stream=True))
    assert "".join(part.message.content for part in parts) == SAID and len(parts) > 5
    assert parts[-1].done and not any(part.message.thinking for part in parts)
    assert ollama.generate("qwen3", QUESTION, think=False, keep_alive="5m").response == SAID


def test_ollama_tools(ollama: Any) -> None:
    parts = list(ollama.chat("qwen3", WEATHER, tools=[weather], stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", city) for city in CITIES
    ]
    said = ollama.chat("qwen3", WEATHER, tools=[weather]).message
    results = [{"role": "tool", "tool_name": "weather", "content": text} for text in ("21 degrees", "rain")]
    after = ollama.chat("qwen3", [*WEATHER, said, *results], tools=[weather])
    assert after.message.content == AFTER_TOOLS


def test_ollama_formats(ollama: Any) -> None:
    for form in (SCHEMA, "json"):
        answer = ollama.chat("qwen3", JSON, format=form, options={"temperature": 0, "num_predict": 200})
        assert json.loads(answer.message.content) == WARM


def test_ollama_models_and_vectors(ollama: Any) -> None:
    assert [model.model for model in ollama.list().models] == ["scripted-qwen3"]
    assert ollama.ps().models[0].context_length == 8192
    shown = ollama.show("scripted-qwen3")
    assert {"completion", "tools", "thinking"} <= set(shown.capabilities)
    assert [len(vector) for vector in ollama.embed("m", ["one", "two"]).embeddings] == [8, 8]
    assert len(ollama.embeddings("m", "one").embedding) == 8


def test_ollama_errors(ollama: Any) -> None:
    package = pytest.importorskip("ollama")
    with pytest.raises(package.ResponseError) as raised:
        ollama.chat("qwen3", USER, options={"num_ctx": 100_000})
    assert raised.value.status_code == 400 and "num_ctx" in raised.value.error
    with pytest.raises(package.ResponseError) as raised:
        ollama.pull("qwen3")
    assert raised.value.status_code == 501


def test_ollama_async(served: Serving) -> None:
    package = pytest.importorskip("ollama")

    async def ask() -> str:
        client = package.AsyncClient(served.url, headers={"Authorization": f"Bearer {KEY}"})
        parts = await client.chat("qwen3", USER, stream=True)
        return "".join([part.message.content async for part in parts])

    assert asyncio.run(ask()) == SAID


# ---- dashscope


@pytest.fixture
def dashscope(served: Serving, monkeypatch: pytest.MonkeyPatch) -> Any:
    package = pytest.importorskip("dashscope")
    monkeypatch.setattr(package, "base_http_api_url", served.url + "/api/v1")
    return package


DASHSCOPE: dict[str, Any] = {"api_key": KEY, "result_format": "message"}


def test_dashscope_generation(dashscope: Any) -> None:
    call = dashscope.Generation.call
    answer = call("qwen-turbo", messages=USER, enable_thinking=True, **DASHSCOPE)
    message = answer.output.choices[0].message
    assert message.content == SAID and message.reasoning_content.strip() == THOUGHT
    assert answer.usage.output_tokens > 10 and answer.request_id
    assert call("qwen-turbo", prompt=QUESTION, api_key=KEY, enable_thinking=False).output.text == SAID
    parts = list(call("qwen-turbo", messages=USER, stream=True, incremental_output=True, **DASHSCOPE))
    assert "".join(part.output.choices[0].message.content for part in parts) == SAID
    whole = list(call("qwen-turbo", messages=USER, stream=True, **DASHSCOPE))
    assert whole[-1].output.choices[0].message.content == SAID and len(whole) > 5


def test_dashscope_tools(dashscope: Any) -> None:
    asked = {"tools": openai_tools(), **DASHSCOPE}
    whole = dashscope.Generation.call("qwen-plus", messages=WEATHER, **asked)
    parts = list(dashscope.Generation.call("qwen-plus", messages=WEATHER, stream=True, **asked))
    for answer in (whole, parts[-1]):
        message = answer.output.choices[0].message
        calls = message.tool_calls
        assert [json.loads(call["function"]["arguments"]) for call in calls] == CITIES
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": text}
            for call, text in zip(calls, ("21 degrees", "rain"), strict=True)
        ]
        after = dashscope.Generation.call("qwen-plus", messages=[*WEATHER, message, *results], **asked)
        assert after.output.choices[0].message.content == AFTER_TOOLS


def test_dashscope_errors(dashscope: Any) -> None:
    refused = dashscope.Generation.call("qwen-turbo", messages=USER, temperature=2.5, **DASHSCOPE)
    assert (refused.status_code, refused.code) == (400, "InvalidParameter") and refused.request_id
    denied = dashscope.Generation.call("qwen-turbo", messages=USER, api_key="another")
    assert (denied.status_code, denied.code) == (401, "InvalidApiKey")


def test_dashscope_async(dashscope: Any) -> None:
    async def ask() -> str:
        answer = await dashscope.AioGeneration.call("qwen-turbo", messages=USER, **DASHSCOPE)
        return str(answer.output.choices[0].message.content)

    assert asyncio.run(ask()) == SAID
