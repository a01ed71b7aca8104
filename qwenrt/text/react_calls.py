"""Calls in the ReAct form of Qwen-1 (Thought, Action, Action Input, Final Answer), whole or in pieces."""

from __future__ import annotations

from typing import Any, Literal

from qwenrt.text.detokenizer import StopMatcher
from qwenrt.text.tool_calls import Reply, tool_call

_ACTION, _INPUT, _OBSERVATION = "\nAction:", "\nAction Input:", "\nObservation:"
_FINAL_ANSWER = "\nFinal Answer:"
_THOUGHT = "\nThought:"
_LABELS = (_THOUGHT, _ACTION, _FINAL_ANSWER)
_BARE_LABELS = tuple(label[1:] for label in _LABELS)
_LEADING = (_ACTION[1:], _INPUT[1:], _FINAL_ANSWER[1:])  # what can follow a thought
_LONGEST = max(map(len, _LEADING))


def parse_react(text: str) -> Reply:
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
            return Reply(_thought(lines[:action]), tool_calls=[tool_call(name, arguments)])
    for label in (_FINAL_ANSWER + " ", _FINAL_ANSWER):
        answer = lines.rfind(label)
        if answer >= 0:
            return Reply(lines[answer + len(label) :])
    return Reply(text)


class ReactStream:
    """parse_react for text that arrives in pieces.

    Prose and the final answer are passed on as they come; thoughts and calls are held until finish() knows
    what they are. A stream cannot take back: after the first "Final Answer:" all is answer, and prose in front
    of a thought stays content.
    ``in_thought``: the prompt ended with "Thought:", so the text begins inside a thought.
    """

    def __init__(self, in_thought: bool = False) -> None:
        self.calls: list[dict[str, Any]] = []  # known after finish()
        self._state: Literal["start", "prose", "thought", "answer"] = "thought" if in_thought else "start"
        self._held = ""  # not shown yet
        self._shown: list[str] = []
        self._labels = StopMatcher(_LABELS)
        self._is_call = False  # the held thought is known to lead to a call
        self._may_answer = False  # it has a "Final Answer:", or was not looked at yet

    def push(self, piece: str) -> str:
        """More text; returns the content that can be shown now, often ""."""
        if self._state == "answer":
            return self._show(piece)
        self._held += piece
        if self._state == "start":
            start, piece = self._held.lstrip(), self._held
            if any(label[1:].startswith(start) for label in _LABELS):
                return ""
            self._state = "thought" if start.startswith(_BARE_LABELS) else "prose"
        if self._state == "prose":
            out = self._labels.push(piece)
            self._held = self._held[len(out) :]
            if self._labels.stopped:
                self._state, self._may_answer = "thought", True
            return self._show(out)
        end = self._held[-len(piece) - _LONGEST :]
        if self._is_call or not (self._may_answer or any(label in end for label in _LEADING)):
            return ""  # as long as no label was completed, nothing is known that was not known before
        return self._show(self._answer_begun())

    def finish(self) -> str:
        """The end: the content not yet shown. The calls are now in ``calls``."""
        if self._state == "answer":
            return ""
        reply = parse_react(self._held)
        self.calls = reply.tool_calls
        return "" if self.calls and self._shown else self._show(reply.content)

    def _answer_begun(self) -> str:
        held = _from_line_start(self._held)
        self._is_call = 0 <= held.find(_ACTION) < held.find(_INPUT)
        if self._is_call:
            return ""  # nothing to show until its end
        _, label, answer = held.partition(_FINAL_ANSWER)
        self._may_answer = bool(label)
        if not answer:
            return ""
        self._state = "answer"
        return ("\n" if self._shown else "") + answer.removeprefix(" ")

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
