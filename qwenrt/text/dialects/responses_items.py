"""The items of a response while they are written: a thought, a message, a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from qwenrt.outputs import CallDelta
from qwenrt.text.dialects.answers import new_id
from qwenrt.text.dialects.pieces import Piece, Said, Thought
from qwenrt.text.dialects.responses_tools import Name, call_item, input_of_custom
from qwenrt.text.dialects.signed_thoughts import SignedThoughts

Emit = Callable[..., None]


@dataclass(frozen=True)
class Extra:
    """What the Writer needs of the request. names: the client's names for its tools. echo: what a response repeats of
    its request. packs: reasoning items carry encrypted_content. summary: the thought comes as its summary. store: the
    response is to be kept. items: all items of the request, as JSON."""

    thoughts: SignedThoughts
    names: Mapping[str, Name] = field(default_factory=dict)
    echo: Mapping[str, Any] = field(default_factory=dict)
    packs: bool = False
    summary: bool = False
    store: bool = True
    items: bytes = b"[]"


class Item(Protocol):
    """An item that is open. ``emit(event, **fields)`` was given to it."""

    def takes(self, piece: Piece) -> bool:
        """Whether a piece goes on with this item."""
        ...

    def begin(self) -> None:
        """Emit what comes in front of its first piece."""
        ...

    def push(self, piece: Any) -> None:
        """Emit one more piece."""
        ...

    def end(self, status: str) -> dict[str, Any]:
        """Emit what comes behind its last piece, but for output_item.done; returns the whole item."""
        ...


def new_item(piece: Piece, index: int, extra: Extra, emit: Emit) -> Item:
    """The item that begins with this piece, as the response's number ``index``."""
    if isinstance(piece, Thought):
        return ReasoningItem(index, extra, emit)
    if isinstance(piece, Said):
        return MessageItem(index, emit)
    return CallItem(piece, index, extra.names, emit)


class ReasoningItem:
    """The thought: as content, or as a summary where the client wants one."""

    def __init__(self, index: int, extra: Extra, emit: Emit) -> None:
        self._extra, self._emit = extra, emit
        self._texts: list[str] = []
        self._id = new_id("rs_")
        self._at = {"item_id": self._id, "output_index": index}
        if extra.summary:
            self._kind, self._events, self._part = (
                "summary_text",
                "reasoning_summary_text",
                "reasoning_summary_part",
            )
            self._place = {**self._at, "summary_index": 0}
        else:
            self._kind, self._events, self._part = "reasoning_text", "reasoning_text", "content_part"
            self._place = {**self._at, "content_index": 0}

    def takes(self, piece: Piece) -> bool:
        return isinstance(piece, Thought)

    def begin(self) -> None:
        self._emit("output_item.added", output_index=self._at["output_index"], item=self._item(None))
        self._emit(f"{self._part}.added", **self._place, part={"type": self._kind, "text": ""})

    def push(self, piece: Thought) -> None:
        self._texts.append(piece.text)
        self._emit(f"{self._events}.delta", **self._place, delta=piece.text)

    def end(self, status: str) -> dict[str, Any]:
        text = "".join(self._texts)
        self._emit(f"{self._events}.done", **self._place, text=text)
        self._emit(f"{self._part}.done", **self._place, part={"type": self._kind, "text": text})
        return self._item(text)

    def _item(self, text: str | None) -> dict[str, Any]:
        parts = [] if text is None else [{"type": self._kind, "text": text}]
        item: dict[str, Any] = {"id": self._id, "type": "reasoning", "summary": []}
        item["summary" if self._extra.summary else "content"] = parts
        if self._extra.packs:
            item["encrypted_content"] = "" if text is None else self._extra.thoughts.packed(text)
        return item


class MessageItem:
    """What is said, in one part."""

    def __init__(self, index: int, emit: Emit) -> None:
        self._emit = emit
        self._texts: list[str] = []
        self._id = new_id("msg_")
        self._index = index
        self._place = {"item_id": self._id, "output_index": index, "content_index": 0}

    def takes(self, piece: Piece) -> bool:
        return isinstance(piece, Said)

    def begin(self) -> None:
        self._emit("output_item.added", output_index=self._index, item=self._item("in_progress", []))
        self._emit("content_part.added", **self._place, part=_output_text(""))

    def push(self, piece: Said) -> None:
        self._texts.append(piece.text)
        self._emit("output_text.delta", **self._place, delta=piece.text, logprobs=[])

    def end(self, status: str) -> dict[str, Any]:
        text = "".join(self._texts)
        self._emit("output_text.done", **self._place, text=text, logprobs=[])
        self._emit("content_part.done", **self._place, part=_output_text(text))
        return self._item(status, [_output_text(text)])

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}


class CallItem:
    """A call of a function, whose arguments come as they are written; or of a custom tool, whose input comes whole,
    since it stands within the JSON that the model writes."""

    def __init__(self, first: CallDelta, index: int, names: Mapping[str, Name], emit: Emit) -> None:
        self._call, self._names, self._emit = replace(first, arguments=""), names, emit
        self._custom = first.name in names and names[first.name].custom
        self._arguments: list[str] = []
        self._index = index
        self._id = new_id("ctc_" if self._custom else "fc_")
        self._place = {"item_id": self._id, "output_index": index}

    def takes(self, piece: Piece) -> bool:
        return isinstance(piece, CallDelta) and piece.index == self._call.index

    def begin(self) -> None:
        item = call_item(self._call, self._names, self._id, "in_progress")
        self._emit("output_item.added", output_index=self._index, item=item)

    def push(self, piece: CallDelta) -> None:
        self._arguments.append(piece.arguments)
        if piece.arguments and not self._custom:
            self._emit("function_call_arguments.delta", **self._place, delta=piece.arguments)

    def end(self, status: str) -> dict[str, Any]:
        whole = replace(self._call, arguments="".join(self._arguments))
        item = call_item(whole, self._names, self._id, status)
        if self._custom:
            text = input_of_custom(whole.arguments)
            if text:
                self._emit("custom_tool_call_input.delta", **self._place, delta=text)
            self._emit("custom_tool_call_input.done", **self._place, input=text)
        else:
            self._emit(
                "function_call_arguments.done", **self._place, name=item["name"], arguments=whole.arguments
            )
        return item


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
