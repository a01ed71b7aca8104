"""Errors as OpenAI's clients read them, of every one of its routes."""

from __future__ import annotations

from typing import Any

from qwenrt.text.dialects.problem import Kind, Problem

# What is wrong, in the word that clients compare; and whose fault it is.
_CODES: dict[Kind, tuple[str, str]] = {
    "invalid_json": ("invalid_json", "invalid_request_error"),
    "invalid_request": ("invalid_value", "invalid_request_error"),
    "context_length": ("context_length_exceeded", "invalid_request_error"),
    "unauthorized": ("invalid_api_key", "authentication_error"),
    "forbidden": ("forbidden", "permission_error"),
    "not_found": ("not_found", "invalid_request_error"),
    "method_not_allowed": ("method_not_allowed", "invalid_request_error"),
    "too_large": ("request_too_large", "invalid_request_error"),
    "queue_full": ("rate_limit_exceeded", "rate_limit_error"),
    "queue_timeout": ("server_overloaded", "server_error"),
    "timeout": ("timeout", "server_error"),
    "unavailable": ("service_unavailable", "server_error"),
    "not_implemented": ("not_implemented", "invalid_request_error"),
    "internal": ("server_error", "server_error"),
}


def error_code(problem: Problem) -> str:
    """The word for what went wrong, such as "context_length_exceeded"."""
    return _CODES[problem.kind][0]


def error_body(problem: Problem, request_id: str = "") -> dict[str, Any]:
    """The body of an error. Its request id is in the header, where these clients look for it."""
    code, kind = _CODES[problem.kind]
    return {"error": {"message": problem.message, "type": kind, "param": problem.param, "code": code}}
