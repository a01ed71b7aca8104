"""In which form a model thinks and calls tools: what the prompt taught it, and how its answer is read."""

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
