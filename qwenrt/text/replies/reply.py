"""The shape of an answer: what it says, what was thought, and the calls in OpenAI's form."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One whole answer. ``tool_calls``: OpenAI's shape, arguments a string (JSON, but for ReAct's raw text)."""

    content: str
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        """The assistant message to append to a conversation. Content is None beside calls without a text."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message.update(content=self.content or None, tool_calls=self.tool_calls)
        return message


@dataclass(frozen=True)
class Piece:
    """What one more piece of text adds to an answer. Calls come whole, in the piece that completes them."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


Part = str | dict[str, Any]  # of an answer, in its order: content, or a whole call


def tool_call(name: str, arguments: str) -> dict[str, Any]:
    """One call in OpenAI's shape."""
    # Random: ids must differ over a whole conversation, which no single reply can see.
    call_id = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


_JSON = json.JSONDecoder(
    strict=False,  # models write raw newlines into strings; what they mean is plain
    parse_constant=lambda name: _refuse(f"{name} is not JSON"),
    object_pairs_hook=lambda pairs: unique_keys(pairs),
)


def read_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at ``start`` and where it ends. ValueError for anything that is not JSON.

    An object with a key twice is refused too: which value is meant is unknown, and reading it would lose one.
    """
    try:
        return _JSON.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(value: Any) -> str:
    """The value as JSON that can be sent as UTF-8. ValueError where there is none (a number out of range)."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which the model wrote as an escape: leave it one
        return json.dumps(value)
    return text


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs. ValueError where a key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse("a key comes twice")
    return found


def _refuse(why: str) -> None:
    raise ValueError(why)
