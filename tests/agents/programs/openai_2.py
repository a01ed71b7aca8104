"""openai 2: chats, calls, structure, responses, vectors."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai
import pydantic

USER: list[Any] = [{"role": "user", "content": "How is it?"}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in 杭州?"}]
JSON: list[Any] = [{"role": "user", "content": "As JSON, please."}]
SAID = "You said: How is it?"


class Weather(pydantic.BaseModel):
    city: str
    degrees: int


class weather(pydantic.BaseModel):
    city: str


def client() -> Any:
    return openai.OpenAI(api_key="none", base_url=sys.argv[1] + "/v1", max_retries=0)


def chat() -> None:
    answer = client().chat.completions.create(model="m", messages=USER)
    assert answer.choices[0].message.content == SAID and answer.usage.completion_tokens > 5
    chunks = client().chat.completions.create(model="m", messages=USER, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID


def tools() -> None:
    asked = {"model": "m", "tools": [openai.pydantic_function_tool(weather)]}
    with client().chat.completions.stream(messages=WEATHER, **asked) as stream:
        message = stream.get_final_completion().choices[0].message
    [call] = message.tool_calls
    assert call.function.parsed_arguments == weather(city="杭州")
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    history = [*WEATHER, message.model_dump(exclude_none=True, exclude={"parsed"}), result]
    after = client().chat.completions.create(messages=history, **asked)
    assert after.choices[0].message.content == "They say: 21 degrees"


def structure() -> None:
    answer = client().chat.completions.parse(model="m", messages=JSON, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="杭州", degrees=21)
    parsed = client().responses.parse(model="m", input=JSON, text_format=Weather)
    assert parsed.output_parsed == Weather(city="杭州", degrees=21)


def responses() -> None:
    first = client().responses.create(model="m", input="How is it?")
    assert first.output_text == SAID
    with client().responses.stream(
        model="m", input="And now?", previous_response_id=first.id, include=["reasoning.encrypted_content"]
    ) as stream:
        response = stream.get_final_response()
    assert response.output_text == "You said: And now?" and response.output[0].encrypted_content
    tool = {"type": "function", "name": "weather", "parameters": weather.model_json_schema(), "strict": False}
    called = client().responses.create(model="m", input=WEATHER, tools=[tool])
    assert json.loads(called.output[-1].arguments) == {"city": "杭州"}


def vectors_and_models() -> None:
    [vector] = client().embeddings.create(model="m", input="one").data
    assert len(vector.embedding) == 8 and client().models.list().data[0].id == "scripted-qwen3"


def errors() -> None:
    try:
        client().chat.completions.create(model="m", messages=USER, top_p=7)
    except openai.BadRequestError as error:
        assert error.param == "top_p"
    else:
        raise AssertionError("a top_p of seven was taken")


def whole_and_async() -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(api_key="none", base_url=sys.argv[1] + "/v1") as one:
            chunks = await one.chat.completions.create(model="m", messages=USER, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    assert asyncio.run(ask()) == SAID


if __name__ == "__main__":
    for name in sys.argv[2:]:
        globals()[name]()
