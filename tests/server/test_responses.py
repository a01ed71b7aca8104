"""OpenAI's Responses over a socket: items, events, thoughts that come back, responses that are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from qwenrt.server.thought_key import NAME
from tests.server.asking import RESPONSES, ask, events, sent, serve
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving, until

FUNCTION = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
NAMESPACE = {
    "type": "namespace",
    "name": "files",
    "description": "of files",
    "tools": [{**FUNCTION, "name": "read"}],
}
PROMPTS: list[str] = []
SEALED = {"tools": [FUNCTION], "include": ["reasoning.encrypted_content"], "store": False}


def reply(prompt: str) -> str:
    PROMPTS.append(prompt)
    said = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    if "<tool_response>" in said:
        return "It is warm."
    if "weather" in said:
        call = '<tool_call>\n{"name": "weather", "arguments": {"city": "杭州"}}\n</tool_call>'
        return f"<think>\nlook there\n</think>\n\nI look.\n{call}"
    if "read" in said:
        name = (
            "files__read" if "files__read" in prompt else "files.read" if "files.read" in prompt else "read"
        )
        return f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "x"}}}}\n</tool_call>'
    if "long" in said:
        return "word " * 1000
    return "Fine."


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with scripted_llm(reply, max_model_len=8192) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM) -> Iterator[Serving]:
    with serve(llm) as running:
        yield running


def body(text: Any = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": text, **fields}


def user(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def test_events_come_in_their_order_with_numbers_without_gaps(served: Serving) -> None:
    _, _, stream = ask(served, RESPONSES, body("weather", tools=[FUNCTION], stream=True))
    came = events(stream)
    assert [event["sequence_number"] for event in came] == list(range(len(came)))
    names = [event["type"].removeprefix("response.") for event in came]
    assert names[:2] == ["created", "in_progress"] and names[-1] == "completed"
    kinds = [name for name in names if not name.endswith(".delta")]
    assert kinds[2:] == [
        *(
            "output_item.added",
            "content_part.added",
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
        ),
        *(
            "output_item.added",
            "content_part.added",
            "output_text.done",
            "content_part.done",
            "output_item.done",
        ),
        *("output_item.added", "function_call_arguments.done", "output_item.done", "completed"),
    ]
    for done, field in (
        ("reasoning_text", "text"),
        ("output_text", "text"),
        ("function_call_arguments", "arguments"),
    ):
        pieces = [event["delta"] for event in came if event["type"] == f"response.{done}.delta"]
        [end] = [event for event in came if event["type"] == f"response.{done}.done"]
        assert "".join(pieces) == end[field] and len(pieces) > 1
    whole = ask(served, RESPONSES, body("weather", tools=[FUNCTION]))[2]
    last = came[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["reasoning", "message", "function_call"]
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert last["output"][2]["arguments"] == whole["output"][2]["arguments"] == '{"city": "杭州"}'


def test_what_was_cut_is_incomplete(served: Serving) -> None:
    for stream in (False, True):
        came = ask(served, RESPONSES, body("long", max_output_tokens=5, stream=stream))[2]
        response = events(came)[-1]["response"] if stream else came
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_items_of_all_kinds_are_read_and_others_named_by_their_index(served: Serving) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "杭州"}'}
    result = {"type": "function_call_output", "call_id": "c1", "output": "21 degrees"}
    answer = ask(served, RESPONSES, body([user("weather"), call, result], tools=[FUNCTION]))[2]
    assert answer["output"][-1]["content"][0]["text"] == "It is warm." and "21 degrees" in PROMPTS[-1]
    status, _, told = ask(served, RESPONSES, body([user("x"), {"type": "mcp_call"}]))
    assert status == 400 and told["error"]["param"].startswith("input[1]")
    status, _, told = ask(served, RESPONSES, body([user("x"), {**result, "call_id": "c9"}]))
    assert status == 400 and told["error"]["param"].startswith("input[1]")


def test_namespaces_are_joined_and_split_again_and_hosted_tools_are_told(served: Serving) -> None:
    tools = [NAMESPACE, {"type": "web_search"}, {"type": "code_interpreter", "container": {}}]
    status, headers, answer = ask(served, RESPONSES, body("read", tools=tools))
    assert status == 200 and headers["x-qwenrt-ignored"] == "web_search, code_interpreter"
    [call] = [item for item in answer["output"] if item["type"] == "function_call"]
    assert (call["name"], call["namespace"]) == ("read", "files")


def thought_and_call(served: Serving) -> tuple[str, Any]:
    """What a server wrote before it wants a tool's result: the thought as it is sealed, and the call."""
    output = ask(served, RESPONSES, body([user("weather")], **SEALED))[2]["output"]
    thought = next(item for item in output if item["type"] == "reasoning")
    return thought["encrypted_content"], next(item for item in output if item["type"] == "function_call")


def is_known(served: Serving, sealed: str, call: Any) -> bool:
    """Whether a thought that comes back is a part of the prompt."""
    thought = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "warm"}
    asked = user(f"weather {len(PROMPTS)}")  # a prompt that was read before is not told again
    assert ask(served, RESPONSES, body([asked, thought, call, result], **SEALED))[0] == 200
    return "look there" in PROMPTS[-1]


def test_a_thought_that_returns_unchanged_is_read_and_else_dropped(served: Serving) -> None:
    sealed, call = thought_and_call(served)
    half = len(sealed) // 2
    for at in (half, len(sealed) - 1):
        flipped = sealed[:at] + ("A" if sealed[at] != "A" else "B") + sealed[at + 1 :]
        assert not is_known(served, flipped, call)
    assert is_known(served, sealed, call) and not is_known(served, "", call)


def test_a_thought_is_known_after_a_restart_where_prefixes_are_kept(tmp_path: Path) -> None:
    def restarted(store: Path | None, *sealed: str) -> tuple[str, list[bool]]:
        with scripted_llm(reply, max_model_len=8192, prefix_store=store) as llm, serve(llm) as served:
            own, call = thought_and_call(served)
            return own, [is_known(served, one, call) for one in sealed]

    first, _ = restarted(tmp_path)
    assert restarted(tmp_path, first)[1] == [True] and restarted(None, first)[1] == [False]
    key = tmp_path / NAME
    assert key.stat().st_mode & 0o077 == 0
    key.write_bytes(b"torn")
    second, known = restarted(tmp_path, first)
    assert known == [False] and restarted(tmp_path, first, second)[1] == [False, True]


def test_a_response_goes_on_from_another_of_its_key(llm: qwenrt.LLM) -> None:
    one, two = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
    with serve(llm, api_keys=("one", "two")) as served:
        first = ask(served, RESPONSES, body("My name is Ada"), **one)[2]
        answer = ask(served, RESPONSES, body("and?", previous_response_id=first["id"]), **one)[2]
        assert answer["status"] == "completed" and "My name is Ada" in PROMPTS[-1] and "Fine." in PROMPTS[-1]
        assert ask(served, f"{RESPONSES}/{first['id']}", **one)[2]["id"] == first["id"]
        unknown = ask(served, RESPONSES, body("and?", previous_response_id="resp_unknown"), **two)
        foreign = ask(served, RESPONSES, body("and?", previous_response_id=first["id"]), **two)
        assert unknown[0] == foreign[0] == 404
        assert ask(served, f"{RESPONSES}/{first['id']}", **two)[0] == 404
        unkept = ask(served, RESPONSES, body("x", store=False), **one)[2]["id"]
        assert ask(served, f"{RESPONSES}/{unkept}", **one)[0] == 404
        assert ask(served, f"{RESPONSES}/{first['id']}", method="DELETE", **one)[2]["deleted"] is True
        assert ask(served, f"{RESPONSES}/{first['id']}", **one)[0] == 404


def test_a_request_that_is_left_between_an_item_and_its_end(served: Serving) -> None:
    with served.wire(sent(RESPONSES, body("long", stream=True))) as wire:
        wire.read_until(b"response.output_text.delta")
    until(lambda: served.tasks == 0)
    assert ask(served, RESPONSES, body())[0] == 200


def test_the_counts_of_a_request_are_those_of_its_usage(served: Serving) -> None:
    asked = body("weather", tools=[FUNCTION], instructions="Be brief.")
    counted = ask(served, RESPONSES + "/input_tokens", asked)[2]["input_tokens"]
    usage = ask(served, RESPONSES, asked)[2]["usage"]
    assert usage["input_tokens"] == counted
    assert usage["output_tokens_details"]["reasoning_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_structure_stands_under_text_format(served: Serving) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["b"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": schema}}
    answer = ask(served, RESPONSES, {**body("x", reasoning={"effort": "none"}), "text": form})[2]
    assert json.loads(answer["output"][0]["content"][0]["text"]) == {"a": "b"}
