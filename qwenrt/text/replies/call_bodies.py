"""What stands inside a tool call's tags: what every form of it has, and what a JSON object means as a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard

from qwenrt.text.replies.strict_json import read_json, write_json
from qwenrt.text.replies.tags import Tags

CALL, END_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
FENCE = "```"

Verdict = Literal["more", "end", "broken"]


@dataclass(frozen=True)
class CallText:
    """The next of what a body says of its calls: one with a ``name`` begins a call; the last one of a call ``ends``."""

    arguments: str
    name: str = ""
    ends: bool = False


class Body(Protocol):
    """Parses the text between the tags of one call; the caller keeps the text, in case it is no call.

    A call is begun as soon as it is certain what it calls and that its arguments are an object. The last brace of
    these is said when the call is known to be whole.
    """

    @property
    def tags(self) -> Tags:
        """What to look for next."""

    def take(self, text: str, is_tag: bool) -> Verdict:
        """The next run or tag. "end": it is the last tag of the call; "broken": this cannot be a call."""

    def said(self) -> list[CallText]:
        """What is certain since it was last asked for."""

    def read(self, closed: bool) -> None:
        """The end, with or without its closing tag: the rest of the calls can be said. ValueError: no call."""

    def rest(self) -> str:
        """The text behind the call, or behind the place where one that was begun broke."""


def call_of(body: Any) -> CallText:
    """The call that ``{"name": ..., "arguments": ...}`` means. ValueError: none."""
    if not isinstance(body, dict):
        raise ValueError("no object")
    name, arguments = body.get("name"), body.get("arguments", body.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        inner = arguments.strip()
        arguments, end = read_json(inner)
        if inner[end:]:
            raise ValueError("arguments are a text that is not JSON")
    if not is_name(name) or not isinstance(arguments or {}, dict):
        raise ValueError("no name, or arguments that are no object")
    return CallText(write_json(arguments or {}), name, ends=True)


def is_name(name: Any) -> TypeGuard[str]:
    """Whether it can be a tool's. Half a surrogate pair could never be sent on."""
    return isinstance(name, str) and bool(name) and not any("\ud800" <= char <= "\udfff" for char in name)
