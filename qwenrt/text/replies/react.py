"""Calls in the ReAct form of Qwen-1 (Thought, Action, Action Input, Final Answer), whole or in pieces."""

from __future__ import annotations

from typing import Literal

from qwenrt.text.replies.reply import Part, Reply, tool_call
from qwenrt.text.replies.strict_json import read_json
from qwenrt.text.tokenizer.detokenizer import StopMatcher

_ACTION, _INPUT, _OBSERVATION = "\nAction:", "\nAction Input:", "\nObservation:"
_FINAL_ANSWER = "\nFinal Answer:"
_THOUGHT = "\nThought:"
_LABELS = (_THOUGHT, _ACTION, _FINAL_ANSWER)
_BARE_LABELS = tuple(label[1:] for label in _LABELS)
_LEADING = (_ACTION[1:], _INPUT[1:], _FINAL_ANSWER[1:])  # what can follow a thought
_LONGEST = max(map(len, _LEADING))


def parse_react(text: str, cut_off: bool = False) -> Reply:
    """Read an answer to a prompt with tools.

    A call is the first Action and the first Action Input behind it, unless a "Final Answer:" comes before that; what
    the model makes up after it ("Observation:") is dropped. The content is then the thought before the call; without
    a call it is what follows the last "Final Answer:", or the whole text.

    The arguments are the text that the model wrote, JSON or not, as Qwen-1 was served; "{}" where it wrote none.
    ``cut_off``: max_tokens ended the text. Then a call whose arguments are no whole JSON
    object is text.
    """
    lines = _from_line_start(text)
    action, argument = _call_at(lines)
    if argument >= 0:
        end = lines.find(_OBSERVATION, argument)
        name = lines[action + len(_ACTION) : argument].strip()
        arguments = lines[argument + len(_INPUT) : end if end >= 0 else len(lines)].strip()
        if name and not (cut_off and end < 0 and not _is_object(arguments)):
            return Reply(_thought(lines[:action]), tool_calls=[tool_call(name, arguments or "{}")])
    for label in (_FINAL_ANSWER + " ", _FINAL_ANSWER):
        answer = lines.rfind(label)
        if answer >= 0:
            return Reply(lines[answer + len(label) :])
    return Reply(text)


class ReactStream:
    """parse_react for text that arrives in pieces: the calls are the same, however it is cut.

    Prose and the final answer are passed on as they come; thoughts and calls are held until finish() knows
    what they are. A stream cannot take back: after the first "Final Answer:" all is answer, and prose in front
    of a thought stays content.
    ``in_thought``: the prompt ended with "Thought:", so the text begins inside a thought.
    """

    def __init__(self, in_thought: bool = False) -> None:
        self._state: Literal["start", "prose", "thought", "answer"] = "thought" if in_thought else "start"
        self._held = ""  # not shown yet
        self._shown = False  # any content
        self._labels = StopMatcher(_LABELS)
        self._is_call = False  # the held thought is known to lead to a call
        self._may_answer = False  # it has a "Final Answer:", or was not looked at yet

    def push(self, piece: str) -> list[Part]:
        """More text; returns the content that can be shown now, often none."""
        content = self._read(piece)
        self._shown = self._shown or bool(content)
        return [content] if content else []

    def _read(self, piece: str) -> str:
        if self._state == "answer":
            return piece
        self._held += piece
        if self._state == "start":
            start, piece = self._held.lstrip(), self._held
            if any(label[1:].startswith(start) for label in _LABELS):
                return ""
            self._state = "thought" if start.startswith(_BARE_LABELS) else "prose"
        prose = ""
        if self._state == "prose":
            prose = self._labels.push(piece)
            self._held = self._held[len(prose) :]
            if not self._labels.stopped:
                return prose
            self._state, self._may_answer = "thought", True
        end = self._held[-len(piece) - _LONGEST :]
        if self._is_call or not (self._may_answer or any(label in end for label in _LEADING)):
            return prose  # as long as no label was completed, nothing is known that was not known before
        return prose + self._answer_begun(self._shown or bool(prose))

    def finish(self, cut_off: bool = False) -> list[Part]:
        """The end: the content not yet shown, and the calls."""
        if self._state == "answer":
            return []
        reply = parse_react(self._held, cut_off)
        content = "" if reply.tool_calls and self._shown else reply.content
        return [*filter(None, [content]), *reply.tool_calls]

    def _answer_begun(self, on_new_line: bool) -> str:
        held = _from_line_start(self._held)
        self._is_call = _call_at(held)[1] >= 0
        if self._is_call:
            return ""  # nothing to show until its end
        _, label, answer = held.partition(_FINAL_ANSWER)
        self._may_answer = bool(label)
        if not answer:
            return ""
        self._state = "answer"
        return ("\n" if on_new_line else "") + answer.removeprefix(" ")


def _call_at(lines: str) -> tuple[int, int]:
    """Where the labels of the call stand, (Action, Action Input); the second is -1 where there is no call."""
    action, answer = lines.find(_ACTION), lines.find(_FINAL_ANSWER)
    argument = lines.find(_INPUT, action) if action >= 0 else -1
    return action, -1 if 0 <= answer < argument else argument


def _is_object(text: str) -> bool:
    try:
        value, end = read_json(text)
    except ValueError:
        return False
    return isinstance(value, dict) and end == len(text)


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
