"""Which tools a model is shown, and which it has to call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenrt.errors import RequestError, shown


@dataclass(frozen=True)
class ToolChoice:
    """``tools``: those that the model is shown, None for none. ``must``: whether an answer has to call one; ``name``:
    which, None where it may choose."""

    tools: list[Any] | None
    must: bool = False
    name: str | None = None


def chosen_tools(tools: list[Any] | None, choice: object) -> ToolChoice:
    """``choice`` as LLM.chat takes it: None or "auto", "none", "required", {"type": "function", "function": {"name":
    ...}} or {"name": ...}. All tools are shown also where one is named: the prompt stays what it was. RequestError for
    anything else, and for a tool that is not there."""
    if choice is None or choice == "auto":
        return ToolChoice(tools)
    if choice == "none":
        return ToolChoice(None)
    name = None if choice == "required" else _named(choice)
    if not tools:
        raise RequestError(f"tool_choice={shown(choice)}", "there are no tools", "Pass tools to choose from.")
    names = [_name_of(tool) for tool in tools]
    if name is not None and name not in names:
        raise RequestError(
            f"tool_choice names {shown(name)}",
            f"the tools are {shown(names)}",
            "Name one of them.",
        )
    return ToolChoice(tools, must=True, name=name)


def _named(choice: object) -> str:
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    kind = choice.get("type", "function") if isinstance(choice, Mapping) else None
    if not isinstance(name, str) or not name or kind not in ("function", "tool"):
        raise RequestError(
            f"tool_choice={shown(choice)}",
            "it is none of the known ones",
            'Use "auto", "none", "required" or {"type": "function", "function": {"name": ...}}.',
        )
    return name


def _name_of(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name_for_model") or function.get("name"))
