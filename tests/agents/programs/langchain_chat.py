"""langchain-openai: chats, calls, structure, vectors, over chat completions and over responses."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

SAID = "You said: How is it?"


class Weather(BaseModel):
    """What the weather is."""

    city: str
    degrees: int


@tool
def weather(city: str) -> str:
    """Tells the weather."""
    return f"21 degrees in {city}"


def model(**fields: Any) -> ChatOpenAI:
    return ChatOpenAI(model="qwen", base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0, **fields)


def chat() -> None:
    answer = model(temperature=0).invoke("How is it?")
    assert answer.content == SAID and answer.usage_metadata["output_tokens"] > 5
    pieces = list(model(stream_usage=True).stream("How is it?"))
    assert "".join(piece.content for piece in pieces) == SAID and len(pieces) > 5
    assert [one.content for one in model().batch(["How is it?", "How is it?"])] == [SAID, SAID]
    assert asyncio.run(model().ainvoke("How is it?")).content == SAID


def tools() -> None:
    bound = model().bind_tools([weather])
    history: list[Any] = [HumanMessage("What is the weather in 杭州?")]
    answer = bound.invoke(history)
    pieces = list(bound.stream(history))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    for message in (answer, whole):
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [
            ("weather", {"city": "杭州"})
        ]
    results = [
        ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls
    ]
    assert bound.invoke([*history, answer, *results]).content == "They say: 21 degrees in 杭州"
    forced = model().bind_tools([weather], tool_choice="weather").invoke(history)
    assert forced.tool_calls[0]["args"] == {"city": "杭州"}


def structure() -> None:
    for method in ("json_schema", "json_mode", "function_calling"):
        made = model().with_structured_output(Weather, method=method).invoke("As JSON, please.")
        assert made == Weather(city="杭州", degrees=21), (method, made)


def responses() -> None:
    answer = model(use_responses_api=True).invoke("How is it?")
    assert answer.text == SAID
    bound = model(use_responses_api=True).bind_tools([weather])
    history: list[Any] = [HumanMessage("What is the weather in 杭州?")]
    called = bound.invoke(history)
    assert called.tool_calls[0]["args"] == {"city": "杭州"}
    result = ToolMessage("21 degrees", tool_call_id=called.tool_calls[0]["id"])
    assert bound.invoke([*history, called, result]).text == "They say: 21 degrees"
    assert "".join(piece.text for piece in model(use_responses_api=True).stream("How is it?")) == SAID


def vectors() -> None:
    """With its own way of sending ids of another vocabulary turned off."""
    made = OpenAIEmbeddings(
        model="m", base_url=sys.argv[1] + "/v1", api_key="none", check_embedding_ctx_length=False
    )
    assert [len(vector) for vector in made.embed_documents(["one", "two"])] == [8, 8]
    assert len(made.embed_query("one")) == 8


if __name__ == "__main__":
    for name in sys.argv[2:]:
        globals()[name]()
