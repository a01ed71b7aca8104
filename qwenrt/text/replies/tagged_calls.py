"""Tool calls between tags, out of text that arrives in pieces: Hermes' form and Qwen3-Coder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from qwenrt.text.replies.call_bodies import CALL, END_CALL, END_FUNCTION, FENCE, FUNCTION, Body
from qwenrt.text.replies.function_calls import FunctionBody
from qwenrt.text.replies.json_calls import JsonBody
from qwenrt.text.replies.reply import CallEnd, CallWriter, Part
from qwenrt.text.replies.schema_values import ParameterSchema
from qwenrt.text.replies.tags import Tags, TagScanner, Trimmed
from qwenrt.text.replies.untagged_calls import UntaggedBody


class TaggedCalls:
    """Content passes as it comes, and so does each call from where its body says that it has begun.

    A call is ``<tool_call>`` with a JSON object or a ``<function=...>`` inside. What does not read as one is
    content, character by character, with its tags. A last JSON call that is complete counts without its closing
    tag; a function does not, since a parameter may be missing. White space next to a call is dropped as
    `Trimmed` says; a text without a call is its own content.

    A call that breaks after it has begun is unfinished, and the text behind the break is content again, up to the
    closing tag and from there on.

    A call of one of the ``tools`` counts without tags as well, in a fenced block of JSON or at the beginning of an
    answer, as `UntaggedBody` reads it.

    ``bare_functions``: a ``<function=...>`` counts without ``<tool_call>`` in front, and a ``</tool_call>`` right
    behind it belongs to it. It must then name one of the tools (where there are any): prose may mention the tag.
    """

    def __init__(self, bare_functions: bool, tools: Mapping[str, ParameterSchema]) -> None:
        self._parts: list[Part] = []  # not handed over yet
        self._tools = tools
        self._openings = (CALL, FUNCTION) if bare_functions else (CALL,)
        fence = (FENCE,) if tools else ()
        self._outside = Tags(*self._openings, *fence)
        self._after_call = Tags(*self._openings, *fence, END_CALL)
        self._in_code = False  # behind the opening fence of a code block
        self._start = Tags(*self._openings, *fence, *_BRACKETS)
        self._state: Literal["start", "outside", "after_function", "after_broken", "opened", "body"]
        self._state = "start" if tools else "outside"
        self._scanner = TagScanner()
        self._content = Trimmed(at_tag=False)
        # what was read of a call that has not begun, for the case that it is none
        self._block: list[str] = []
        self._body: Body = JsonBody()
        self._call: CallWriter | None = None  # has begun
        self._count = 0  # of calls that have begun

    def push(self, piece: str) -> list[Part]:
        """More text; returns what is certain now: content, pieces of calls and their ends, in their order."""
        self._scanner.push(piece)
        return self._read()

    def finish(self, cut_off: bool = False) -> list[Part]:
        """The end: what was not handed over yet. What is cut off inside a call shows that by itself."""
        if self._call is None or not isinstance(self._body, FunctionBody):
            self._scanner.end()  # but half the tag that closes a parameter is no part of its value
        parts = self._read()
        if self._state == "body":
            self._close(text="", closed=False)
        elif self._state == "opened":
            self._say(self._content.push("".join(self._block)))
        self._say(self._content.finish())
        return [*parts, *self._take()]

    def _read(self) -> list[Part]:
        while (found := self._scanner.next(self._tags())) is not None:
            step = {"body": self._in_body, "opened": self._in_opened}.get(self._state, self._in_content)
            step(*found)
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _say(self, content: str) -> None:
        if content:
            self._parts.append(content)

    def _tags(self) -> Tags:
        if self._state == "body":
            return self._body.tags
        if self._state == "opened":
            return _OPENED
        if self._state in ("after_function", "after_broken"):
            return self._after_call
        return self._start if self._state == "start" else self._outside

    def _in_content(self, text: str, is_tag: bool) -> None:
        """Outside of any call."""
        if is_tag and text in self._openings:
            self._state, self._block = "opened", [text]
            if text == FUNCTION:
                self._state, self._body = "body", FunctionBody(self._tools, known_only=True)
            return
        if is_tag and self._tools and (text == FENCE or text in _BRACKETS):
            self._state, self._block = "body", [text]
            bare = "" if text == FENCE else text
            self._body = UntaggedBody(self._tools, self._openings, may_close=self._in_code, bare=bare)
            return
        if is_tag and text == END_CALL and self._state in ("after_function", "after_broken"):
            self._state = "outside"
            self._content.tag()
            return
        if text.strip() and self._state != "after_broken":
            self._state = "outside"
        self._say(self._content.push(text))

    def _in_opened(self, text: str, is_tag: bool) -> None:
        """Behind <tool_call>, where only white space and one of the two forms may come."""
        if not is_tag and not text.strip():
            self._block.append(text)
        elif is_tag and text not in (CALL, FENCE):
            self._block.append(text)
            self._state = "body"
            self._body = JsonBody() if text == "{" else FunctionBody(self._tools, known_only=False)
        else:
            self._state = "outside"
            self._say(self._content.push("".join(self._block)))
            self._in_content(text, is_tag)

    def _in_body(self, text: str, is_tag: bool) -> None:
        verdict = self._body.take(text, is_tag)
        self._calls()
        if verdict == "more":
            if self._call is None:
                self._block.append(text)
            return
        in_fence = isinstance(self._body, UntaggedBody) and not self._body.bare
        if is_tag and (text in self._openings or (text == FENCE and not in_fence)):
            # The next one begins where this one should have ended.
            if verdict == "end":
                self._close("", closed=False)
            else:
                self._break("")
            self._in_content(text, is_tag)
        elif verdict == "end":
            self._close(text, closed=True)
        else:
            self._break(text, is_tag)

    def _close(self, text: str, closed: bool) -> None:
        """The call ends with ``text``, its closing tag, or where it must end without one."""
        try:
            self._body.read(closed)
        except ValueError:
            self._break(text, is_tag=closed)
            return
        self._calls()
        ends_function = isinstance(self._body, FunctionBody) and text.endswith(END_FUNCTION)
        self._state = "after_function" if ends_function else "outside"
        self._content.tag()
        rest = self._body.rest()
        if isinstance(self._body, UntaggedBody):
            self._in_code = False
        elif END_CALL.startswith(rest.strip()):
            rest = ""  # half a tag
        self._say(self._content.push(rest))

    def _calls(self) -> None:
        """What the body says of its calls."""
        for said in self._body.said():
            if said.name:
                self._call = CallWriter(self._count, said.name)
                self._count += 1
                self._block = []
            assert self._call is not None
            self._parts.append(self._call.push(said.arguments))
            if said.ends:
                self._parts.append(self._call.end())
                self._call = None

    def _break(self, text: str, is_tag: bool = False) -> None:
        """It was no call, or only the beginning of one: what was not given out as such is content."""
        if self._call is None:
            self._state = "outside"
            if isinstance(self._body, UntaggedBody):
                self._in_code = self._body.opened
            elif self._block[0] == CALL:
                self._parts.append(CallEnd(None, broken=True))
            self._say(self._content.push("".join(self._block) + text))
            return
        self._parts.append(self._call.end(broken=True))
        self._call, self._state = None, "after_broken"
        self._content.tag()
        self._say(self._content.push(self._body.rest()))
        if is_tag:
            self._in_content(text, is_tag)


_BRACKETS = ("{", "[")
_OPENED = Tags("{", FUNCTION, CALL, FENCE)
