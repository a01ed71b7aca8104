"""How long a model may think, in one word."""

from __future__ import annotations

from typing import Any

import pytest

from qwenrt.errors import RequestError
from qwenrt.text.chat.efforts import EFFORTS, ThoughtWish, resolved

SAYS = ("low", "medium", "xhigh")  # what Qwen3.8's template knows


def wish(effort: Any, thinking: Any = "optional", known: tuple[str, ...] = (), **more: Any) -> ThoughtWish:
    return resolved(ThoughtWish(effort=effort, **more), thinking, known)


def test_no_effort_is_no_thought_and_each_next_word_allows_a_longer_one() -> None:
    assert wish("none") == wish("none", known=SAYS) == (False, None, None)
    budgets = [wish(word) for word in EFFORTS if word != "none"]
    assert all(one.enable and one.effort is None for one in budgets)
    tokens = [float("inf") if one.budget is None else one.budget for one in budgets]
    assert tokens == sorted(tokens) and tokens[0] > 0 and tokens[-1] == float("inf")


def test_a_template_is_told_the_nearest_word_it_knows_and_nothing_is_cut() -> None:
    told = {word: wish(word, known=SAYS) for word in EFFORTS if word != "none"}
    assert {word: one.effort for word, one in told.items()} == {
        "minimal": "low", "low": "low", "medium": "medium", "high": "xhigh", "xhigh": "xhigh", "max": "xhigh",
    }  # fmt: skip
    assert all(one.enable and one.budget is None for one in told.values())


def test_a_switch_and_a_budget_go_before_an_effort() -> None:
    assert wish("low", enable=False) == wish("low", enable=False, known=SAYS) == (False, None, None)
    assert wish("none", enable=True) == (True, None, None)
    assert wish("low", budget=9) == (True, 9, None) and wish("low", budget=9, known=SAYS) == (True, 9, "low")
    assert wish(None, enable=True, budget=3) == (True, 3, None)


def test_a_model_that_always_or_never_thinks() -> None:
    assert wish("low", "always") == (None, 1024, None) and wish("none", "always").enable is False
    assert wish("none", "never") == (None, None, None)
    with pytest.raises(
        RequestError, match=r"reasoning_effort='low': this model does not think. Leave it out"
    ):
        wish("low", "never")


@pytest.mark.parametrize("word", ["huge", 5, ["low"]])
def test_an_unknown_word_is_an_error(word: object) -> None:
    with pytest.raises(
        RequestError, match=r"reasoning_effort: got .*Known are: none, minimal, low, medium, high"
    ):
        wish(word)
