"""What clients make of a stream, as strict as they are: events, then the message or the response they add up to."""

from __future__ import annotations

import json
from typing import Any


def events(stream: bytes) -> list[dict[str, Any]]:
    """The data of server-sent events. Each has its own type as the event's name; comments are passed over."""
    assert stream == b"" or stream.endswith(b"\n\n")
    found = []
    for block in stream.decode().split("\n\n")[:-1]:
        lines = block.split("\n")
        if all(line.startswith(":") for line in lines):
            continue
        name, data = lines
        assert name.startswith("event: ") and data.startswith("data: ")
        event = json.loads(data.removeprefix("data: "))
        assert event["type"] == name.removeprefix("event: ")
        found.append(event)
    return found


def message_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that Anthropic's events add up to; AssertionError where their order is not the documented one."""
    found = [event for event in found if event["type"] != "ping"]
    first, *middle, delta, stop = found
    assert (first["type"], delta["type"], stop) == (
        "message_start",
        "message_delta",
        {"type": "message_stop"},
    )
    message: dict[str, Any] = first["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    parts: dict[str, list[str]] = {}
    is_open = False
    for event in middle:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            is_open, parts = True, {}
            continue
        assert is_open and event["index"] == len(message["content"]) - 1
        if event["type"] == "content_block_stop":
            is_open = False
            _complete(message["content"][-1], parts)
            continue
        assert event["type"] == "content_block_delta"
        added = dict(event["delta"])
        kind = added.pop("type")
        ((field, text),) = added.items()
        assert kind in _DELTAS[message["content"][-1]["type"]] and text != ""
        assert field == kind.removesuffix("_delta") or (kind, field) == ("input_json_delta", "partial_json")
        parts.setdefault(field, []).append(text)
    assert not is_open
    return message | delta["delta"] | {"usage": message["usage"] | delta["usage"]}


_DELTAS = {
    "thinking": ("thinking_delta", "signature_delta"),
    "text": ("text_delta",),
    "tool_use": ("input_json_delta",),
}


def _complete(block: dict[str, Any], parts: dict[str, list[str]]) -> None:
    if block["type"] == "thinking":
        assert list(parts) in (["thinking", "signature"], ["signature"]) and len(parts["signature"]) == 1
    if block["type"] == "tool_use":
        assert block["input"] == {}
        block["input_json"] = "".join(parts.get("partial_json", ["{}"]))
        return
    for field, texts in parts.items():
        block[field] += "".join(texts)


def response_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that the events of OpenAI's Responses add up to; AssertionError where their order is not the
    documented one, where a number is left out, or where pieces joined are not the whole."""
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    created, progress, *middle, last = found
    assert (created["type"], progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"]["status"] == progress["response"]["status"] == "in_progress"
    assert last["type"] == f"response.{last['response']['status']}"
    items: list[dict[str, Any]] = []
    at = 0
    while at < len(middle):
        assert middle[at]["type"] == "response.output_item.added"
        end = next(k for k in range(at, len(middle)) if middle[k]["type"] == "response.output_item.done")
        assert all(event["output_index"] == len(items) for event in middle[at : end + 1])
        added, item = middle[at]["item"], middle[end]["item"]
        assert all(added[key] == item[key] for key in ("id", "type"))
        inner = middle[at + 1 : end]
        assert all(event["item_id"] == item["id"] for event in inner)
        _check_item(item, [event["type"].removeprefix("response.") for event in inner], inner)
        items.append(item)
        at = end + 1
    assert items == last["response"]["output"]
    return last["response"]


def _check_item(item: dict[str, Any], kinds: list[str], inner: list[dict[str, Any]]) -> None:
    if item["type"] in ("function_call", "custom_tool_call"):
        field = "arguments" if item["type"] == "function_call" else "input"
        name = "function_call_arguments" if field == "arguments" else "custom_tool_call_input"
        *pieces, done = kinds
        assert set(pieces) <= {f"{name}.delta"} and done == f"{name}.done"
        assert "".join(event["delta"] for event in inner[:-1]) == inner[-1][field] == item[field]
        return
    if item["type"] == "message":
        name, part, (content,) = "output_text", "content_part", item["content"]
    elif item["summary"]:
        name, part, (content,) = "reasoning_summary_text", "reasoning_summary_part", item["summary"]
    else:
        name, part, (content,) = "reasoning_text", "content_part", item["content"]
    first, *pieces, done, part_done = kinds
    assert (first, done, part_done) == (f"{part}.added", f"{name}.done", f"{part}.done")
    assert pieces and set(pieces) == {f"{name}.delta"}
    assert inner[0]["part"]["text"] == ""
    assert "".join(event["delta"] for event in inner[1:-2]) == inner[-2]["text"] == content["text"]
    assert inner[-1]["part"] == content
