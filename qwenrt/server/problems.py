"""A Problem as an answer, in the dialect of the path that was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qwenrt.text.dialects import anthropic_answers, dashscope, ollama, openai_bodies
from qwenrt.text.dialects.answers import json_bytes
from qwenrt.text.dialects.problem import Problem

Body = Callable[[Problem, str], dict[str, Any]]


def rendered(
    problem: Problem, path: str, request_id: str = ""
) -> tuple[int, Sequence[tuple[bytes, bytes]], bytes]:
    """(status, headers, body) of an answer that is this problem."""
    headers = [(b"content-type", b"application/json")]
    if problem.retry_after is not None:
        headers.append((b"retry-after", str(problem.retry_after).encode()))
    if problem.kind == "unauthorized":
        headers.append((b"www-authenticate", b"Bearer"))
    return problem.status, headers, json_bytes(_body(problem, path, request_id))


def _body(problem: Problem, path: str, request_id: str) -> dict[str, Any]:
    if path.startswith("/api/v1/services"):
        return dashscope.error_body(problem, request_id)
    if path.startswith("/api/"):
        return dict(ollama.error_body(problem))
    if path.startswith(("/v1/messages", "/messages")):
        return anthropic_answers.error_body(problem, request_id)
    return openai_bodies.error_body(problem)
