"""Anthropic's Messages: answers, whole and as events, and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwenrt.outputs import CallDelta, Delta, FinishReason, Generation, Usage
from qwenrt.text.dialects.answers import Served, json_bytes, new_id, sse
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.pieces import Piece, Pieces, Said, Thought, pieces_of
from qwenrt.text.dialects.problem import Kind, Problem
from qwenrt.text.dialects.signed_thoughts import SignedThoughts

# An answer that was cut, by whatever, is said to be so: the dialect has one word for it.
STOP_REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "timeout": "max_tokens",
    "abort": "max_tokens",
    "error": "max_tokens",
}
ERROR_TYPES: dict[Kind, str] = {
    "invalid_json": "invalid_request_error",
    "invalid_request": "invalid_request_error",
    "context_length": "invalid_request_error",
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "not_found_error",
    "method_not_allowed": "invalid_request_error",
    "too_large": "request_too_large",
    "queue_full": "rate_limit_error",
    "queue_timeout": "overloaded_error",
    "timeout": "timeout_error",
    "unavailable": "overloaded_error",
    "not_implemented": "api_error",
    "internal": "api_error",
}


@dataclass(frozen=True)
class Extra:
    """What the Writer needs of the request: ``thoughts`` signs; ``stop``: the stop sequences; ``hidden``: thoughts are
    not shown, and stand in their signatures only."""

    thoughts: SignedThoughts
    stop: tuple[str, ...] = ()
    hidden: bool = False


def error_body(problem: Problem, request_id: str = "") -> dict[str, Any]:
    """The body of an error, and the data of an error event. A prompt that does not fit is told in the words in which
    Claude Code looks for the two numbers."""
    message = problem.message
    if problem.kind == "context_length":
        message = f"prompt is too long: {problem.prompt_tokens} tokens > {problem.max_tokens} maximum"
    error: dict[str, Any] = {"type": ERROR_TYPES[problem.kind], "message": message}
    if problem.details is not None:
        error["details"] = problem.details
    return {"type": "error", "error": error, "request_id": request_id or None}


def count_body(prompt_tokens: int) -> dict[str, Any]:
    """The body of an answer to count_tokens."""
    return {"input_tokens": prompt_tokens}


class Writer:
    """Writes one message. See `answers.Writer`. Its model is named as the request named it."""

    media_type = "text/event-stream"

    def __init__(self, served: Served, ask: Ask) -> None:
        self._extra: Extra = ask.extra
        self._served = served
        # Claude Code sends thoughts back only to the model that they say they are of, by the name it asked for.
        self._model = ask.model or served.model
        self.id = new_id("msg_")
        self._pieces = Pieces()
        self._block = -1  # number of the latest block
        self._open = ""  # its type while it is open
        self._thought: list[str] = []
        self._call, self._call_index = _Arguments(), -1
        self._stops = _StopFinder(self._extra.stop, served)
        self._last = Delta("", finish_reason="abort")

    def begin(self) -> bytes:
        """message_start, and a ping as the vendor's server sends one."""
        usage = _usage(Usage(self._served.prompt_tokens), self._served.prompt_tokens)
        message = self._message([], None, None, usage)
        return sse({"type": "message_start", "message": message}, "message_start") + self.ping()

    def push(self, delta: Delta) -> bytes:
        """The events of what was added."""
        if delta.index:
            return b""
        self._stops.push(delta)
        if delta.finish_reason is not None:
            self._last = delta
        return b"".join(self._event(piece) for piece in self._pieces.of(delta))

    def end(self) -> bytes:
        """The end of the last block, message_delta and message_stop."""
        if self._last.finish_reason == "error":
            return self.fail(Problem("internal", "The answer broke off; the server's log says why."))
        reason, stop = self._stop_reason(self._last.finish_reason or "abort")
        delta = _ending(reason, stop)
        usage = _counts(self._last.usage or Usage(), self._served.prompt_tokens)
        return (
            self._close()
            + sse({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
            + sse({"type": "message_stop"}, "message_stop")
        )

    def fail(self, problem: Problem) -> bytes:
        """An error event."""
        return sse(error_body(problem, self._served.request_id), "error")

    def ping(self) -> bytes:
        """The dialect's own event for it."""
        return sse({"type": "ping"}, "ping")

    def whole(self, choices: Sequence[Generation]) -> dict[str, Any]:
        """The message. Raises Problem for an answer that broke off in the server."""
        answer = choices[0]
        if answer.finish_reason == "error":
            raise Problem("internal", "The answer broke off; the server's log says why.")
        content: list[dict[str, Any]] = []
        for piece in pieces_of(answer):
            if isinstance(piece, Thought):
                shown = "" if self._extra.hidden else piece.text
                signature = self._signature(piece.text)
                content.append({"type": "thinking", "thinking": shown, "signature": signature})
            elif isinstance(piece, Said):
                content.append(_text_block(piece.text))
            else:
                arguments = _Arguments()
                text = arguments.push(piece.arguments) + arguments.end()
                content.append({**_tool_use(piece), "input": _as_object(text)})
        self._stops.tokens(answer.token_ids)
        reason, stop = self._stop_reason(answer.finish_reason)
        return self._message(content, reason, stop, _usage(answer.usage, self._served.prompt_tokens))

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **_ending(reason, stop),
            "usage": usage,
        }

    def _stop_reason(self, finish: FinishReason) -> tuple[str, str | None]:
        stop = self._stops.found() if finish == "stop" else None
        return ("stop_sequence", stop) if stop is not None else (STOP_REASONS[finish], None)

    def _event(self, piece: Piece) -> bytes:
        if isinstance(piece, Thought):
            begun = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            self._thought.append(piece.text)
            return begun if self._extra.hidden else begun + self._delta("thinking", piece.text)
        if isinstance(piece, Said):
            return self._begin("text", _text_block("")) + self._delta("text", piece.text)
        begun = b""
        if piece.index != self._call_index:
            begun = self._close() + self._begin("tool_use", {**_tool_use(piece), "input": {}})
            self._call, self._call_index = _Arguments(), piece.index
        text = self._call.push(piece.arguments)
        return begun + (self._delta("input_json", text, "partial_json") if text else b"")

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        if self._open == kind:
            return b""
        closed = self._close()
        self._block += 1
        self._open = kind
        start = {"type": "content_block_start", "index": self._block, "content_block": block}
        return closed + sse(start, "content_block_start")

    def _delta(self, kind: str, text: str, field: str = "") -> bytes:
        # What every token passes through, so only the text is encoded.
        head = (
            f'"content_block_delta","index":{self._block},"delta":{{"type":"{kind}_delta","{field or kind}":'
        )
        return b'event: content_block_delta\ndata: {"type":' + head.encode() + json_bytes(text) + b"}}\n\n"

    def _close(self) -> bytes:
        if not self._open:
            return b""
        last = b""
        if self._open == "thinking":
            signature = self._signature("".join(self._thought))
            last = self._delta("signature", signature)
            self._thought = []
        elif self._open == "tool_use":
            rest = self._call.end()
            last = self._delta("input_json", rest, "partial_json") if rest else b""
        self._open = ""
        return last + sse({"type": "content_block_stop", "index": self._block}, "content_block_stop")

    def _signature(self, thought: str) -> str:
        thoughts = self._extra.thoughts
        return thoughts.packed(thought) if self._extra.hidden else thoughts.signature(thought)


class _Arguments:
    """The arguments of one call as the JSON object that this dialect wants. A model of the ReAct form may write any
    text there: it is then the value of "input"."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._is_object = False

    def push(self, text: str) -> str:
        """More of them; returns what can be passed on."""
        if self._is_object:
            return text
        self._held.append(text)
        held = "".join(self._held).lstrip() if text.strip() else ""
        self._is_object = held.startswith("{")
        return held if self._is_object else ""

    def end(self) -> str:
        held = "".join(self._held).strip()
        return "" if self._is_object or not held else json.dumps({"input": held}, ensure_ascii=False)


def _as_object(text: str) -> dict[str, Any]:
    """Arguments that were read strictly when they were parsed; those that are no object after all are a text."""
    try:
        value = json.loads(text or "{}", strict=False)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"input": text}


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def _tool_use(call: CallDelta) -> dict[str, Any]:
    call_id = "toolu_" + call.id.removeprefix("call_")
    return {"type": "tool_use", "id": call_id, "name": call.name, "caller": {"type": "direct"}}


def _ending(reason: str | None, stop: str | None) -> dict[str, Any]:
    return {"stop_reason": reason, "stop_sequence": stop, "stop_details": None, "container": None}


def _counts(usage: Usage, prompt_tokens: int) -> dict[str, Any]:
    """Tokens of the prompt that came from the cache are counted apart, as this dialect's clients add them up: the
    prompt has input_tokens and cache_read_input_tokens together."""
    prompt = prompt_tokens or usage.prompt_tokens
    return {
        "input_tokens": max(0, prompt - usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "server_tool_use": None,
    }


def _usage(usage: Usage, prompt_tokens: int) -> dict[str, Any]:
    created = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
    about = {"cache_creation": created, "inference_geo": None, "service_tier": "standard"}
    return _counts(usage, prompt_tokens) | about


_CONTROL = re.compile(rb"<\|[^|]*\|>")  # a token that is no text, as Qwen spells them


class _StopFinder:
    """Which stop sequence ended an answer: the text says nothing of it, the last tokens do."""

    def __init__(self, stop: tuple[str, ...], served: Served) -> None:
        self._stop = [(text, text.encode()) for text in stop] if served.token_text is not None else []
        self._token_text = served.token_text
        self._longest = max((len(raw) for _, raw in self._stop), default=0)
        self._written = b""
        self._last = 0  # bytes of the last token

    def push(self, delta: Delta) -> None:
        if self._stop:
            self.tokens(delta.token_ids)

    def tokens(self, ids: Sequence[int]) -> None:
        """More tokens that were written."""
        if not self._stop:
            return
        for token_id in ids[-4 * self._longest - 4 :]:
            raw = self._token_text(token_id)[1]
            self._written = (self._written + raw)[-(self._longest + len(raw)) :]
            self._last = len(raw)

    def found(self) -> str | None:
        """The sequence that the last token completed; None where it ended the answer by itself."""
        begun = len(self._written) - self._last
        if _CONTROL.fullmatch(self._written, begun):
            return None
        for text, raw in self._stop:
            at = self._written.find(raw)
            if at >= 0 and at + len(raw) > begun:
                return text
        return None
