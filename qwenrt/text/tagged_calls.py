"""Tool calls between tags, out of text that arrives in pieces: Hermes' form and Qwen3-Coder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qwenrt.text.call_bodies import CALL, END_CALL, END_FUNCTION, FUNCTION, Body, FunctionBody, JsonBody
from qwenrt.text.schema_values import ParameterSchema
from qwenrt.text.tags import Tags, TagScanner, Trimmed


class TaggedCalls:
    """Content passes as it comes; each call is read at its closing tag.

    A call is ``<tool_call>`` with a JSON object or a ``<function=...>`` inside. What does not read as one is
    content, character by character, with its tags. A last JSON call that is complete counts without its closing
    tag; a function does not, since a parameter may be missing. White space next to a call is dropped as
    `Trimmed` says; a text without a call is its own content.

    ``bare_functions``: a ``<function=...>`` counts without ``<tool_call>`` in front, and a ``</tool_call>`` right
    behind it belongs to it. It must then name one of the tools (where there are any): prose may mention the tag.

    calls: all that were read so far.
    """

    def __init__(self, bare_functions: bool, tools: Mapping[str, ParameterSchema]) -> None:
        self.calls: list[dict[str, Any]] = []
        self._tools = tools
        self._openings = (CALL, FUNCTION) if bare_functions else (CALL,)
        self._outside = Tags(*self._openings)
        self._after_function = Tags(*self._openings, END_CALL)
        self._state: Literal["outside", "after_function", "opened", "body"] = "outside"
        self._scanner = TagScanner()
        self._content = Trimmed(at_tag=False)
        self._block: list[str] = []  # what was read of the call, for the case that it is none
        self._body: Body = JsonBody()

    def push(self, piece: str) -> str:
        """More text; returns the content that can be shown now."""
        self._scanner.push(piece)
        return self._read()

    def finish(self) -> str:
        """The end: the content not yet shown."""
        self._scanner.end()
        content = self._read()
        if self._state == "body":
            content += self._close(text="", closed=False)
        elif self._state == "opened":
            content += self._content.push("".join(self._block))
        return content + self._content.finish()

    def _read(self) -> str:
        content: list[str] = []
        while (found := self._scanner.next(self._tags())) is not None:
            step = {"body": self._in_body, "opened": self._in_opened}.get(self._state, self._in_content)
            content.append(step(*found))
        return "".join(content)

    def _tags(self) -> Tags:
        if self._state == "body":
            return self._body.tags
        return {"outside": self._outside, "opened": _OPENED, "after_function": self._after_function}[
            self._state
        ]

    def _in_content(self, text: str, is_tag: bool) -> str:
        """Outside of any call."""
        if is_tag and text in self._openings:
            self._state, self._block = "opened", [text]
            if text == FUNCTION:
                self._state, self._body = "body", FunctionBody(self._tools, known_only=True)
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
        elif is_tag and text != CALL:
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
        if is_tag and text in (CALL, FUNCTION):  # the next one begins where this one should have ended
            content = self._close("", closed=False) if verdict == "end" else self._give_back("")
            return content + self._in_content(text, is_tag)
        return self._close(text, closed=True) if verdict == "end" else self._give_back(text)

    def _close(self, text: str, closed: bool) -> str:
        """The call ends with ``text``, its closing tag, or where it must end without one."""
        try:
            call, rest = self._body.read(closed)
        except ValueError:
            return self._give_back(text)
        self.calls.append(call)
        self._state = "after_function" if text.endswith(END_FUNCTION) else "outside"
        self._content.tag()
        half_a_tag = END_CALL.startswith(rest.strip())
        return "" if half_a_tag else self._content.push(rest)

    def _give_back(self, text: str) -> str:
        self._state = "outside"
        return self._content.push("".join(self._block) + text)


_OPENED = Tags("{", FUNCTION, CALL)
