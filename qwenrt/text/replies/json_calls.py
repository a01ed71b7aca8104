"""The JSON object of a Hermes call, read as it is written."""

from __future__ import annotations

import json
from typing import Literal

from qwenrt.text.replies.call_bodies import (
    CALL,
    END_CALL,
    FENCE,
    FUNCTION,
    CallText,
    Verdict,
    call_of,
    is_name,
)
from qwenrt.text.replies.json_rewriter import JsonRewriter
from qwenrt.text.replies.strict_json import read_json
from qwenrt.text.replies.tags import Tags


class JsonBody:
    """``{"name": ..., "arguments": {...}}`` up to the tag that ends the call. Its first brace was read.

    The call is begun when the name and the brace of the arguments were read, in either order. Arguments in another
    form (a text that holds JSON, nothing at all) are said at the end. A tag inside a JSON string is part of the string.
    But no JSON string holds a raw newline, so a tag that begins a line ends the call in any case: one quote too few
    must not swallow the calls that follow.
    """

    tags = Tags(CALL, END_CALL, FUNCTION, FENCE)

    def __init__(self) -> None:
        self._state: Literal["first", "next", "key", "colon", "value", "after", "complete", "broken"] = (
            "first"
        )
        self._keys: set[str] = set()
        self._key = ""
        self._value = JsonRewriter()
        self._written: list[str] = []  # of the name or key that is read
        self._name: str | None = None
        self._arguments: list[str] = []  # read before the name
        self._begun_with = ""  # the key of the arguments that were begun
        self._said: list[CallText] = []
        self._rest: list[str] = []
        self._at_line_start = False

    def take(self, text: str, is_tag: bool) -> Verdict:
        if is_tag and text in (CALL, END_CALL) and (not self._value.in_string or self._at_line_start):
            return "end"
        line = text.rpartition("\n")
        self._at_line_start = not is_tag and not line[2].strip(" \t") and bool(line[1] or self._at_line_start)
        if is_tag and not self._value.in_string and self._state != "complete":
            self._rest.append(self._value.held())
            return "broken"
        at = 0
        while at < len(text) and self._state not in ("complete", "broken"):
            at = self._in_value(text, at) if self._state in ("key", "value") else self._between(text, at)
        if at < len(text):
            self._rest.append(text[at:])
        return "broken" if self._state == "broken" else "more"

    def said(self) -> list[CallText]:
        said, self._said = self._said, []
        return said

    def rest(self) -> str:
        return "".join(self._rest)

    def read(self, closed: bool) -> None:
        if self._state != "complete":
            raise ValueError("cut off")
        if closed and self.rest().strip():
            raise ValueError("more than one JSON object")
        if self._begun_with:
            self._said.append(CallText("}", ends=True))
            return
        arguments = "".join(self._arguments)
        self._said.append(
            call_of({"name": self._name, "arguments": read_json(arguments)[0] if arguments else None})
        )

    def _between(self, text: str, at: int) -> int:
        char = text[at]
        if char in " \t\n\r":
            return at + 1
        if char == '"' and self._state in ("first", "next"):
            self._state, self._value, self._written = "key", JsonRewriter(), []
            return at  # the string is read with its quote
        if char == "}" and self._state in ("first", "after"):
            self._state = "complete"
        elif char == "," and self._state == "after":
            self._state = "next"
        elif char == ":" and self._state == "colon":
            self._state, self._value, self._written = "value", JsonRewriter(), []
        else:
            return self._break(at)
        return at + 1

    def _break(self, at: int) -> int:
        self._state = "broken"
        return at

    def _in_value(self, text: str, at: int) -> int:
        at = self._value.push(text, at)
        written = self._value.take()
        if self._value.broken:
            self._say(written)
            self._rest.append(self._value.held())
            return self._break(at)
        if self._state == "key":
            self._written.append(written)
            if self._value.done and not self._ended_key():
                self._rest += self._written
                return self._break(at)
            return at
        if self._key in _ARGUMENTS:
            self._say(written)
        elif self._key == "name":
            self._written.append(written)
        if self._value.done:
            self._state = "after"
            if self._key == "name" and not self._ended_name():
                return self._break(at)
        return at

    def _ended_key(self) -> bool:
        """Whether this key may stand here."""
        key = self._key = json.loads("".join(self._written))
        twice = key in self._keys or (key == "arguments" and self._begun_with != "")
        self._keys.add(key)
        self._state = "colon"
        if key in _ARGUMENTS and self._are_arguments():
            self._arguments = []
        return not twice

    def _are_arguments(self) -> bool:
        """Whether the key that was last read has the call's arguments."""
        return self._key == "arguments" or (self._key == "parameters" and "arguments" not in self._keys)

    def _ended_name(self) -> bool:
        name = json.loads("".join(self._written))
        if not is_name(name):
            return False
        self._name = name
        if self._arguments and self._arguments[0].startswith("{"):
            key = "arguments" if "arguments" in self._keys else "parameters"
            self._begin(key, "".join(self._arguments)[:-1])
        return True

    def _begin(self, key: str, arguments: str) -> None:
        self._begun_with = key
        self._said.append(CallText(arguments, self._name or ""))

    def _say(self, written: str) -> None:
        """More of the arguments; the last brace waits."""
        if not written or self._state != "value" or not self._are_arguments():
            return
        if self._begun_with == self._key or (self._name is not None and self._opens(written)):
            written = written[:-1] if self._value.done else written
            if not self._begun_with:
                self._begin(self._key, written)
            elif written:
                self._said.append(CallText(written))
        else:
            self._arguments.append(written)

    def _opens(self, written: str) -> bool:
        return not self._arguments and written.startswith("{")


_ARGUMENTS = ("arguments", "parameters")
