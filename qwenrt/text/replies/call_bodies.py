"""What stands inside a tool call's tags: a JSON object (Hermes) or a function with parameters (Qwen3-Coder)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from qwenrt.text.replies.reply import tool_call
from qwenrt.text.replies.schema_values import ParameterSchema
from qwenrt.text.replies.strict_json import read_json, unique_keys, write_json
from qwenrt.text.replies.tags import Tags

CALL, END_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
FENCE = "```"

Verdict = Literal["more", "end", "broken"]


class Body(Protocol):
    """Parses the text between the tags of one call; the caller keeps the text, in case it is no call."""

    @property
    def tags(self) -> Tags:
        """What to look for next."""

    def take(self, text: str, is_tag: bool) -> Verdict:
        """The next run or tag. "end": it is the last tag of the call; "broken": this cannot be a call."""

    def read(self, closed: bool) -> tuple[list[dict[str, Any]], str]:
        """The calls, and the text that stands behind them where the closing tag is missing. ValueError: no call."""


class JsonBody:
    """``{"name": ..., "arguments": {...}}`` up to the tag that ends the call. Its first brace was read.

    A tag inside a JSON string is part of the string. But no JSON string holds a raw newline, so a tag that
    begins a line ends the call in any case: one quote too few must not swallow the calls that follow.
    """

    tags = Tags(CALL, END_CALL)

    def __init__(self) -> None:
        self._text = ["{"]
        self._since_tag = ["{"]
        self._quotes = 0

    def take(self, text: str, is_tag: bool) -> Verdict:
        if is_tag and self._is_end():
            return "end"
        self._text.append(text)
        self._since_tag.append(text)
        return "more"

    def _is_end(self) -> bool:
        before, self._since_tag = "".join(self._since_tag), []
        self._quotes += _ESCAPED.sub("", before).count('"')
        return self._quotes % 2 == 0 or before.rstrip(" \t").endswith("\n")

    def read(self, closed: bool) -> tuple[list[dict[str, Any]], str]:
        text = "".join(self._text)
        body, end = read_json(text)
        rest = text[end:]
        if closed and rest.strip():
            raise ValueError("more than one JSON object")
        return [call_of(body)], rest


def call_of(body: Any) -> dict[str, Any]:
    """The call that ``{"name": ..., "arguments": ...}`` means. ValueError: none."""
    if not isinstance(body, dict):
        raise ValueError("no object")
    name, arguments = body.get("name"), body.get("arguments", body.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        inner = arguments.strip()
        arguments, end = read_json(inner)
        if inner[end:]:
            raise ValueError("arguments are a text that is not JSON")
    if not isinstance(name, str) or not name or not isinstance(arguments or {}, dict):
        raise ValueError("no name, or arguments that are no object")
    name.encode()  # a half surrogate pair could never be sent on; UnicodeEncodeError is a ValueError
    return tool_call(name, write_json(arguments or {}))


class FunctionBody:
    """``<function=NAME>``, then ``<parameter=KEY>``, newline, value, newline, ``</parameter>`` and so on.

    The opening tag was read. A value is everything up to ``</parameter>``, other tags included, except that a
    line that begins with ``<parameter=`` or ``</function>`` ends it too: models leave closing tags out. Between
    the parameters only white space may stand; the first other character shows that this is no call.

    ``tools``: parameter schemas by the tool's name, to type the values by; without one a value is a string.
    ``known_only``: the name must be one of the tools (where there are any).
    """

    _BETWEEN = Tags(PARAMETER, END_FUNCTION, END_CALL, CALL, FUNCTION, FENCE)
    _IN_VALUE = Tags(END_PARAMETER, "\n" + PARAMETER, "\n" + END_FUNCTION)

    def __init__(self, tools: Mapping[str, ParameterSchema], known_only: bool) -> None:
        self._tools = tools
        self._known_only = known_only and bool(tools)
        self._head = ""
        self._name = ""
        self._parameters: list[list[str]] = []  # each "KEY>\nVALUE\n", in parts
        self._in_value = False

    @property
    def tags(self) -> Tags:
        return self._IN_VALUE if self._in_value else self._BETWEEN

    def take(self, text: str, is_tag: bool) -> Verdict:
        if self._in_value and not is_tag:
            self._parameters[-1].append(text)
        elif not is_tag:
            return "more" if self._is_space(text) else "broken"
        elif not self._name:
            return "broken"
        else:
            return self._tag(text)
        return "more"

    def _tag(self, tag: str) -> Verdict:
        if tag.startswith("\n"):
            self._parameters[-1].append("\n")
        tag = tag.removeprefix("\n")
        self._in_value = tag == PARAMETER
        if self._in_value:
            self._parameters.append([])
        if tag in (CALL, FUNCTION, FENCE):
            return "broken"
        return "end" if tag in (END_FUNCTION, END_CALL) else "more"

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

    def read(self, closed: bool) -> tuple[list[dict[str, Any]], str]:
        if not closed:
            raise ValueError("cut off: a parameter may be missing")
        schema = self._tools.get(self._name, ParameterSchema({}))
        pairs = []
        for parts in self._parameters:
            key, bracket, value = "".join(parts).partition(">")
            if not bracket or not _KEY.fullmatch(key):
                raise ValueError("no parameter's name")
            pairs.append((key, schema.value(key, value.removeprefix("\n").removesuffix("\n"))))
        return [tool_call(self._name, write_json(unique_keys(pairs)))], ""


_ESCAPED = re.compile(r"\\.", re.DOTALL)
_NAME = re.compile(r"[^\s<>]{1,256}")
_KEY = re.compile(r"[^<>\n]+")
