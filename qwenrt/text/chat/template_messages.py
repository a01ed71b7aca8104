"""Checked messages as the data that a chat template is rendered with, all untrusted text as plain str."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qwenrt.errors import RequestError
from qwenrt.text.chat.messages import Call, Message, out_of_place, unmatched
from qwenrt.text.chat.outside_text import assistant_text, untrusted
from qwenrt.text.replies.strict_json import refuse_constant, unique_keys
from qwenrt.text.template.provenance import TemplateText, plain


def prepared(messages: Sequence[Message], allow_text_arguments: bool) -> list[Message]:
    """The messages ready to be written: results in the order of their calls, arguments parsed.

    ``allow_text_arguments``: the template writes arguments that are no JSON object as they are; otherwise they
    are refused. Raises RequestError for a result without a call, or with the id of no call.
    """
    parsed = [
        replace(message, calls=tuple(_parsed(index, call, allow_text_arguments) for call in message.calls))
        for index, message in enumerate(messages)
    ]
    return _in_order(parsed)


def merged_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with all system texts in one message, the first, in their order, empty lines between."""
    texts = [message.text for message in messages if message.role == "system" and message.text]
    others = [message for message in messages if message.role != "system"]
    return [Message("system", "\n\n".join(texts)), *others] if texts else others


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages in the shape that templates know: role, content, tool_calls, reasoning_content."""
    return [_template_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _in_order(messages: Sequence[Message]) -> list[Message]:
    """Each call's results in the order of the calls, since templates write no tool_call_id."""
    ordered: list[Message] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        if message.role not in ("tool", "function"):
            ordered.append(message)
            index += 1
            continue
        if not ordered or ordered[-1].role != "assistant":
            raise out_of_place(message.role)
        results = []
        while index < len(messages) and messages[index].role in ("tool", "function"):
            results.append(messages[index])
            index += 1
        ordered += _by_call(results, [call.id for call in ordered[-1].calls])
    return ordered


def _by_call(results: list[Message], ids: list[object]) -> list[Message]:
    if not ids or any(call_id is None for call_id in ids) or any(r.tool_call_id is None for r in results):
        return results
    for result in results:
        if result.tool_call_id not in ids:
            raise unmatched(result, len(ids))
    return sorted(results, key=lambda result: ids.index(result.tool_call_id))


def _parsed(index: int, call: Call, allow_text_arguments: bool) -> Call:
    if not isinstance(call.arguments, str):
        return call
    value = _object(call.arguments)
    if value is None and not allow_text_arguments:
        raise RequestError(
            f"messages[{index}]: arguments of {call.name!r:.80}",
            f"{call.arguments!r:.80} is not a JSON object",
            "The chat template of this model takes arguments only as an object.",
        )
    return call if value is None else replace(call, arguments=value)


def _template_message(where: str, message: Message) -> dict[str, Any]:
    # one of five known words, never the caller's text
    role = "tool" if message.role == "function" else message.role
    content = assistant_text(message.text) if role == "assistant" else plain(message.text)
    entry: dict[str, Any] = {"role": TemplateText(role), "content": content}
    if message.reasoning is not None:
        entry["reasoning_content"] = plain(message.reasoning)
    if message.name is not None:
        entry["name"] = untrusted(message.name, where)
    if message.tool_call_id is not None:
        entry["tool_call_id"] = untrusted(message.tool_call_id, f"{where}: tool_call_id")
    if message.calls:
        entry["tool_calls"] = [_template_call(where, call) for call in message.calls]
    return entry


def _template_call(where: str, call: Call) -> dict[str, Any]:
    arguments = untrusted(call.arguments, f"{where}: arguments of {call.name!r:.80}")
    function = {"name": untrusted(call.name, where), "arguments": arguments}
    entry = {} if call.id is None else {"id": untrusted(call.id, f"{where}: id of a call")}
    # in OpenAI's order: a template may print it whole
    return {**entry, "type": "function", "function": function}


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, the empty one for nothing; None where it is none or would not survive."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
