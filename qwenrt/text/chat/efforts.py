"""How long a model may think before it answers, and the one word for that: reasoning_effort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from qwenrt.errors import RequestError, shown

Thinking = Literal["never", "optional", "always"]

# From least to most, each in tokens of thought; None is as long as the model likes, 0 is none at all.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 4096,
    "high": None,
    "xhigh": None,
    "max": None,
}


class ThoughtWish(NamedTuple):
    """What a request says about the thought before its answer; None where it says nothing.

    enable: whether there is to be one. budget: the longest, in tokens. effort: one of EFFORTS.
    """

    enable: bool | None = None
    budget: int | None = None
    effort: str | None = None


NO_WISH = ThoughtWish()


def resolved(wish: ThoughtWish, thinking: Thinking, known: Sequence[str]) -> ThoughtWish:
    """``wish`` as a model can be told it: ``effort`` is a word for its template, or None.

    An effort turns thinking on, or off where it is "none"; what ``enable`` and ``budget`` say goes before it. Where the
    chat template knows efforts (``known``, least first, as of Qwen3.8) it is told the nearest, a larger one rather than
    a smaller, and no budget cuts what it was taught; elsewhere the effort is the budget that EFFORTS says.
    ``thinking``: whether the model thinks, as Prompter.thinking. Raises RequestError for unknown words, and for an
    effort of a model that does not think.
    """
    effort, enable = wish.effort, wish.enable
    if effort is None:
        return wish
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise RequestError("reasoning_effort", f"got {shown(effort)}", f"Known are: {', '.join(EFFORTS)}.")
    if thinking == "never":
        if effort != "none":
            asked = f"reasoning_effort={effort!r}"
            raise RequestError(asked, "this model does not think", 'Leave it out, or use "none".')
        return wish._replace(effort=None)
    if enable is None and (effort == "none" or thinking == "optional"):
        enable = effort != "none"
    if enable is False or effort == "none":
        return ThoughtWish(enable, wish.budget)
    if known:
        return ThoughtWish(enable, wish.budget, _nearest(effort, known))
    return ThoughtWish(enable, EFFORTS[effort] if wish.budget is None else wish.budget)


def _nearest(effort: str, known: Sequence[str]) -> str:
    order = list(EFFORTS)
    return next((word for word in known if order.index(word) >= order.index(effort)), known[-1])
