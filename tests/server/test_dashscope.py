"""DashScope's own dialect over a socket, and its compatible one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

import qwenrt
from tests.server.asking import DASHSCOPE, ask, chat, dashscope, events, serve
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
PROMPTS: list[str] = []
SSE = {"x_dashscope_sse": "enable"}


def reply(prompt: str) -> str:
    PROMPTS.append(prompt)
    said = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    if "weather" in said:
        return '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    return "All is fine." if prompt.endswith("</think>\n\n") else "<think>\nhm\n</think>\n\nAll is fine."


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(reply, max_model_len=4096) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM) -> Iterator[Serving]:
    with serve(llm) as running:
        yield running


def test_both_formats_whole(served: Serving) -> None:
    text = ask(served, DASHSCOPE, dashscope())[2]
    assert text["output"]["text"] == "All is fine." and text["output"]["finish_reason"] == "stop"
    message = ask(served, DASHSCOPE, dashscope(result_format="message"))[2]
    [choice] = message["output"]["choices"]
    assert choice["message"]["content"] == "All is fine." and choice["finish_reason"] == "stop"
    for told in (text, message):
        usage = told["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] and told["request_id"]


@pytest.mark.parametrize("form", ["text", "message"])
@pytest.mark.parametrize("incremental", [False, True])
def test_events_say_all_so_far_or_what_is_new(served: Serving, form: str, incremental: bool) -> None:
    body = dashscope(result_format=form, incremental_output=incremental, enable_thinking=False)
    status, headers, stream = ask(served, DASHSCOPE, body, **SSE)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    first = stream.split(b"\n\n")[0].split(b"\n")
    assert [line.split(b":")[0] for line in first] == [b"id", b"event", b"", b"data"]
    assert first[2] == b":HTTP_STATUS/200"
    came = [event["output"] for event in events(stream)]
    texts = [one["text"] if form == "text" else one["choices"][0]["message"]["content"] for one in came]
    assert len(texts) > 3
    if incremental:
        assert "".join(texts) == "All is fine."
    else:
        assert texts[-1] == "All is fine." and all(b.startswith(a) for a, b in pairwise(texts))
    ends = [one["finish_reason"] if form == "text" else one["choices"][0]["finish_reason"] for one in came]
    assert ends == ["null"] * (len(ends) - 1) + ["stop"]


def test_prompts_and_the_older_history(served: Serving) -> None:
    old = {"prompt": "three", "history": [{"user": "one", "bot": "two"}]}
    assert ask(served, DASHSCOPE, {"model": "m", "input": old})[0] == 200
    assert all(word in PROMPTS[-1] for word in ("one", "two", "three"))


def test_thoughts_tools_and_choices(served: Serving) -> None:
    told = ask(served, DASHSCOPE, dashscope(result_format="message", enable_thinking=True))[2]
    assert "hm" in told["output"]["choices"][0]["message"]["reasoning_content"]
    told = ask(served, DASHSCOPE, dashscope("weather", tools=[TOOL]))[2]["output"]["choices"][0]
    assert told["finish_reason"] == "tool_calls"
    assert told["message"]["tool_calls"][0]["function"]["name"] == "weather"
    told = ask(served, DASHSCOPE, dashscope(n=2, temperature=1.0, seed=3, result_format="message"))[2]
    assert [choice["index"] for choice in told["output"]["choices"]] == [0, 1]
    told = ask(served, DASHSCOPE, dashscope(logprobs=True, top_logprobs=2, result_format="message"))[2]
    assert told["output"]["choices"][0]["logprobs"]["content"]
    told = ask(served, DASHSCOPE, dashscope(stop="fine", enable_thinking=False))[2]
    assert told["output"]["text"] == "All is "
    told = ask(served, DASHSCOPE, dashscope(max_tokens=2))[2]
    assert told["output"]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"temperature": 2}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1.5}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_p": 0}, "top_p"),
        ({"n": 65}, "n"),
        ({"result_format": "xml"}, "result_format"),
        ({"tools": [TOOL, TOOL]}, "tools"),
    ],
)
def test_ranges_and_errors_in_its_words(served: Serving, parameters: dict[str, Any], name: str) -> None:
    for headers in ({}, SSE):
        status, _, told = ask(served, DASHSCOPE, dashscope(**parameters), **headers)
        assert status == 400 and set(told) == {"code", "message", "request_id"}
        assert f"parameters.{name}" in told["message"] and told["code"]


def test_repetition_penalties_that_are_legal(served: Serving) -> None:
    assert ask(served, DASHSCOPE, dashscope(repetition_penalty=1.1))[0] == 200


def test_a_prompt_that_does_not_fit(served: Serving) -> None:
    status, _, told = ask(served, DASHSCOPE, dashscope("word " * 5000))
    assert status == 400 and "Range of input length should be [1, 4095]" in told["message"]


def test_the_compatible_paths_are_those_of_openai_and_any_name_is_served(served: Serving) -> None:
    base = "/compatible-mode/v1"
    body = {**chat(), "model": "qwen-turbo"}
    told = ask(served, base + "/chat/completions", body)[2]
    assert told["choices"][0]["message"]["content"] == "All is fine."
    assert ask(served, base + "/models")[2]["data"]
    assert (
        ask(served, base + "/completions", {"model": "qwen-turbo", "prompt": "x", "max_tokens": 2})[0] == 200
    )
    assert ask(served, base + "/embeddings", {"model": "text-embedding-v4", "input": "x"})[0] == 200
    status, _, told = ask(served, base + "/chat/completions", b"[]")
    assert status == 400 and told["error"]["type"] == "invalid_request_error"
    assert json.dumps(told)
