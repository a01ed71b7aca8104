"""litellm on all four dialects: the same chat, call and structure by each of its routes that this server serves."""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from typing import Any

import litellm

ROUTES = {
    "openai": ("openai/gpt-5", "/v1"),
    "hosted_vllm": ("hosted_vllm/qwen", "/v1"),
    "responses": ("openai/responses/gpt-5", "/v1"),
    "anthropic": ("anthropic/claude-unknown", ""),
    "ollama_chat": ("ollama_chat/qwen", ""),
    "ollama": ("ollama/qwen", ""),
    "dashscope": ("dashscope/qwen-turbo", "/compatible-mode/v1"),
}
USER: list[Any] = [{"role": "user", "content": "How is it?"}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in 杭州?"}]
JSON: list[Any] = [{"role": "user", "content": "As JSON, please."}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}


def where(route: str) -> dict[str, Any]:
    model, base = ROUTES[route]
    return {"model": model, "api_base": sys.argv[1] + base, "api_key": "none", "num_retries": 0}


def said(text: str) -> bool:
    """Whether the answer is the one to the question, which the oldest route puts into a form of its own."""
    return text.startswith("You said: ") and text.strip().endswith("How is it?")


def chat(route: str) -> None:
    answer = litellm.completion(messages=USER, **where(route))
    assert said(answer.choices[0].message.content), answer
    assert answer.usage.completion_tokens > 5


def stream(route: str) -> None:
    pieces = litellm.completion(messages=USER, stream=True, **where(route))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert said(text), text


def whole_and_async(route: str) -> None:
    answer = asyncio.run(litellm.acompletion(messages=USER, **where(route)))
    assert said(answer.choices[0].message.content)


def tools(route: str) -> None:
    asked = {"tools": [{"type": "function", "function": FUNCTION}], **where(route)}
    message = litellm.completion(messages=WEATHER, **asked).choices[0].message
    [call] = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "杭州"})
    result = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "21 degrees"}
    after = litellm.completion(messages=[*WEATHER, message.model_dump(), result], **asked)
    assert after.choices[0].message.content.strip() == "They say: 21 degrees", after


def tools_stream(route: str) -> None:
    asked = {"tools": [{"type": "function", "function": FUNCTION}], **where(route)}
    chunks = list(litellm.completion(messages=WEATHER, stream=True, **asked))
    built = litellm.stream_chunk_builder(chunks, messages=WEATHER)
    [call] = built.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "杭州"})


def structure(route: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    answer = litellm.completion(messages=JSON, response_format=form, **where(route))
    assert json.loads(answer.choices[0].message.content) == {"city": "杭州", "degrees": 21}, answer


def vectors(route: str) -> None:
    [one] = litellm.embedding(input=["one"], **where(route)).data
    assert len(one["embedding"]) == 8


def errors(route: str) -> None:
    try:
        litellm.completion(messages=[{"role": "user", "content": "word " * 200_000}], **where(route))
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("a prompt that does not fit was taken")


if __name__ == "__main__":
    failed = []
    for name in sys.argv[3:]:
        try:
            globals()[name](sys.argv[2])
        except Exception:  # all are tried: importing the package takes most of the time
            traceback.print_exc()
            failed.append(name)
    sys.exit(f"failed: {failed}" if failed else 0)
