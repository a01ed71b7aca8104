"""Tool calls between tags, out of text that arrives in pieces: Hermes' form and Qwen3-Coder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qwenrt.text.replies.call_bodies import (
    CALL,
    END_CALL,
    END_FUNCTION,
    FENCE,
    FUNCTION,
    Body,
    FunctionBody,
    JsonBody,
)
from qwenrt.text.replies.reply import Part
from qwenrt.text.replies.schema_values import ParameterSchema
from qwenrt.text.replies.tags import Tags, TagScanner, Trimmed
from qwenrt.text.replies.untagged_calls import UntaggedBody


class TaggedCalls:
    """Content passes as it comes; each call is read at its closing tag.

    A call is ``<tool_call>`` with a JSON object or a ``<function=...>`` inside. What does not read as one is
    content, character by character, with its tags. A last JSON call that is complete counts without its closing
    tag; a function does not, since a parameter may be missing. White space next to a call is dropped as
    `Trimmed` says; a text without a call is its own content.

    A call of one of the ``tools`` counts without tags as well, in a fenced block of JSON or at the beginning of an
    answer, as `UntaggedBody` reads it.

    ``bare_functions``: a ``<function=...>`` counts without ``<tool_call>`` in front, and a ``</tool_call>`` right
    behind it belongs to it. It must then name one of the tools (where there are any): prose may mention the tag.
    """

    def __init__(self, bare_functions: bool, tools: Mapping[str, ParameterSchema]) -> None:
        self._calls: list[dict[str, Any]] = []  # read since content was last handed over
        self._tools = tools
        self._openings = (CALL, FUNCTION) if bare_functions else (CALL,)
        fence = (FENCE,) if tools else ()
        self._outside = Tags(*self._openings, *fence)
        self._after_function = Tags(*self._openings, *fence, END_CALL)
        self._in_code = False  # behind the opening fence of a code block
        self._start = Tags(*self._openings, *fence, *_BRACKETS)
        self._state: Literal["start", "outside", "after_function", "opened", "body"]
        self._state = "start" if tools else "outside"
        self._scanner = TagScanner()
        self._content = Trimmed(at_tag=False)
        self._block: list[str] = []  # what was read of the call, for the case that it is none
        self._body: Body = JsonBody()

    def push(self, piece: str) -> list[Part]:
        """More text; returns the content that can be shown now and the calls that are complete, in their order."""
        self._scanner.push(piece)
        return self._read()

    def finish(self, cut_off: bool = False) -> list[Part]:
        """The end: what was not handed over yet. What is cut off inside a call shows that by itself."""
        self._scanner.end()
        parts = self._read()
        content = ""
        if self._state == "body":
            content = self._close(text="", closed=False)
        elif self._state == "opened":
            content = self._content.push("".join(self._block))
        return [*parts, *self._parts(content), *self._parts(self._content.finish())]

    def _read(self) -> list[Part]:
        parts: list[Part] = []
        while (found := self._scanner.next(self._tags())) is not None:
            step = {"body": self._in_body, "opened": self._in_opened}.get(self._state, self._in_content)
            parts += self._parts(step(*found))
        return parts

    def _parts(self, content: str) -> list[Part]:
        """What one step gave: the calls it closed come before its content."""
        calls, self._calls = self._calls, []
        return [*calls, content] if content else [*calls]

    def _tags(self) -> Tags:
        if self._state == "body":
            return self._body.tags
        if self._state == "opened":
            return _OPENED
        return {"start": self._start, "after_function": self._after_function}.get(self._state, self._outside)

    def _in_content(self, text: str, is_tag: bool) -> str:
        """Outside of any call."""
        if is_tag and text in self._openings:
            self._state, self._block = "opened", [text]
            if text == FUNCTION:
                self._state, self._body = "body", FunctionBody(self._tools, known_only=True)
            return ""
        if is_tag and self._tools and (text == FENCE or text in _BRACKETS):
            self._state, self._block = "body", [text]
            bare = "" if text == FENCE else text
            self._body = UntaggedBody(self._tools, self._openings, may_close=self._in_code, bare=bare)
            return ""
        if is_tag and self._state == "after_function":
            self._state = "outside"
            self._content.tag()
            return ""
        if text.strip():
            self._state = "outside"
        return self._content.push(text)

    def _in_opened(self, text: str, is_tag: bool) -> str:
        """Behind <tool_call>, where only white space and one of the two forms may come."""
        if not is_tag and not text.strip():
            self._block.append(text)
        elif is_tag and text not in (CALL, FENCE):
            self._block.append(text)
            self._state = "body"
            self._body = JsonBody() if text == "{" else FunctionBody(self._tools, known_only=False)
        else:
            self._state = "outside"
            return self._content.push("".join(self._block)) + self._in_content(text, is_tag)
        return ""

    def _in_body(self, text: str, is_tag: bool) -> str:
        verdict = self._body.take(text, is_tag)
        if verdict == "more":
            self._block.append(text)
            return ""
        in_fence = isinstance(self._body, UntaggedBody) and not self._body.bare
        if is_tag and (text in self._openings or (text == FENCE and not in_fence)):
            # The next one begins where this one should have ended.
            content = self._close("", closed=False) if verdict == "end" else self._as_content("")
            return content + self._in_content(text, is_tag)
        return self._close(text, closed=True) if verdict == "end" else self._as_content(text)

    def _close(self, text: str, closed: bool) -> str:
        """The call ends with ``text``, its closing tag, or where it must end without one."""
        try:
            calls, rest = self._body.read(closed)
        except ValueError:
            return self._as_content(text)
        self._calls += calls
        ends_function = isinstance(self._body, FunctionBody) and text.endswith(END_FUNCTION)
        self._state = "after_function" if ends_function else "outside"
        self._content.tag()
        if isinstance(self._body, UntaggedBody):
            self._in_code = False
            return self._content.push(rest)
        half_a_tag = END_CALL.startswith(rest.strip())
        return "" if half_a_tag else self._content.push(rest)

    def _as_content(self, text: str) -> str:
        """It was no call: all of it is content."""
        self._state = "outside"
        if isinstance(self._body, UntaggedBody):
            self._in_code = self._body.opened
        return self._content.push("".join(self._block) + text)


_BRACKETS = ("{", "[")
_OPENED = Tags("{", FUNCTION, CALL, FENCE)
