"""Tool calls in JSON without tags, which Qwen2.5-Coder writes where its template asks for <tool_call>."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal

from qwenrt.text.replies.call_bodies import END_CALL, FENCE, CallText, Verdict, call_of
from qwenrt.text.replies.strict_json import read_json
from qwenrt.text.replies.tags import Tags

_KEYS = ("name", "arguments")


class UntaggedBody:
    """``{"name": ..., "arguments": ...}``, one or more, or a list of them, in a fenced block whose opening was read;
    or ``bare`` at the beginning of an answer, whose first bracket was read.

    The block is a call if every object in it has these two keys and no other, the name is one of ``tools`` and nothing
    else stands in it: any other JSON is an answer. It is read character by character, so that a block that is no call
    becomes content at the first character that shows it: its language, its first key, its name. A fence within a
    string of the JSON is part of the string, unless it begins a line, where no JSON string goes on. Bare calls end
    where something else begins. ``openings``: tags that may begin a call of another form. ``may_close``: a code block
    is open, whose end this fence is unless it names JSON.

    opened: as far as it was read, it began a code block that is still open.
    """

    def __init__(
        self, tools: Collection[str], openings: tuple[str, ...], may_close: bool = False, bare: str = ""
    ) -> None:
        self.bare = bool(bare)
        self.tags = Tags(FENCE, *openings, *((END_CALL,) if bare else ()))
        self.opened = not bare
        self._tools, self._may_close = tools, may_close
        self._state: Literal["language", "between", "value"] = "language"
        self._language = ""
        self._text: list[str] = []
        self._head: list[str] | None = []  # of the current object, until its first key and its name are known
        self._depth = 0
        self._in_string = self._escaped = self._at_line_start = False
        self._ticks = 0
        self._rest = ""  # behind bare calls
        self._calls: list[CallText] = []
        if bare:
            self._takes_between(bare)

    def take(self, text: str, is_tag: bool) -> Verdict:
        if is_tag and (not self._in_string or self._at_line_start):
            if self.bare:
                return "end" if self._state == "between" else "broken"
            self.opened = text != FENCE
            ends = text == FENCE and self._state == "between" and bool(self._text) and not self._ticks
            return "end" if ends else "broken"
        for at, char in enumerate(text):
            if not self._takes(char):
                self._rest = text[at:]
                return "end" if self.bare and self._state == "between" else "broken"
        return "more"

    def said(self) -> list[CallText]:
        """All calls, once the block was read: a later object may show that it is none."""
        said, self._calls = self._calls, []
        return said

    def rest(self) -> str:
        return self._rest

    def read(self, closed: bool) -> None:
        """All calls of the block. One that is complete counts where the closing fence is missing."""
        if self._state != "between":
            raise ValueError("cut off")
        text, at = "".join(self._text), 0
        values: list[Any] = []
        while found := _VALUE.search(text, at):
            value, at = read_json(text, found.start())
            values += value if isinstance(value, list) else [value]
        if not values or not all(_is_call(value) and value["name"] in self._tools for value in values):
            raise ValueError("no call of a tool")
        self._calls = [call_of(value) for value in values]

    def _takes(self, char: str) -> bool:
        """Whether the block may still be a call with this character."""
        if self._state == "language":
            return self._takes_language(char)
        if self._state == "between":
            return self._takes_between(char)
        self._text.append(char)
        self._value(char)
        return self._head is None or self._may_be_call(char)

    def _takes_language(self, char: str) -> bool:
        if char.isspace() or char in "{[":
            if not self._language and self._may_close:
                self.opened = False
                return False
            if self._language.lower() not in ("", "json"):
                return False
            self._state = "between"
            return self._takes_between(char)
        self._language += char
        return "json".startswith(self._language.lower())

    def _takes_between(self, char: str) -> bool:
        """Between two values: white space, a comma, or the next one. A text may end with half of the last fence."""
        if char == "`" and not self.bare:
            self._ticks += 1
            return bool(self._text) and self._ticks < len(FENCE)
        if self._ticks:
            return False
        if char.isspace():
            return True
        if char == ",":
            return bool(self._text)
        if char not in "{[":
            return False
        self._state = "value"
        self._text.append(char)
        self._value(char)
        self._head = [char] if char == "{" else []
        return True

    def _value(self, char: str) -> None:
        """Follow the strings and brackets of a value; back to "between" at its end."""
        self._at_line_start = char == "\n" or (self._at_line_start and char in " \t")
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped, self._in_string = char == "\\", char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._state = "between"

    def _may_be_call(self, char: str) -> bool:
        """Whether what was read of the value, the first object of a list included, may begin a call of a tool."""
        assert self._head is not None
        if char.isspace() and not self._in_string:
            return True
        self._head.append(char)
        head = "".join(self._head)
        key = _FIRST_KEY.match(head)
        if key is None:
            return any(f'{{"{known}"'.startswith(head) for known in _KEYS)
        if key[1] != "name":
            self._head = None
            return key[1] == "arguments"
        name = _NAME.fullmatch(head)
        if name is None or not name["closed"]:
            begun = "" if name is None else name["name"] or ""
            known = any(tool.startswith(begun) for tool in self._tools)
            return name is not None and (known or ("\\" in begun and len(begun) < _LONGEST_NAME))
        self._head = None
        return "\\" in name["name"] or name["name"] in self._tools


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == set(_KEYS) and isinstance(value["name"], str)


_LONGEST_NAME = 1024  # characters of a name with escapes
_VALUE = re.compile(r"[{\[]")
# Of a value without the white space between its marks.
_FIRST_KEY = re.compile(r'\{"([a-z]+)"')
_NAME = re.compile(r'\{"name"(:("(?P<name>(?:[^"\\]|\\.)*\\?)(?P<closed>")?)?)?', re.DOTALL)
