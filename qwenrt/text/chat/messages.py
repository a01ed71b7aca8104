"""OpenAI-shaped messages and tools, checked: the input of every chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenrt.errors import RequestError, shown

ROLES = ("system", "user", "assistant", "tool", "function", "developer")


@dataclass(frozen=True)
class Call:
    """One call of an assistant message. ``arguments``: JSON text, or the object itself, as it was given."""

    name: str
    arguments: str | Mapping[str, Any]
    id: object = None


@dataclass(frozen=True)
class Message:
    """One checked message. "developer" has become "system"; "function" is the older name of "tool".

    ``text``: the content as it was given, text parts joined, empty for None. ``reasoning``: None where the
    message has none of its own (it may still stand in the text, between <think> tags).
    """

    role: str
    text: str
    calls: tuple[Call, ...] = ()
    tool_call_id: object = None
    reasoning: str | None = None
    name: str | None = None


def check_messages(messages: object) -> list[Message]:
    """The messages, each checked by itself; the chat format checks their order."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise RequestError(
            "messages",
            f"got {type(messages).__name__}",
            "Pass a list of {'role': ..., 'content': ...}.",
        )
    return [_checked(f"messages[{index}]", message) for index, message in enumerate(messages)]


def given_tools(tools: object) -> list[Any] | None:
    """``tools`` as a caller passed them: a list of what `check_tools` accepts, None for none."""
    if tools is None:
        return None
    check_tools(tools)
    return list(tools) or None  # type: ignore[call-overload,no-any-return]


def check_tools(tools: object) -> list[Mapping[str, Any]]:
    """The functions that ``tools`` describe, unwrapped from OpenAI's {"type": "function", "function": ...}."""
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise RequestError("tools", f"got {type(tools).__name__}", "Pass a list of function descriptions.")
    functions = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if isinstance(tool, Mapping) and "function" in tool:
            kind = tool.get("type", "function")
            if not isinstance(kind, str) or kind != "function":
                raise RequestError(where, f"type is {shown(kind)}", "Supported is: 'function'.")
            tool = tool["function"]
        functions.append(_function(where, tool))
    return functions


def _function(where: str, tool: object) -> Mapping[str, Any]:
    """A description of a function, of which an answer's calls need the name and the schema of its parameters. Qwen-1's
    own have name_for_model, and a list of parameters."""
    if not isinstance(tool, Mapping):
        raise RequestError(where, f"got {type(tool).__name__}", "Pass a dict that describes a function.")
    name, parameters = tool.get("name_for_model"), tool.get("parameters")
    if not isinstance(name, str) or not name:
        name = tool.get("name")
    if not isinstance(name, str) or not name:
        found = "it has no name" if name is None else f"its name is {shown(name)}"
        raise RequestError(where, found, "Pass {'type': 'function', 'function': {'name': str, ...}}.")
    if not isinstance(parameters, Mapping | list | tuple | None):
        found = f"the parameters of {shown(name)} are {shown(parameters)}"
        raise RequestError(where, found, "Pass a JSON schema, {'type': 'object', 'properties': {...}}.")
    return tool


def out_of_place(role: str) -> RequestError:
    """A tool's result where no call can have been."""
    return RequestError(
        "Invalid request", f"Expecting role assistant before role {role}", "A tool's result follows its call."
    )


def unmatched(result: Message, calls: int) -> RequestError:
    """A tool's result whose tool_call_id is that of none of the calls before it."""
    return RequestError(
        "Invalid request",
        f"tool_call_id {shown(result.tool_call_id)} matches none of {calls} calls",
        "Answer each tool call with one tool message that carries its id.",
    )


def _checked(where: str, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(where, f"got {type(message).__name__}", "Pass {'role': ..., 'content': ...}.")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(where, f"role is {shown(role)}", f"Known roles are: {', '.join(ROLES)}.")
    calls = _calls(where, message) if role == "assistant" else ()
    reasoning = message.get("reasoning_content") if role == "assistant" else None
    if reasoning is not None and not isinstance(reasoning, str):
        raise RequestError(f"{where}: reasoning_content", f"got {type(reasoning).__name__}", "Pass a str.")
    name = message.get("name")
    return Message(
        "system" if role == "developer" else str(role),
        _content(where, message.get("content")),
        calls,
        _id(f"{where}: tool_call_id", message.get("tool_call_id")),
        reasoning,
        name if isinstance(name, str) else None,
    )


def _content(where: str, content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise RequestError(
            f"{where}: content",
            f"got {type(content).__name__}",
            "Pass a str, a list of text parts, or None.",
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind != "text" or not isinstance(text, str):
            raise RequestError(f"{where}: content", f"a part of type {shown(kind)}", "Only text is read.")
        texts.append(text)
    return "".join(texts)


def _id(where: str, value: object) -> str | int | None:
    if value is None or isinstance(value, (str, int)):
        return value
    raise RequestError(where, f"got {shown(value)}", "Pass a str.")


def _calls(where: str, message: Mapping[str, Any]) -> tuple[Call, ...]:
    """The calls of an assistant message, from ``tool_calls`` or the older ``function_call``."""
    given = message.get("tool_calls")
    if given is None:
        given = [{"function": message["function_call"]}] if message.get("function_call") is not None else []
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RequestError(f"{where}: tool_calls", f"got {type(given).__name__}", "Pass a list.")
    calls = []
    for call in given:
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name or not isinstance(arguments, (str, Mapping)):
            raise RequestError(
                f"{where}: tool call",
                f"got {shown(call, 120)}",
                "A call is {'type': 'function', 'function': {'name': str, 'arguments': str}}.",
            )
        calls.append(Call(name, arguments, _id(f"{where}: id of a call", call.get("id"))))
    return tuple(calls)
