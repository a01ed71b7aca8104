"""How answers are written for DashScope's clients: one body, or events that say all so far or what is new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenrt.outputs import CallDelta, Delta, FinishReason, Generation, Usage
from qwenrt.text.dialects.answers import SSE_PING, Served, json_bytes, new_id, summed
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.dashscope import Form, error_body
from qwenrt.text.dialects.logprobs import logprob_entries
from qwenrt.text.dialects.problem import Problem

# DashScope knows stop, length and tool_calls. What was cut has "length", so that nobody takes it for whole.
FINISH_REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "tool_calls": "tool_calls",
    "length": "length",
    "timeout": "length",
    "abort": "length",
    "error": "error",
}
RUNNING = "null"  # the finish_reason of what goes on
EVERY_PIECE = 16384  # characters of an answer that is written again and again: beyond them in larger steps
_STEP = 256  # one of so many parts of what is written must be new, so that the sum stays linear
_LOGPROB = 64  # characters that an entry of logprobs counts as


@dataclass
class _Choice:
    """What was written of a choice, all so far or what is new. size: of it, in characters."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    size: int = 0


@dataclass
class _Progress:
    """How far a choice is. told: what was written of it; waiting: what came since, of size ``grown``; begun: how many
    calls it has."""

    told: _Choice = field(default_factory=_Choice)
    waiting: list[_Choice] = field(default_factory=list)
    grown: int = 0
    begun: int = 0
    tokens: int = 0


class Writer:
    """The answer to a request (see Writer in answers.py). The events of several choices have one choice each."""

    media_type = "text/event-stream"

    def __init__(self, served: Served, ask: Ask) -> None:
        self.id = new_id("answer-")
        self._served = served
        self._form: Form = ask.extra
        self._progress: dict[int, _Progress] = {}
        self._events = 0
        self._failed = False

    def begin(self) -> bytes:
        return b""

    def push(self, delta: Delta) -> bytes:
        if self._failed:
            return b""
        if delta.finish_reason == "error":
            return self.fail(
                Problem("internal", "The answer could not be finished; the server's log says more.")
            )
        progress = self._progress.setdefault(delta.index, _Progress())
        progress.tokens += len(delta.token_ids)
        new, ended = self._new(progress, delta), delta.finish_reason is not None
        if not self._form.incremental:
            progress.waiting.append(new)
            progress.grown += new.size
            size = progress.told.size
            if not ended and progress.grown < (size // _STEP if size > EVERY_PIECE else 1):
                return b""
            _add(progress.told, progress.waiting)
            progress.waiting, progress.grown, new = [], 0, progress.told
        elif not ended and not new.size:
            return b""
        reason = RUNNING if delta.finish_reason is None else FINISH_REASONS[delta.finish_reason]
        usage = delta.usage or Usage(self._served.prompt_tokens, progress.tokens)
        return self._event("result", 200, self._body([self._said(new, delta.index, reason)], usage))

    def end(self) -> bytes:
        return b""

    def fail(self, problem: Problem) -> bytes:
        self._failed = True
        return self._event("error", problem.status, error_body(problem, self._served.request_id))

    def ping(self) -> bytes:
        return SSE_PING

    def whole(self, choices: Sequence[Generation]) -> dict[str, Any]:
        said = []
        for index, made in enumerate(choices):
            content = made.message.get("content") if made.message else made.text
            choice = _Choice(content or "", made.reasoning, _numbered(made.message.get("tool_calls") or []))
            if made.logprobs is not None:
                choice.logprobs = logprob_entries(made.logprobs, self._served.token_text)
            said.append(self._said(choice, index, FINISH_REASONS[made.finish_reason]))
        return self._body(said, summed([made.usage for made in choices]))

    def _new(self, progress: _Progress, delta: Delta) -> _Choice:
        """What a Delta adds. Calls whose pieces never came are added whole at the end."""
        calls = [_piece(call) for call in delta.calls]
        progress.begun = max([progress.begun, *(call.index + 1 for call in delta.calls)])
        calls += _numbered(delta.tool_calls or [])[progress.begun :]
        new = _Choice(delta.text, delta.reasoning, calls)
        new.size = len(delta.text) + len(delta.reasoning)
        new.size += sum(1 + len(call["function"]["arguments"]) for call in calls)
        if delta.logprobs is not None:
            new.logprobs = logprob_entries(delta.logprobs, self._served.token_text)
            new.size += _LOGPROB * sum(1 + len(entry.top) for entry in delta.logprobs)
        return new

    def _said(self, choice: _Choice, index: int, reason: str) -> dict[str, Any]:
        """A choice, or where the answer is a text what `output` says."""
        thought = {"reasoning_content": choice.reasoning} if choice.reasoning else {}
        if not self._form.as_message:
            said: dict[str, Any] = {"text": choice.text, "finish_reason": reason, **thought}
        else:
            called = {"tool_calls": choice.calls} if choice.calls else {}
            message = {"role": "assistant", "content": choice.text, **thought, **called}
            said = {"index": index, "message": message, "finish_reason": reason}
        if choice.logprobs is not None:
            said["logprobs"] = {"content": choice.logprobs}
        return said

    def _body(self, said: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        read = self._served.prompt_tokens or usage.prompt_tokens
        cached = {"cached_tokens": usage.cached_tokens}
        return {
            "output": {"choices": list(said)} if self._form.as_message else said[0],
            "usage": {
                "input_tokens": read,
                "output_tokens": usage.completion_tokens,
                "total_tokens": read + usage.completion_tokens,
                "input_tokens_details": cached,
                "prompt_tokens_details": cached,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            },
            "request_id": self._served.request_id,
        }

    def _event(self, kind: str, status: int, data: dict[str, Any]) -> bytes:
        """The status is a comment, as DashScope's server sends it, and of an error also the field that its Python
        client looks at."""
        self._events += 1
        told = f"status:{status}\n" if kind == "error" else ""
        head = f"id:{self._events}\nevent:{kind}\n:HTTP_STATUS/{status}\n{told}data:"
        return head.encode() + json_bytes(data) + b"\n\n"


def _add(told: _Choice, pieces: Sequence[_Choice]) -> None:
    """Let what was told have what came since, at the cost of its size."""
    told.text += "".join(piece.text for piece in pieces)
    told.reasoning += "".join(piece.reasoning for piece in pieces)
    told.size += sum(piece.size for piece in pieces)
    arguments: dict[int, list[str]] = {}
    for piece in pieces:
        if piece.logprobs is not None:
            told.logprobs = told.logprobs or []
            told.logprobs += piece.logprobs
        for call in piece.calls:
            if call["index"] >= len(told.calls):
                told.calls.append({**call, "function": {**call["function"], "arguments": ""}})
            arguments.setdefault(call["index"], []).append(call["function"]["arguments"])
    for index, added in arguments.items():
        told.calls[index]["function"]["arguments"] += "".join(added)


def _piece(call: CallDelta) -> dict[str, Any]:
    """A piece of a call. Clients join names too: only the first piece has it."""
    name = {"name": call.name} if call.name else {}
    function = {**name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _numbered(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"index": index, **call} for index, call in enumerate(calls)]
