"""How long a model may think, in one word."""

from __future__ import annotations

import pytest

from qwenrt.text.dialects.efforts import EFFORTS, thought
from qwenrt.text.dialects.problem import Problem


def test_no_effort_is_no_thought_and_each_next_word_allows_a_longer_one() -> None:
    assert thought("none", "x") == (False, None)
    budgets = [thought(word, "x") for word in EFFORTS if word != "none"]
    assert all(thinks for thinks, _ in budgets)
    tokens = [float("inf") if budget is None else budget for _, budget in budgets]
    assert tokens == sorted(tokens) and tokens[0] > 0 and tokens[-1] == float("inf")


def test_an_unknown_word_is_a_problem_at_its_path() -> None:
    with pytest.raises(Problem) as caught:
        thought("huge", "reasoning.effort")
    assert caught.value.param == "reasoning.effort" and "'huge'" in caught.value.message
