"""The shape of an answer: what it says, what was thought, and the calls in OpenAI's form, whole and in pieces."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenrt.outputs import CallDelta, FinishReason


@dataclass(frozen=True)
class Reply:
    """One whole answer. ``tool_calls``: OpenAI's shape, arguments a string (JSON, but for ReAct's raw text).

    A call breaks where what follows cannot be one: bad JSON, a key twice, the end of the text. One that broke before
    its arguments had begun is content. What was given out of one since cannot be taken back: it stays among the
    tool_calls, and its index is in ``unfinished``. Its arguments are then the beginning of a JSON object and never a
    whole one, so that nobody runs half a command; what the model wrote behind the break is content.
    ``broken_calls`` counts both kinds.
    """

    content: str
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    broken_calls: int = 0
    unfinished: tuple[int, ...] = ()

    def message(self) -> dict[str, Any]:
        """The assistant message to append to a conversation. Content is None beside calls without a text."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message.update(content=self.content or None, tool_calls=self.tool_calls)
        return message

    def finish_reason(self, ended_by: FinishReason) -> FinishReason:
        """Why the answer ended, where its tokens ended by ``ended_by``: "tool_calls" if a whole call is in it, unless
        something else than the model ended it (but for "length" behind the last call, which loses no call)."""
        if len(self.unfinished) == len(self.tool_calls):
            return ended_by
        within_a_call = len(self.tool_calls) - 1 in self.unfinished
        return (
            "tool_calls" if ended_by == "stop" or (ended_by == "length" and not within_a_call) else ended_by
        )


@dataclass(frozen=True)
class Piece:
    """What one more piece of text adds to an answer.

    ``calls``: pieces of the calls as they are written. In one Piece, those that go on with a call come before the
    content, and calls that begin come after it. ``tool_calls``: each call whole, in the piece that ends it.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True)
class CallEnd:
    """A call ended. ``broken``: it is unfinished, or, without ``call``, it was none and is content."""

    call: dict[str, Any] | None
    broken: bool = False


Part = str | CallDelta | CallEnd  # of an answer, in its order: content, a piece of a call, its end


class CallWriter:
    """One call as it is written: its pieces, and the whole of them at its end."""

    def __init__(self, index: int, name: str) -> None:
        # Random: ids must differ over a whole conversation, which no single reply can see.
        self._id = f"call_{uuid.uuid4().hex[:24]}"
        self._index, self._name = index, name
        self._arguments: list[str] = []

    def push(self, arguments: str) -> CallDelta:
        first = not self._arguments
        self._arguments.append(arguments)
        return CallDelta(self._index, self._id if first else "", self._name if first else "", arguments)

    @property
    def arguments(self) -> str:
        """All of them so far."""
        return "".join(self._arguments)

    def end(self, broken: bool = False) -> CallEnd:
        function = {"name": self._name, "arguments": self.arguments}
        return CallEnd({"id": self._id, "type": "function", "function": function}, broken)


def joined_calls(pieces: Sequence[CallDelta]) -> tuple[CallDelta, ...]:
    """The same with one piece for each call."""
    if len(pieces) < 2:
        return tuple(pieces)
    found: dict[int, list[CallDelta]] = {}
    for piece in pieces:
        found.setdefault(piece.index, []).append(piece)
    return tuple(
        CallDelta(index, each[0].id, each[0].name, "".join(piece.arguments for piece in each))
        for index, each in found.items()
    )


def joined(first: Piece, second: Piece) -> Piece:
    """Two pieces of one answer, one after the other, as one."""
    return Piece(
        first.content + second.content,
        first.reasoning + second.reasoning,
        [*first.tool_calls, *second.tool_calls],
        joined_calls([*first.calls, *second.calls]),
    )
