"""openai 0.28, as the scripts of Qwen-1's time use it."""

from __future__ import annotations

import sys
from typing import Any

import openai

FUNCTION = {
    "name_for_human": "weather",
    "name_for_model": "weather",
    "name": "weather",
    "description_for_model": "Tells the weather. Format the arguments as a JSON object.",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "where"}},
        "required": ["city"],
    },
}
ASKED: list[Any] = [{"role": "user", "content": "What is the weather in 杭州?"}]
FORM = """Answer the following questions as best you can. You have access to the following APIs:

weather: Call this tool to interact with the weather API. What is the weather API useful for? Tells the weather.

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [weather]
Action Input: the input to the action
Observation: the result of the action
Final Answer: the final answer to the original input question

Begin!

Question: What is the weather in 杭州?"""


def create(**fields: Any) -> Any:
    return openai.ChatCompletion.create(model="Qwen", **fields)


def chat() -> None:
    answer = create(messages=[{"role": "user", "content": "你好"}], stream=False, stop=[])
    assert answer.choices[0].message.content == "You said: 你好"
    assert answer.choices[0].finish_reason == "stop"


def stream() -> None:
    chunks = list(create(messages=[{"role": "user", "content": "你好"}], stream=True))
    text = "".join(getattr(chunk.choices[0].delta, "content", None) or "" for chunk in chunks)
    assert text == "You said: 你好" and chunks[-1].choices[0].finish_reason == "stop"


def functions() -> None:
    """A call, its result by the role that there was then, and what is said to it."""
    answer = create(messages=ASKED, functions=[FUNCTION]).choices[0]
    call = answer.message.function_call
    assert (call.name, call.arguments) == ("weather", '{"city": "杭州"}'), call
    assert answer.finish_reason == "function_call"
    said = {"role": "assistant", "content": answer.message.content, "function_call": call.to_dict()}
    result = {"role": "function", "name": "weather", "content": "21 degrees"}
    after = create(messages=[*ASKED, said, result], functions=[FUNCTION]).choices[0]
    assert after.message.content == "They say: 21 degrees" and after.finish_reason == "stop"


def functions_stream() -> None:
    name, arguments, reasons = "", "", []
    for chunk in create(messages=ASKED, functions=[FUNCTION], stream=True):
        choice = chunk.choices[0]
        piece = choice.delta.get("function_call") or {}
        name, arguments = name + piece.get("name", ""), arguments + piece.get("arguments", "")
        reasons.append(choice.finish_reason)
    assert (name, arguments, reasons[-1]) == ("weather", '{"city": "杭州"}', "function_call")


def observation() -> None:
    """The form written by hand, and stopped where the tool is to answer."""
    asked = [{"role": "user", "content": FORM}]
    answer = create(messages=asked, stop=["Observation:"]).choices[0].message.content
    assert answer.endswith('Action: weather\nAction Input: {"city": "杭州"}\n'), answer
    told = [*asked, {"role": "assistant", "content": answer.rstrip() + "\nObservation: 21 degrees\nThought:"}]
    after = create(messages=told, stop=["Observation:"]).choices[0].message.content
    assert after.endswith("Final Answer: They say: 21 degrees"), repr(after)


def errors() -> None:
    try:
        create(messages=ASKED, temperature=-1)
    except openai.error.InvalidRequestError as error:
        assert error.param == "temperature" and error.http_status == 400
    else:
        raise AssertionError("a temperature below zero was taken")


def models_and_vectors() -> None:
    [model] = openai.Model.list().data
    assert openai.Model.retrieve(model.id).id == model.id
    [vector] = openai.Embedding.create(model="m", input="one", encoding_format="float").data
    assert len(vector.embedding) == 8


if __name__ == "__main__":
    openai.api_base, openai.api_key = sys.argv[1] + "/v1", "none"
    for name in sys.argv[2:]:
        globals()[name]()
