"""OpenAI's Responses: answers, whole and as events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from qwenrt.outputs import Delta, FinishReason, Generation, Usage
from qwenrt.text.dialects.answers import SSE_PING, Served, new_id, sse
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.openai_bodies import ERRORS
from qwenrt.text.dialects.pieces import Pieces, pieces_of
from qwenrt.text.dialects.problem import Problem
from qwenrt.text.dialects.responses_items import Extra, Item, new_item

# An answer that was cut, by whatever, is incomplete: the dialect has one word for the reason.
STATUSES: dict[FinishReason, str] = {
    "stop": "completed",
    "tool_calls": "completed",
    "length": "incomplete",
    "timeout": "incomplete",
    "abort": "incomplete",
    "error": "failed",
}


def count_body(prompt_tokens: int) -> dict[str, Any]:
    """The body of an answer to input_tokens."""
    return {"object": "response.input_tokens", "input_tokens": prompt_tokens}


def deleted_body(response_id: str) -> dict[str, Any]:
    """The body of an answer to DELETE."""
    return {"id": response_id, "object": "response", "deleted": True}


class Writer:
    """Writes one response. See `answers.Writer`.

    response: the response as it stands, finished after `end`, `fail` or `whole`.
    """

    media_type = "text/event-stream"

    def __init__(self, served: Served, ask: Ask) -> None:
        self._extra: Extra = ask.extra
        self._served = served
        self._pieces = Pieces()
        self._open: Item | None = None
        self._output: list[dict[str, Any]] = []
        self._last = Delta("", finish_reason="abort")
        self._number = 0
        self._events: list[bytes] = []
        self.id = new_id("resp_")
        self.response: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": served.created,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": served.model,
            "output": self._output,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **self._extra.echo,
            "usage": None,
        }

    def begin(self) -> bytes:
        """response.created and response.in_progress."""
        self._emit("created", response=self.response)
        self._emit("in_progress", response=self.response)
        return self._written()

    def push(self, delta: Delta) -> bytes:
        """The events of what was added."""
        if delta.index:
            return b""
        if delta.finish_reason is not None:
            self._last = delta
        for piece in self._pieces.of(delta):
            if self._open is None or not self._open.takes(piece):
                self._close("completed")
                self._open = new_item(piece, len(self._output), self._extra, self._emit)
                self._open.begin()
            self._open.push(piece)
        return self._written()

    def end(self) -> bytes:
        """The end of the last item, and of the response."""
        reason = self._last.finish_reason or "abort"
        if reason == "error":
            return self.fail(Problem("internal", "The answer broke off; the server's log says why."))
        self._close(STATUSES[reason])
        self._finish(STATUSES[reason], self._last.usage or Usage())
        self._emit(STATUSES[reason], response=self.response)
        return self._written()

    def fail(self, problem: Problem) -> bytes:
        """The open item ends as it is, and the response as failed."""
        self._close("incomplete")
        self.response.update(
            status="failed", error={"code": ERRORS[problem.kind][1], "message": problem.message}
        )
        self._emit("failed", response=self.response)
        return self._written()

    def ping(self) -> bytes:
        """A comment: the dialect has no event for it."""
        return SSE_PING

    def whole(self, choices: Sequence[Generation]) -> dict[str, Any]:
        """The response. Raises Problem for an answer that broke off in the server."""
        answer = choices[0]
        if answer.finish_reason == "error":
            raise Problem("internal", "The answer broke off; the server's log says why.")
        status = STATUSES[answer.finish_reason]
        pieces = pieces_of(answer)
        for number, piece in enumerate(pieces, 1):
            item = new_item(piece, len(self._output), self._extra, lambda event, **fields: None)
            item.push(piece)
            self._output.append(item.end(status if number == len(pieces) else "completed"))
        self._finish(status, answer.usage)
        return self.response

    def _finish(self, status: str, usage: Usage) -> None:
        self.response["status"] = status
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        else:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        prompt = self._served.prompt_tokens or usage.prompt_tokens
        self.response["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": prompt + usage.completion_tokens,
        }

    def _close(self, status: str) -> None:
        if self._open is None:
            return
        item = self._open.end(status)
        self._open = None
        self._emit("output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)

    def _emit(self, event: str, **fields: Any) -> None:
        kind = f"response.{event}"
        self._events.append(sse({"type": kind, "sequence_number": self._number, **fields}, kind))
        self._number += 1

    def _written(self) -> bytes:
        events = b"".join(self._events)
        self._events.clear()
        return events
