"""Errors of OpenAI's routes: a word for every kind of problem, and the words that programs look for."""

from __future__ import annotations

import re

import pytest

from qwenrt.text.dialects.openai_errors import error_body
from qwenrt.text.dialects.problem import STATUS, Problem


@pytest.mark.parametrize("kind", STATUS)
def test_every_kind_of_problem_has_a_body(kind: str) -> None:
    error = error_body(Problem(kind, "what went wrong", param="messages[1].role"))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] == "what went wrong"
    assert error["param"] == "messages[1].role"
    assert re.fullmatch("[a-z_]+", error["code"]) and re.fullmatch("[a-z_]+", error["type"])


def test_a_prompt_that_does_not_fit_is_told_in_the_words_agents_parse() -> None:
    error = error_body(Problem.context_length(9000, 8192))["error"]
    assert error["code"] == "context_length_exceeded"  # Codex compacts its history for this
    assert "maximum context length is 8192 tokens" in error["message"]  # Qwen Code's pattern
    assert "9000" in error["message"]
