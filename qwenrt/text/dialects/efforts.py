"""The words by which clients say how long a model may think, as budgets."""

from __future__ import annotations

from qwenrt.errors import shown
from qwenrt.text.dialects.problem import Problem

# Tokens of thought; None is as long as the model likes, 0 is none at all.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 4096,
    "high": None,
    "xhigh": None,
    "max": None,
}


def thought(effort: str, param: str) -> tuple[bool, int | None]:
    """Ask.enable_thinking and Ask.thinking_budget for a word such as "low". Raises Problem for an unknown one, which
    stands at the JSON path ``param``."""
    if effort not in EFFORTS:
        raise Problem(
            "invalid_request",
            f"{param}: got {shown(effort)}. Known are: {', '.join(EFFORTS)}.",
            param=param,
        )
    budget = EFFORTS[effort]
    return budget != 0, budget or None
