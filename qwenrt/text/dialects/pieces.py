"""An answer as it is written, one kind of content after the other: what dialects of blocks and items need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenrt.outputs import CallDelta, Delta, Generation


@dataclass(frozen=True)
class Thought:
    """More of the thought."""

    text: str


@dataclass(frozen=True)
class Said:
    """More of what is said."""

    text: str


Piece = Thought | Said | CallDelta


class Pieces:
    """Puts what a Delta adds in an order in which each kind of content is finished before the next one begins.

    Calls that came only whole, with the last Delta, are pieces as well. seen: how many calls have begun.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._open = False  # the latest call may go on

    def of(self, delta: Delta) -> list[Piece]:
        """The pieces of the next Delta. More of a call that was followed by something else belongs nowhere and is
        dropped; no reader of answers gives such."""
        pieces: list[Piece] = []
        if self._open and delta.calls:
            pieces += [call for call in delta.calls if call.index == self.seen - 1]
        if delta.reasoning:
            pieces.append(Thought(delta.reasoning))
        if delta.text:
            pieces.append(Said(delta.text))
        self._open = self._open and not delta.reasoning and not delta.text
        begun = self.seen
        for call in delta.calls:
            if call.index >= begun:
                self.seen = max(self.seen, call.index + 1)
                self._open = True
                pieces.append(call)
        for index, whole in enumerate(delta.tool_calls or ()):
            if index >= self.seen:
                self.seen = index + 1
                pieces.append(whole_call(index, whole))
        return pieces


def pieces_of(answer: Generation) -> list[Piece]:
    """A whole answer, one piece of each content. Of a ReAct answer the text is all that was written; what it says and
    calls is in its message."""
    message = answer.message or {"content": answer.text, "reasoning_content": answer.reasoning}
    pieces: list[Piece] = []
    if message.get("reasoning_content"):
        pieces.append(Thought(message["reasoning_content"]))
    if message.get("content"):
        pieces.append(Said(message["content"]))
    return pieces + [whole_call(index, call) for index, call in enumerate(message.get("tool_calls") or ())]


def whole_call(index: int, call: Mapping[str, Any]) -> CallDelta:
    """A call of OpenAI's shape as one piece."""
    function = call["function"]
    return CallDelta(index, call["id"], function["name"], function["arguments"])
