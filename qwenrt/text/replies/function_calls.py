"""Qwen3-Coder's calls, a function with parameters between tags, read as they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from qwenrt.text.replies.call_bodies import (
    CALL,
    END_CALL,
    END_FUNCTION,
    END_PARAMETER,
    FENCE,
    FUNCTION,
    PARAMETER,
    CallText,
    Verdict,
)
from qwenrt.text.replies.schema_values import ParameterSchema
from qwenrt.text.replies.strict_json import escaped, write_json
from qwenrt.text.replies.tags import Tags


class FunctionBody:
    """``<function=NAME>``, then ``<parameter=KEY>``, newline, value, newline, ``</parameter>`` and so on.

    The opening tag was read. A value is everything up to ``</parameter>``, other tags included, except that a
    line that begins with ``<parameter=`` or ``</function>`` ends it too: models leave closing tags out. Between
    the parameters only white space may stand; the first other character shows that this is no call. The call is begun
    when the key of its first parameter was read.

    ``tools``: parameter schemas by the tool's name, to type the values by; without one a value is a string.
    ``known_only``: the name must be one of the tools (where there are any).
    """

    _BETWEEN = Tags(PARAMETER, END_FUNCTION, END_CALL, CALL, FUNCTION, FENCE)
    _IN_VALUE = Tags(END_PARAMETER, "\n" + PARAMETER, "\n" + END_FUNCTION)
    # What may be looked for behind a key that is none, and behind one that is.
    _IN_KEY = Tags(END_PARAMETER, "\n" + PARAMETER, "\n" + END_FUNCTION, END_CALL, CALL, FUNCTION, FENCE)

    def __init__(self, tools: Mapping[str, ParameterSchema], known_only: bool) -> None:
        self._tools = tools
        self._known_only = known_only and bool(tools)
        self._head = ""
        self._name = ""
        self._place: Literal["between", "key", "value"] = "between"
        self._keys: set[str] = set()
        self._key: list[str] = []
        self._value = ParameterValue(ParameterSchema({}), "")
        self._said: list[CallText] = []
        self._rest = ""

    @property
    def tags(self) -> Tags:
        return {"between": self._BETWEEN, "key": self._IN_KEY, "value": self._IN_VALUE}[self._place]

    def take(self, text: str, is_tag: bool) -> Verdict:
        if is_tag and self._place == "key":
            self._rest = PARAMETER + "".join(self._key)
            return "broken"
        if is_tag:
            return self._tag(text) if self._name else "broken"
        if self._place == "value":
            self._say(self._value.push(text))
        elif self._place == "key":
            return "more" if self._takes_key(text) else "broken"
        elif not self._is_space(text):
            self._rest = text.lstrip()
            return "broken"
        return "more"

    def said(self) -> list[CallText]:
        said, self._said = self._said, []
        return said

    def rest(self) -> str:
        return self._rest

    def read(self, closed: bool) -> None:
        if not closed:
            raise ValueError("cut off: a parameter may be missing")
        self._said.append(CallText("}", ends=True) if self._keys else CallText("{}", self._name, ends=True))

    def _say(self, arguments: str) -> None:
        if arguments:
            self._said.append(CallText(arguments))

    def _tag(self, tag: str) -> Verdict:
        if self._place == "value":
            if tag.startswith("\n"):
                self._say(self._value.push("\n"))
            self._say(self._value.finish())
        tag = tag.removeprefix("\n")
        self._place, self._key = ("key", []) if tag == PARAMETER else ("between", [])
        if tag in (CALL, FUNCTION, FENCE):
            return "broken"
        return "end" if tag in (END_FUNCTION, END_CALL) else "more"

    def _takes_key(self, text: str) -> bool:
        key, bracket, value = text.partition(">")
        self._key.append(key)
        if not bracket and not _NO_KEY.search(key):
            return True
        key = "".join(self._key)
        if not key or _NO_KEY.search(key) or key in self._keys:
            self._rest = PARAMETER + key + bracket + value
            return False
        begins = not self._keys
        self._keys.add(key)
        self._place, self._value = "value", ParameterValue(self._tools.get(self._name), key)
        written = ("{" if begins else ", ") + write_json(key) + ": "
        self._said.append(CallText(written + self._value.push(value), self._name if begins else ""))
        return True

    def _is_space(self, text: str) -> bool:
        """Whether the text between two tags may stand there; the function's name is read from the first."""
        if not self._name:
            self._head += text
            name, bracket, text = self._head.partition(">")
            if not bracket:
                return _NAME.fullmatch(name) is not None
            if not _NAME.fullmatch(name) or (self._known_only and name not in self._tools):
                return False
            self._name = name
        return not text.strip()


class ParameterValue:
    """The value of one parameter, as JSON in pieces: ``write_json`` of what its schema makes of the text.

    The text is without one newline at either end. A string is given as it comes; what may be something else, at its
    end.
    """

    def __init__(self, schema: ParameterSchema | None, key: str) -> None:
        self._schema, self._key = schema or ParameterSchema({}), key
        self._is_string = self._schema.only_text(key)
        self._opened = False  # the quote was given
        self._begun = False
        self._newline = ""  # may be the last
        self._held: list[str] = []
        self._visible = ""  # how what is held begins

    def push(self, text: str) -> str:
        """More of the text; returns what can be given."""
        if not text:
            return ""
        if not self._begun:
            self._begun, text = True, text.removeprefix("\n")
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if not self._is_string:
            self._held.append(text)
            self._is_string = self._shows_string(text)
            if not self._is_string:
                return ""
            text = "".join(self._held)
        return self._quote() + escaped(text)

    def finish(self) -> str:
        """The end of it: what was not given yet."""
        if self._is_string:
            return self._quote() + '"'
        return write_json(self._schema.value(self._key, "".join(self._held)))

    def _quote(self) -> str:
        opened, self._opened = self._opened, True
        return "" if opened else '"'

    def _shows_string(self, text: str) -> bool:
        """Whether, with this behind what was held before, the value can only be a string."""
        if len(self._visible) > _LONGEST_WORD or not text.strip():
            self._visible += " " if self._visible and text else ""
            return False
        self._visible += text[: _LONGEST_WORD + 1] if self._visible else text.lstrip()[: _LONGEST_WORD + 1]
        return not self._schema.may_be_other(self._key, self._visible)


_LONGEST_WORD = 8
_NAME = re.compile(r"[^\s<>]{1,256}")
_NO_KEY = re.compile(r"[<\n]")
