"""Anthropic's Messages over a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import qwenrt
from tests.server.asking import MESSAGES, ask, chat, events, serve
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving

TOOL = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
THINKING = {"type": "enabled", "budget_tokens": 1000}
PROMPTS: list[str] = []


def reply(prompt: str) -> str:
    PROMPTS.append(prompt)
    said = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    thinks = not prompt.endswith("</think>\n\n")
    thought = "<think>\nlook there\n</think>\n\n" if thinks else ""
    if "<tool_response>" in said:
        return thought + "It is warm."
    if "weather" in said:
        return (
            thought + 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "杭州"}}\n</tool_call>'
        )
    return thought + ("word " * 300 if "long" in said else "Fine. END of it")


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(reply, max_model_len=8192) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM) -> Iterator[Serving]:
    with serve(llm) as running:
        yield running


def body(text: Any = "Hello", **fields: Any) -> dict[str, Any]:
    return {**chat(text), "max_tokens": 1000, **fields}


def rendered(served: Serving, asked: dict[str, Any]) -> str:
    assert ask(served, MESSAGES, asked)[0] == 200
    return PROMPTS[-1]


@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [
        ("Hello", {}, "end_turn"),
        ("Hello", {"max_tokens": 2}, "max_tokens"),
        ("Hello", {"stop_sequences": ["END"]}, "stop_sequence"),
        ("weather", {"tools": [TOOL]}, "tool_use"),
    ],
)
def test_every_reason_to_stop_whole_and_streamed(
    served: Serving, text: str, fields: dict[str, Any], reason: str
) -> None:
    whole = ask(served, MESSAGES, body(text, **fields))[2]
    assert whole["stop_reason"] == reason and whole["type"] == "message" and whole["model"] == "m"
    assert whole["stop_sequence"] == ("END" if reason == "stop_sequence" else None)
    came = events(ask(served, MESSAGES, body(text, stream=True, **fields))[2])
    assert came[0]["type"] == "message_start" and came[-1]["type"] == "message_stop"
    [end] = [event for event in came if event["type"] == "message_delta"]
    assert end["delta"]["stop_reason"] == reason
    assert {"output_tokens", "cache_read_input_tokens"} <= set(end["usage"])


def test_blocks_of_a_stream_are_those_of_the_whole(served: Serving) -> None:
    asked = body("weather", tools=[TOOL], thinking=THINKING)
    whole = ask(served, MESSAGES, asked)[2]["content"]
    assert [block["type"] for block in whole] == ["thinking", "text", "tool_use"]
    came = events(ask(served, MESSAGES, {**asked, "stream": True})[2])
    started = [event["content_block"] for event in came if event["type"] == "content_block_start"]
    assert [block["type"] for block in started] == ["thinking", "text", "tool_use"]
    joined: list[dict[str, str]] = [{} for _ in started]
    for event in came:
        if event["type"] == "content_block_delta":
            for name, piece in event["delta"].items():
                if name != "type":
                    joined[event["index"]][name] = joined[event["index"]].get(name, "") + piece
    assert joined[0] == {"thinking": whole[0]["thinking"], "signature": whole[0]["signature"]}
    assert joined[1]["text"] == whole[1]["text"]
    assert json.loads(joined[2]["partial_json"]) == whole[2]["input"] == {"city": "杭州"}
    stops = [event["index"] for event in came if event["type"] == "content_block_stop"]
    assert stops == [0, 1, 2]


def test_a_thought_is_read_again_only_unchanged(served: Serving) -> None:
    asked = body("weather", tools=[TOOL], thinking=THINKING)
    content = ask(served, MESSAGES, asked)[2]["content"]
    result = {
        "type": "tool_result",
        "tool_use_id": content[2]["id"],
        "content": [{"type": "text", "text": "21"}],
    }
    signature = content[0]["signature"]
    other = ("A" if signature[5] != "A" else "B").join((signature[:5], signature[6:]))
    for thinking, sealed, kept in (
        (content[0]["thinking"], signature, True),
        (content[0]["thinking"], other, False),
        (content[0]["thinking"] + " and more", signature, False),
    ):
        turn = [{"type": "thinking", "thinking": thinking, "signature": sealed}, *content[1:]]
        messages = [
            *asked["messages"],
            {"role": "assistant", "content": turn},
            {"role": "user", "content": [result]},
        ]
        assert ("look there" in rendered(served, {**asked, "messages": messages})) is kept


def test_system_is_text_or_blocks_and_headers_in_disguise_are_no_prompt(served: Serving) -> None:
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc;"},
        {"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}},
    ]
    prompt = rendered(served, body(system=blocks, metadata={"user_id": "u_123"}))
    assert "You are brief." in prompt and "billing" not in prompt and "u_123" not in prompt
    assert rendered(served, body(system="You are brief.")) == prompt


def test_a_system_message_in_the_middle_is_never_in_the_head(served: Serving) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "system", "content": "Now be brief."},
        {"role": "user", "content": "three"},
    ]
    prompt = rendered(served, body(messages=messages, system="The head."))
    assert prompt.index("The head.") < prompt.index("two") < prompt.index("Now be brief.")


@pytest.mark.parametrize("extra", [{}, {"tools": [TOOL]}, {"thinking": THINKING}, {"system": "s"}])
def test_what_is_counted_is_the_usage_exactly(served: Serving, extra: dict[str, Any]) -> None:
    asked = body("Count this, 计数.", **extra)
    counted = ask(served, MESSAGES + "/count_tokens", {k: v for k, v in asked.items() if k != "max_tokens"})[
        2
    ]
    for _ in range(2):  # computed, and cached
        usage = ask(served, MESSAGES, asked)[2]["usage"]
        assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_hosted_tools_are_told_and_images_refused(served: Serving) -> None:
    tools = [TOOL, {"type": "web_search_20250305", "name": "web_search"}]
    status, headers, _ = ask(served, MESSAGES, body(tools=tools))
    assert status == 200 and headers["x-qwenrt-ignored"] == "web_search_20250305"
    image = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}]
    status, _, told = ask(served, MESSAGES, body(image))
    assert status == 400 and told["type"] == "error" and "messages[0].content[0]" in told["error"]["message"]
    stray = [{"type": "tool_result", "tool_use_id": "nobody", "content": "x"}]
    assert ask(served, MESSAGES, body(stray))[0] == 400


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_that_must_be_used_is_enforced(served: Serving, choice: dict[str, str]) -> None:
    pytest.importorskip("llguidance")
    whole = ask(served, MESSAGES, body("weather", tools=[TOOL], tool_choice=choice))[2]
    assert [block["type"] for block in whole["content"]] == ["tool_use"]


def test_thinking_is_asked_for_or_there_is_none(llm: qwenrt.LLM, served: Serving) -> None:
    for thinking, thinks in (
        (THINKING, True),
        ({"type": "adaptive"}, True),
        ({"type": "disabled"}, False),
        (None, False),
    ):
        content = ask(served, MESSAGES, body(thinking=thinking))[2]["content"]
        assert (content[0]["type"] == "thinking") is thinks
    with (
        scripted_llm(lambda prompt: "Plain.", max_model_len=4096, chat="xml") as plain,
        serve(plain) as server,
    ):
        status, _, told = ask(server, MESSAGES, body(thinking=THINKING, output_config={"effort": "high"}))
        assert status == 200 and [block["type"] for block in told["content"]] == ["text"]


def test_errors_name_the_request(served: Serving) -> None:
    status, headers, told = ask(served, MESSAGES, {"model": "m"}, x_request_id="my-id.1")
    assert status == 400 and told["type"] == "error" and told["error"]["type"] == "invalid_request_error"
    assert headers["x-request-id"] == told["request_id"] == "my-id.1"
