"""What one request asks for, whatever dialect it was said in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ask:
    """One request to write: a conversation to answer, or prompts to continue; and its wishes.

    messages: OpenAI's shape, already free of what is not prompt, and continued where they end with the assistant's;
    None where ``prompts`` (texts or token ids) are to be continued. tools: OpenAI's shape, {"type": "function",
    "function": {...}}. tool_choice: "auto", "none", "required", or {"name": ...} for a named tool. sampling: fields of
    SamplingParams that the request sets, under their own names and as it gave them; what it leaves out is the
    checkpoint's. max_tokens is among them, as asked: the server cuts what does not fit.

    model: the name that was asked for, which decides nothing. enable_thinking, thinking_budget, reasoning_effort (of
    chat.efforts): None where the request says nothing. before: token ids that stand in front of a conversation's
    prompt. ignored: what was asked for and is not served (names of hosted tools), told in the header
    x-qwenrt-ignored. priority: 0 to 9, larger is sooner. progress: how far the prompt is computed is to be told.
    extra: what only the dialect's own writer needs.
    """

    model: str = ""
    messages: Sequence[dict[str, Any]] | None = None
    prompts: Sequence[str | list[int]] = ()
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: str | dict[str, str] = "auto"
    parallel_tool_calls: bool = True
    sampling: dict[str, Any] = field(default_factory=dict)
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    reasoning_effort: str | None = None
    before: tuple[int, ...] = ()
    stream: bool = False
    include_usage: bool = False
    ignored: tuple[str, ...] = ()
    priority: int = 5
    progress: bool = False
    extra: Any = None
