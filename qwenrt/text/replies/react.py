"""Calls in the ReAct form of Qwen-1 (Thought, Action, Action Input, Final Answer), whole or in pieces."""

from __future__ import annotations

from typing import Literal

from qwenrt.text.replies.reply import CallWriter, Part, Reply
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
    ``cut_off``: max_tokens ended the text. Then a call whose arguments are no whole JSON object is unfinished, and one
    whose arguments had not begun is text.
    """
    lines = _from_line_start(text)
    action, argument = _call_at(lines)
    if argument >= 0:
        end = lines.find(_OBSERVATION, argument)
        name = _name(lines, action, argument)
        arguments = lines[argument + len(_INPUT) : end if end >= 0 else len(lines)].strip()
        unfinished = cut_off and end < 0 and not _is_object(arguments)
        if name and (arguments or not unfinished):
            call = CallWriter(0, name)
            call.push(arguments or "{}")
            calls = [whole for whole in [call.end().call] if whole]
            return Reply(_thought(lines[:action]), "", calls, int(unfinished), (0,) if unfinished else ())
    for label in (_FINAL_ANSWER + " ", _FINAL_ANSWER):
        answer = lines.rfind(label)
        if answer >= 0:
            return Reply(lines[answer + len(label) :])
    return Reply(text)


class ReactStream:
    """parse_react for text that arrives in pieces: the calls are the same, however it is cut.

    Prose, the final answer and the arguments of a call are passed on as they come; thoughts are held until it is
    known what they lead to. A stream cannot take back: after the first "Final Answer:" all is answer, and prose in
    front of a thought stays content.
    ``in_thought``: the prompt ended with "Thought:", so the text begins inside a thought.
    """

    def __init__(self, in_thought: bool = False) -> None:
        self._state: Literal["start", "prose", "thought", "call", "answer"] = (
            "thought" if in_thought else "start"
        )
        self._held = ""  # not shown yet
        self._shown = False  # any content
        self._labels = StopMatcher(_LABELS)
        self._is_call = False  # the held thought is known to lead to a call
        self._may_answer = False  # it has a "Final Answer:", or was not looked at yet
        self._name = ""
        self._arguments = _Arguments()
        self._call: CallWriter | None = None

    def push(self, piece: str) -> list[Part]:
        """More text; returns the content and the piece of a call that can be shown now, often none."""
        if self._state == "call":
            if self._call is None:
                self._held += piece
            return self._said(self._arguments.push(piece))
        content = self._read(piece)
        self._shown = self._shown or bool(content)
        parts: list[Part] = [content] if content else []
        if self._is_call and self._state == "thought":
            parts += self._begin()
        return parts

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
        """The end: the content not yet shown, and the end of the call."""
        if self._state == "answer":
            return []
        parts: list[Part] = []
        if self._state == "call":
            parts = self._said(self._arguments.finish())
            if self._call is None and (self._arguments.closed or not cut_off):
                parts = self._said("{}")
        if self._call is None:
            content = parse_react(self._held, cut_off).content
            return [content] if content else []
        unfinished = cut_off and not self._arguments.closed and not _is_object(self._call.arguments)
        return [*parts, self._call.end(broken=unfinished)]

    def _answer_begun(self, on_new_line: bool) -> str:
        held = _from_line_start(self._held)
        self._is_call = _call_at(held)[1] >= 0
        if self._is_call:
            return ""
        _, label, answer = held.partition(_FINAL_ANSWER)
        self._may_answer = bool(label)
        if not answer:
            return ""
        self._state = "answer"
        return ("\n" if on_new_line else "") + answer.removeprefix(" ")

    def _begin(self) -> list[Part]:
        """The labels of a call were read; without a name it is none, and nothing can be shown until the end."""
        lines = _from_line_start(self._held)
        action, argument = _call_at(lines)
        self._name = _name(lines, action, argument)
        if not self._name:
            return []
        self._state = "call"
        return self._said(self._arguments.push(lines[argument + len(_INPUT) :]))

    def _said(self, arguments: str) -> list[Part]:
        """More of the arguments. In front of the first of them stands the thought."""
        if not arguments:
            return []
        if self._call is not None:
            return [self._call.push(arguments)]
        lines = _from_line_start(self._held)
        thought = "" if self._shown else _thought(lines[: _call_at(lines)[0]])
        self._call, self._held = CallWriter(0, self._name), ""
        begun = self._call.push(arguments)
        return [thought, begun] if thought else [begun]


class _Arguments:
    """The text behind "Action Input:" up to "Observation:", without white space at its ends, in pieces.

    closed: the "Observation:" was found.
    """

    def __init__(self) -> None:
        self._matcher = StopMatcher((_OBSERVATION,))
        self._begun = False
        self._space: list[str] = []

    @property
    def closed(self) -> bool:
        return self._matcher.stopped

    def push(self, text: str) -> str:
        """More text; returns what certainly belongs to it."""
        return self._stripped(self._matcher.push(text))

    def finish(self) -> str:
        return self._stripped(self._matcher.finish())

    def _stripped(self, text: str) -> str:
        visible = text.rstrip()
        if not visible:
            self._space.append(text)
            return ""
        out = "".join([*self._space, visible]) if self._begun else visible.lstrip()
        self._begun, self._space = True, [text[len(visible) :]]
        return out


def _call_at(lines: str) -> tuple[int, int]:
    """Where the labels of the call stand, (Action, Action Input); the second is -1 where there is no call."""
    action, answer = lines.find(_ACTION), lines.find(_FINAL_ANSWER)
    argument = lines.find(_INPUT, action) if action >= 0 else -1
    return action, -1 if 0 <= answer < argument else argument


def _name(lines: str, action: int, argument: int) -> str:
    return lines[action + len(_ACTION) : argument].strip()


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
