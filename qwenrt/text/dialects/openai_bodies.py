"""What answers in OpenAI's dialect have in common: errors, usage, why an answer ended, the frame of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwenrt.outputs import FinishReason, Generation, Timing, Usage
from qwenrt.text.dialects.answers import SSE_DONE, SSE_PING, Served, json_bytes, new_id, sse, summed
from qwenrt.text.dialects.openai_fields import Wishes
from qwenrt.text.dialects.problem import Kind, Problem

# Clients know these words only. What was ended from outside was cut, as by a limit; "qwenrt" has our own word.
FINISH: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "timeout": "length",
    "abort": "length",
    "error": "length",
}
_CLOSE = b"}\n\n"

# kind -> (type, code) of an error's body
ERRORS: dict[Kind, tuple[str, str]] = {
    "invalid_json": ("invalid_request_error", "invalid_json"),
    "invalid_request": ("invalid_request_error", "invalid_value"),
    "context_length": ("invalid_request_error", "context_length_exceeded"),
    "unauthorized": ("authentication_error", "invalid_api_key"),
    "forbidden": ("permission_error", "forbidden"),
    "not_found": ("not_found_error", "not_found"),
    "method_not_allowed": ("invalid_request_error", "method_not_allowed"),
    "too_large": ("invalid_request_error", "request_too_large"),
    "queue_full": ("rate_limit_error", "rate_limit_exceeded"),
    "queue_timeout": ("service_unavailable_error", "queue_timeout"),
    "timeout": ("timeout_error", "timeout"),
    "unavailable": ("service_unavailable_error", "service_unavailable"),
    "not_implemented": ("not_implemented_error", "not_implemented"),
    "internal": ("server_error", "internal_error"),
}


def error_body(problem: Problem) -> dict[str, Any]:
    """The body, or the event in a stream, of a problem."""
    kind, code = ERRORS[problem.kind]
    if problem.kind == "not_found" and problem.param == "model":
        code = "model_not_found"
    return {"error": {"message": problem.message, "type": kind, "param": problem.param, "code": code}}


def usage_body(usage: Usage) -> dict[str, Any]:
    """The field "usage"."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def whole_usage(usages: Mapping[int, Usage], served: Served, drawn: int) -> Usage:
    """The usage of all choices, by their index, ``drawn`` of which have a prompt in common."""
    prompts: dict[int, list[Usage]] = {}
    for index, usage in usages.items():
        prompts.setdefault(index // drawn, []).append(usage)
    each = [summed(group) for group in prompts.values()]
    return Usage(
        served.prompt_tokens or sum(usage.prompt_tokens for usage in each),
        sum(usage.completion_tokens for usage in each),
        sum(usage.cached_tokens for usage in each),
        sum(usage.reasoning_tokens for usage in each),
    )


def explained(usage: Usage, timing: Timing | None) -> dict[str, float]:
    """The field "qwenrt": tokens of the prompt that came from the cache and that were computed; seconds, and tokens per
    second."""
    counts: dict[str, float] = {
        "cached_tokens": usage.cached_tokens,
        "computed_tokens": usage.prompt_tokens - usage.cached_tokens,
    }
    return counts if timing is None else {**counts, **_timing_body(timing)}


def _timing_body(timing: Timing) -> dict[str, float]:
    return {
        "queue_s": round(timing.queue_s, 6),
        "first_token_s": round(timing.first_token_s, 6),
        "total_s": round(timing.total_s, 6),
        "tokens_per_s": round(timing.tokens_per_s, 3),
    }


def ended(
    choice: dict[str, Any],
    reason: FinishReason,
    words: Mapping[FinishReason, str] = FINISH,
    broken_calls: int = 0,
) -> None:
    """Say in a choice why it ended, and how many of its calls were none."""
    choice["finish_reason"] = words[reason]
    told: dict[str, Any] = {}
    if reason in ("timeout", "abort", "error"):
        told["finish_reason"] = reason
    if broken_calls:
        told["broken_calls"] = broken_calls
    if told:
        choice["qwenrt"] = told


def best(drawn: Sequence[Generation], wishes: Wishes) -> list[tuple[int, Generation]]:
    """The choices that a client gets, with the index it sees: of each prompt's drawn ones the likeliest per token."""
    if wishes.drawn == wishes.choices:
        return list(enumerate(drawn))
    given: list[Generation] = []
    for first in range(0, len(drawn), wishes.drawn):
        ranked = sorted(drawn[first : first + wishes.drawn], key=_likelihood, reverse=True)
        given += ranked[: wishes.choices]
    return list(enumerate(given))


def _likelihood(generation: Generation) -> float:
    entries = generation.logprobs or ()
    return sum(entry.logprob for entry in entries) / len(entries) if entries else float("-inf")


class Frame:
    """What the writers of chats and completions share: what is around the choices of every chunk and body of one
    answer, and the counting of its tokens.

    ``id``: of the answer, which nobody can guess. kind: "chat.completion", whose chunks are "chat.completion.chunk",
    or "text_completion", whose chunks are the same.
    """

    media_type = "text/event-stream"

    def __init__(self, served: Served, wishes: Wishes, kind: str, chunk: str, prefix: str) -> None:
        self.id = new_id(prefix)
        self._served, self._wishes = served, wishes
        self._about = {
            "id": self.id,
            "object": kind,
            "created": served.created,
            "model": served.model,
            "system_fingerprint": served.fingerprint,
        }
        self._head = b"data: " + json_bytes({**self._about, "object": chunk})[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if wishes.usage else b"]}\n\n"
        self._usages: dict[int, Usage] = {}
        self._written = 0
        self._timing: Timing | None = None

    def count(self, index: int, tokens: int, usage: Usage | None, timing: Timing | None) -> None:
        """Tokens that came for a choice, and at its end their usage."""
        self._written += tokens
        if usage is not None:
            self._usages[index] = usage
        self._timing = self._timing or timing

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        """One chunk with one choice."""
        tail = self._tail
        if self._wishes.usage_always:
            so_far = Usage(self._served.prompt_tokens, self._written)
            tail = b'],"usage":' + json_bytes(usage_body(so_far)) + _CLOSE
        return self._head + json_bytes(choice) + tail

    def progress(self, total: int, cached: int, processed: int, seconds: float) -> bytes:
        """A chunk that tells how many tokens of the prompt are computed, in llama-server's words."""
        told = {
            "total": total,
            "cache": cached,
            "processed": processed,
            "time_ms": round(seconds * 1000),
        }
        return self._head + b'],"prompt_progress":' + json_bytes(told) + _CLOSE

    def end(self) -> bytes:
        """The chunk of usage, where it was asked for, and the end of the stream."""
        if not self._wishes.usage:
            return SSE_DONE
        usage = whole_usage(self._usages, self._served, self._wishes.drawn)
        body = b'],"usage":' + json_bytes(usage_body(usage))
        body += b',"qwenrt":' + json_bytes(explained(usage, self._timing))
        return self._head + body + _CLOSE + SSE_DONE

    def fail(self, problem: Problem) -> bytes:
        return sse(error_body(problem))

    def ping(self) -> bytes:
        return SSE_PING

    def body(self, choices: Iterable[Mapping[str, Any]], drawn: Sequence[Generation]) -> dict[str, Any]:
        """The whole body. ``drawn``: all that was written for it, whether shown or not."""
        usages = {index: generation.usage for index, generation in enumerate(drawn)}
        usage = whole_usage(usages, self._served, self._wishes.drawn)
        body = {**self._about, "choices": list(choices), "usage": usage_body(usage)}
        if drawn:
            body["qwenrt"] = explained(usage, drawn[0].timing)
        return body
