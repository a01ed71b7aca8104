"""Tools of OpenAI's Responses as functions that a model knows, and its calls of these as the items a client expects.

A namespace's tools become functions with joined names; a custom tool, which takes any text, becomes a function with
one string. What only the vendor's servers have is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from qwenrt.errors import shown
from qwenrt.outputs import CallDelta
from qwenrt.text.dialects import decoding
from qwenrt.text.dialects.decoding import bad

INPUT = "input"  # the one argument of a custom tool
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Format(Struct):
    """What a custom tool takes."""

    type: str = "text"
    syntax: str = ""
    definition: str = ""


class Tool(Struct, omit_defaults=True):
    """A tool: function, custom, or a namespace of such. All others are hosted by the vendor."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: Format | None = None
    tools: list[Tool] | None = None


class Named(Struct):
    """A tool as a choice names it."""

    type: str = ""
    name: str = ""
    namespace: str | None = None


class ToolChoice(Struct):
    """A choice that is more than a word."""

    type: str
    name: str = ""
    namespace: str | None = None
    mode: str = "auto"
    tools: list[Named] = []


@dataclass(frozen=True)
class Name:
    """What a client calls a tool."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(frozen=True)
class Tools:
    """``functions`` in OpenAI's older shape, by whose names ``names`` has the client's own; ``ignored``: the types that
    are not served."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    names: Mapping[str, Name] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def joined(name: str, namespace: str | None) -> str:
    """The name of a function for a tool of a namespace: "mcp__files" and "read" are "mcp__files__read"."""
    if not namespace:
        return name
    return f"{namespace}{'' if namespace.endswith('__') else '__'}{name}"


def served_tools(tools: Sequence[Tool]) -> Tools:
    """The tools that a model can be given. Raises Problem for one whose name or schema is none."""
    functions: list[dict[str, Any]] = []
    names: dict[str, Name] = {}
    ignored: list[str] = []
    for i, tool in enumerate(tools):
        if tool.type != "namespace":
            _serve(tool, None, f"tools[{i}]", functions, names, ignored)
            continue
        decoding.tool_name(tool.name or "", f"tools[{i}].name")
        for j, inner in enumerate(tool.tools or ()):
            _serve(inner, tool.name, f"tools[{i}].tools[{j}]", functions, names, ignored)
    decoding.at_most("tools", functions, decoding.MAX_TOOLS)
    return Tools(functions, names, tuple(dict.fromkeys(ignored)))


def _serve(
    tool: Tool,
    namespace: str | None,
    place: str,
    functions: list[dict[str, Any]],
    names: dict[str, Name],
    ignored: list[str],
) -> None:
    if tool.type not in ("function", "custom"):
        ignored.append(tool.type if _WORD.fullmatch(tool.type) else "tool")
        return
    custom = tool.type == "custom"
    own = decoding.tool_name(tool.name or "", f"{place}.name")
    name = decoding.tool_name(joined(own, namespace), f"{place}.name")
    if name in names:
        raise bad(f"{place}.name", f"{shown(name)} is there twice", "Give each tool a name of its own.")
    names[name] = Name(own, namespace, custom)
    functions.append(
        {"type": "function", "function": _custom(name, tool) if custom else _function(name, tool)}
    )


def _function(name: str, tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    if tool.strict:
        function["strict"] = True
    return function


def _custom(name: str, tool: Tool) -> dict[str, Any]:
    description = tool.description or ""
    if tool.format is not None and tool.format.definition:
        described = (
            f"The input must follow this {tool.format.syntax or 'grammar'} grammar:\n{tool.format.definition}"
        )
        description = f"{description}\n\n{described}" if description else described
    schema = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT]}
    return {"name": name, "description": description, "parameters": schema}


def chosen(
    choice: str | ToolChoice | None, tools: Tools
) -> tuple[str | dict[str, str], list[dict[str, Any]]]:
    """Ask.tool_choice, and the tools that the choice leaves. Raises Problem for a tool that is not there. A choice of
    what is not served here is left to the model."""
    if choice is None or isinstance(choice, str):
        word = choice or "auto"
        if word not in ("auto", "none", "required"):
            raise bad("tool_choice", f"got {shown(word)}", "Known are auto, none and required.")
        if word == "required" and not tools.functions:
            if not tools.ignored:
                raise bad("tool_choice", "required without tools", "Send the tools to choose from.")
            word = "auto"
        return word, tools.functions
    if choice.type in ("function", "custom"):
        name = joined(choice.name, choice.namespace)
        return decoding.chosen_tool(name, tools.functions, "tool_choice.name"), tools.functions
    if choice.type == "allowed_tools":
        return _allowed(choice, tools)
    return "auto", tools.functions


def _allowed(choice: ToolChoice, tools: Tools) -> tuple[str | dict[str, str], list[dict[str, Any]]]:
    if choice.mode not in ("auto", "required"):
        raise bad("tool_choice.mode", f"got {shown(choice.mode)}", "Known are auto and required.")
    allowed = set()
    for k, named in enumerate(choice.tools):
        if named.type in ("function", "custom"):
            name = joined(named.name, named.namespace)
            decoding.chosen_tool(name, tools.functions, f"tool_choice.tools[{k}].name")
            allowed.add(name)
    left = [tool for tool in tools.functions if tool["function"]["name"] in allowed]
    if not left:
        return "none", tools.functions
    return choice.mode, left


def arguments_of_custom(text: str) -> str:
    """The arguments of a function, for the input of a custom tool's call."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def input_of_custom(arguments: str) -> str:
    """The input that the arguments of a custom tool's function hold. Arguments of another shape are the input as they
    are: the tool takes any text."""
    try:
        value = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments
    text = value.get(INPUT) if isinstance(value, dict) and len(value) == 1 else None
    return text if isinstance(text, str) else arguments


def call_item(call: CallDelta, names: Mapping[str, Name], item_id: str, status: str) -> dict[str, Any]:
    """The item of a call, under the client's own name for the tool."""
    known = names.get(call.name, Name(call.name))
    item = {
        "id": item_id,
        "type": "custom_tool_call" if known.custom else "function_call",
        "status": status,
        "call_id": call.id,
        "name": known.name,
    }
    if known.namespace is not None:
        item["namespace"] = known.namespace
    if known.custom:
        item[INPUT] = input_of_custom(call.arguments) if call.arguments else ""
    else:
        item["arguments"] = call.arguments
    return item
