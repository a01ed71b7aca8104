"""How answers are written for Ollama's clients: lines of JSON, the last of which has counts and durations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from qwenrt.outputs import Delta, FinishReason, Generation, Timing, Usage
from qwenrt.text.dialects.answers import Served, json_bytes, new_id
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.dimensions import shortened
from qwenrt.text.dialects.logprobs import logprob_entries
from qwenrt.text.dialects.ollama import error_body
from qwenrt.text.dialects.problem import Problem

# Ollama knows stop, length, load and unload. What was cut, by whatever, has "length" so that nobody takes it for whole.
DONE_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "tool_calls": "stop",
    "length": "length",
    "timeout": "length",
    "abort": "length",
    "error": "error",
}
_NANOSECONDS = 1_000_000_000


class Writer:
    """The answer to /api/chat or /api/generate (see Writer in answers.py); there is one choice.

    Calls of tools are written whole, with their arguments as objects; one whose arguments are no object is text. clock:
    seconds since the epoch.
    """

    media_type = "application/x-ndjson"

    def __init__(self, served: Served, ask: Ask, clock: Callable[[], float] = time.time) -> None:
        self.id = new_id("answer-")
        self._served, self._chat, self._clock = served, ask.extra == "chat", clock
        self._token_ids: list[int] = []
        self._last: Delta | None = None
        self._failed = False

    def begin(self) -> bytes:
        return b""

    def push(self, delta: Delta) -> bytes:
        self._token_ids += delta.token_ids
        if delta.finish_reason is not None:
            self._last = delta
        text, calls = _with_broken_calls(delta.text, delta.tool_calls or [])
        if not (text or delta.reasoning or calls or delta.logprobs):
            return b""
        line = self._line(text, delta.reasoning, calls) | {"done": False}
        if delta.logprobs is not None:
            line["logprobs"] = logprob_entries(delta.logprobs, self._served.token_text)
        return json_bytes(line) + b"\n"

    def end(self) -> bytes:
        last = self._last
        if self._failed or last is None or last.finish_reason is None:
            return b""
        if last.finish_reason == "error":
            return self.fail(
                Problem("internal", "The answer could not be finished; the server's log says more.")
            )
        done = self._done(last.finish_reason, last.usage or Usage(), last.timing or Timing(), self._token_ids)
        return json_bytes(self._line("", "", []) | done) + b"\n"

    def fail(self, problem: Problem) -> bytes:
        self._failed = True
        return json_bytes(error_body(problem)) + b"\n"

    def ping(self) -> bytes:
        """A line that adds nothing: clients take every line for JSON, an empty one too."""
        return json_bytes(self._line("", "", []) | {"done": False}) + b"\n"

    def whole(self, choices: Sequence[Generation]) -> dict[str, Any]:
        made = choices[0]
        text, calls = _with_broken_calls(_content(made), made.message.get("tool_calls") or [])
        body = self._line(text, made.reasoning, calls)
        if made.logprobs is not None:
            body["logprobs"] = logprob_entries(made.logprobs, self._served.token_text)
        return body | self._done(made.finish_reason, made.usage, made.timing, made.token_ids)

    def _line(self, text: str, thinking: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        line: dict[str, Any] = {"model": self._served.model, "created_at": rfc3339(self._clock())}
        thought = {"thinking": thinking} if thinking else {}
        if not self._chat:
            return line | {"response": text} | thought
        called = {"tool_calls": list(calls)} if calls else {}
        return line | {"message": {"role": "assistant", "content": text} | thought | called}

    def _done(
        self, reason: FinishReason, usage: Usage, timing: Timing, token_ids: Sequence[int]
    ) -> dict[str, Any]:
        """What the last line says beside its text. The wait until the prompt was begun stands where Ollama has the time
        that loading took."""
        first = max(timing.first_token_s, timing.queue_s)
        done: dict[str, Any] = {
            "done": True,
            "done_reason": DONE_REASONS[reason],
            "total_duration": _nanoseconds(timing.total_s),
            "load_duration": _nanoseconds(timing.queue_s),
            "prompt_eval_count": self._served.prompt_tokens or usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - timing.queue_s),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(timing.total_s - first),
        }
        if not self._chat and self._served.prompt_token_ids:
            done["context"] = [*self._served.prompt_token_ids, *token_ids]
        return done


def loaded(served: Served, ask: Ask) -> dict[str, Any]:
    """The answer to a request that asks nothing (see `ollama.is_load`): the model is there."""
    text = {"message": {"role": "assistant", "content": ""}} if ask.extra == "chat" else {"response": ""}
    about = {"model": served.model, "created_at": rfc3339(served.created)}
    return about | text | {"done": True, "done_reason": "load"}


def embed_body(
    served: Served,
    vectors: Sequence[Sequence[float]],
    dimensions: int | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """The body of an answer to /api/embed: one vector for each text. dimensions: of a vector's values only so many of
    the first, then of length 1 again; seconds: how long it took. Raises Problem for dimensions that they do not
    have."""
    return {
        "model": served.model,
        "embeddings": shortened(vectors, dimensions),
        "total_duration": _nanoseconds(seconds),
        "load_duration": 1,
        "prompt_eval_count": served.prompt_tokens,
    }


def embeddings_body(vector: Sequence[float]) -> dict[str, Any]:
    """The body of an answer to /api/embeddings, of one text."""
    return {"embedding": vector}


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch as "2026-12-01T08:30:00.250000Z"."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _nanoseconds(seconds: float) -> int:
    """At least one: clients divide by durations."""
    return max(1, round(seconds * _NANOSECONDS))


def _content(made: Generation) -> str:
    """What an answer says beside its thought and its calls."""
    content = made.message.get("content")
    return content if isinstance(content, str) else "" if made.message else made.text


def _with_broken_calls(text: str, calls: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Calls in Ollama's shape, and the text with those calls after it that have no object as arguments."""
    whole: list[dict[str, Any]] = []
    for call in calls:
        function = call["function"]
        arguments = _object(function["arguments"])
        if arguments is None:
            text += f'{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}'
        else:
            described = {"index": len(whole), "name": function["name"], "arguments": arguments}
            whole.append({"id": str(call.get("id") or ""), "function": described})
    return text, whole


def _object(arguments: object) -> dict[str, Any] | None:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return None
    return arguments if isinstance(arguments, dict) else None
