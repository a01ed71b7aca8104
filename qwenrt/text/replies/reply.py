"""The shape of an answer: what it says, what was thought, and the calls in OpenAI's form."""

from __future__ import annotations

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
