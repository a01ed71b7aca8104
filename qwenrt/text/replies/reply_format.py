"""How a model writes thoughts and calls of tools, and so how its answers are parsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReplyFormat:
    """calls: "react" (Qwen-1), "hermes" (JSON in <tool_call>), "xml" (Qwen3-Coder), "none".

    thinking: "none"; "hybrid" (an answer may begin with <think>); "open" (it begins inside the thought).
    """

    calls: Literal["react", "hermes", "xml", "none"]
    thinking: Literal["none", "hybrid", "open"]
