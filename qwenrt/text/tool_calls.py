"""Tool calls in what the model wrote: ReAct text -> OpenAI-shaped content and tool_calls, whole or streamed."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from qwenrt.text.detokenizer import StopMatcher

_ACTION, _INPUT, _OBSERVATION = "\nAction:", "\nAction Input:", "\nObservation:"
_FINAL_ANSWER = "\nFinal Answer:"
_THOUGHT = "\nThought:"
_LABELS = (_THOUGHT, _ACTION, _FINAL_ANSWER)
_BARE_LABELS = tuple(label[1:] for label in _LABELS)


@dataclass(frozen=True)
class Reply:
    """What an answer says and what it calls. ``tool_calls``: OpenAI's shape, arguments a raw string."""

    content: str
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finish_reason(self) -> Literal["stop", "tool_calls"]:
        return "tool_calls" if self.tool_calls else "stop"

    def message(self) -> dict[str, Any]:
        """The assistant message to append to a conversation. Content is None beside calls without a thought."""
        if not self.tool_calls:
            return {"role": "assistant", "content": self.content}
        return {"role": "assistant", "content": self.content or None, "tool_calls": self.tool_calls}


def parse_reply(text: str) -> Reply:
    """Read an answer to a prompt with tools.

    A call is an Action followed by an Action Input; what the model makes up after it ("Observation:") is
    dropped. The content is then the thought before the call; without a call it is what follows the last "Final
    Answer:", or the whole text.
    """
    lines = _from_line_start(text)
    action, argument = lines.find(_ACTION), lines.find(_INPUT)
    if 0 <= action < argument:
        end = lines.find(_OBSERVATION, argument)
        name = lines[action + len(_ACTION) : argument].strip()
        arguments = lines[argument + len(_INPUT) : end if end >= 0 else len(lines)].strip()
        if name:
            return Reply(_thought(lines[:action]), [_call(name, arguments)])
    for label in (_FINAL_ANSWER + " ", _FINAL_ANSWER):
        answer = lines.rfind(label)
        if answer >= 0:
            return Reply(lines[answer + len(label) :])
    return Reply(text)


class ReplyStream:
    """parse_reply for text that arrives in pieces.

    Prose and the final answer are passed on as they come; thoughts and calls are held until finish() knows
    what they are. A stream cannot take back: after the first "Final Answer:" all is answer, and prose in front
    of a thought stays content.
    ``in_thought``: the prompt ended with "Thought:", so the text begins inside a thought.
    """

    def __init__(self, in_thought: bool = False) -> None:
        self._state: Literal["start", "prose", "thought", "answer"] = "thought" if in_thought else "start"
        self._text = ""
        self._sent = 0  # characters of _text that were shown
        self._shown: list[str] = []
        self._labels = StopMatcher(_LABELS)

    def push(self, piece: str) -> str:
        """More text; returns the content that can be shown now, often ""."""
        if self._state == "answer":
            return self._show(piece)
        self._text += piece
        if self._state == "start":
            start, piece = self._text.lstrip(), self._text
            if any(label[1:].startswith(start) for label in _LABELS):
                return ""
            self._state = "thought" if start.startswith(_BARE_LABELS) else "prose"
        if self._state == "prose":
            out = self._labels.push(piece)
            self._sent += len(out)
            if self._labels.stopped:
                self._state = "thought"
            return self._show(out)
        return self._show(self._answer_begun())

    def finish(self) -> tuple[str, Reply]:
        """The end: the content not yet shown, and the whole reply with its calls."""
        calls: list[dict[str, Any]] = []
        rest = ""
        if self._state != "answer":
            reply = parse_reply(self._text[self._sent :])
            calls = reply.tool_calls
            if not (calls and self._sent):
                rest = self._show(reply.content)
        return rest, Reply("".join(self._shown), calls)

    def _answer_begun(self) -> str:
        held = _from_line_start(self._text[self._sent :])
        if 0 <= held.find(_ACTION) < held.find(_INPUT):
            return ""  # a call: nothing to show until its end
        _, _, answer = held.partition(_FINAL_ANSWER)
        if not answer:
            return ""
        self._state = "answer"
        return ("\n" if self._sent else "") + answer.removeprefix(" ")

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text


def _from_line_start(text: str) -> str:
    """The text with a newline in front where it begins with a label, so that labels are found at line starts.

    Trained output has "Thought:" first and the newline is always there. But a prompt that ends with "Thought:"
    (after a tool's result) lets the model begin with "Action:" at once. Ordinary prose does not begin with
    "Action:" and go on with a line "Action Input:", so reading that as a call cannot be wrong.
    """
    stripped = text.lstrip()
    return "\n" + stripped if stripped.startswith(_BARE_LABELS) else text


def _thought(text: str) -> str:
    """What the model thought before a call, without the label."""
    _, label, after = text.partition("Thought: ")
    return after.strip() if label else text.strip().removeprefix("Thought:")


def _call(name: str, arguments: str) -> dict[str, Any]:
    # Random: ids must differ over a whole conversation, which no single reply can see.
    call_id = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
