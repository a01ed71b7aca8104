"""What becomes of a request's wishes about thoughts."""

from __future__ import annotations

from collections.abc import Sequence

from qwenrt.text.chat.efforts import ThoughtWish, resolved
from qwenrt.text.dialects.ask import Ask


def thought(ask: Ask, known: Sequence[str] = ()) -> ThoughtWish:
    """Of a model that thinks or not, whose template knows the efforts ``known``."""
    wish = ThoughtWish(ask.enable_thinking, ask.thinking_budget, ask.reasoning_effort)
    return resolved(wish, "optional", known)
