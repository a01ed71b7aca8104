"""The answers to POST /v1/chat/completions: chunks, and whole bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwenrt.outputs import CallDelta, Delta, FinishReason, Generation, TokenLogprob
from qwenrt.text.dialects.answers import Served
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.logprobs import logprob_entries
from qwenrt.text.dialects.openai_bodies import FINISH, Frame, best, ended

_OLD_FINISH: dict[FinishReason, str] = {**FINISH, "tool_calls": "function_call"}


class ChatWriter(Frame):
    """A Writer, see answers.py."""

    def __init__(self, served: Served, ask: Ask) -> None:
        super().__init__(served, ask.extra, "chat.completion", "chat.completion.chunk", "chatcmpl-")
        self._finish = _OLD_FINISH if self._wishes.old_calls else FINISH
        self._calling: set[int] = set()  # choices some of whose calls were told

    def begin(self) -> bytes:
        """The role of each choice."""
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(index, dict(role)) for index in range(self._wishes.choices))

    def push(self, delta: Delta) -> bytes:
        self.count(delta.index, len(delta.token_ids), delta.usage, delta.timing)
        said = self._said(delta)
        logprobs = delta.logprobs if self._wishes.logprobs is not None else None
        if not said and not logprobs and delta.finish_reason is None:
            return b""
        return self._chunk(delta.index, said, logprobs, delta.finish_reason, delta.broken_calls)

    def whole(self, choices: Sequence[Generation]) -> dict[str, Any]:
        given = [self._choice(index, one) for index, one in best(choices, self._wishes)]
        return self.body(given, choices)

    # ---- pieces

    def _chunk(
        self,
        index: int,
        said: dict[str, Any],
        logprobs: Sequence[TokenLogprob] | None = None,
        reason: FinishReason | None = None,
        broken_calls: int = 0,
    ) -> bytes:
        choice = {"index": index, "delta": said, "logprobs": self._logprobs(logprobs), "finish_reason": None}
        if reason is not None:
            ended(choice, reason, self._finish, broken_calls)
        return self.chunk(choice)

    def _said(self, delta: Delta) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if delta.reasoning:
            said["reasoning_content"] = said["reasoning"] = delta.reasoning
        if delta.text:
            said["content"] = delta.text
        calls = delta.calls
        if calls:
            self._calling.add(delta.index)
        elif delta.tool_calls and delta.index not in self._calling:
            calls = _whole_calls(delta.tool_calls)
        if calls and self._wishes.old_calls:
            if old := _old_piece(calls):
                said["function_call"] = old
        elif calls:
            said["tool_calls"] = [_piece(call) for call in calls]
        return said

    # ---- whole

    def _choice(self, index: int, one: Generation) -> dict[str, Any]:
        message = {
            "role": "assistant",
            "content": one.message.get("content", one.text),
            "refusal": None,
            "annotations": [],
        }
        if reasoning := one.message.get("reasoning_content") or one.reasoning:
            message["reasoning_content"] = message["reasoning"] = reasoning
        if calls := one.message.get("tool_calls"):
            if self._wishes.old_calls:
                message["function_call"] = calls[0]["function"]
            else:
                message["tool_calls"] = calls
        choice = {"index": index, "message": message, "logprobs": self._logprobs(one.logprobs)}
        ended(choice, one.finish_reason, self._finish, one.broken_calls)
        return choice

    def _logprobs(self, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None or self._wishes.logprobs is None:
            return None
        return {"content": logprob_entries(logprobs, self._served.token_text), "refusal": None}


def _whole_calls(calls: Sequence[dict[str, Any]]) -> tuple[CallDelta, ...]:
    return tuple(
        CallDelta(i, call["id"], call["function"]["name"], call["function"]["arguments"])
        for i, call in enumerate(calls)
    )


def _piece(call: CallDelta) -> dict[str, Any]:
    if not call.name and not call.id:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _old_piece(calls: Sequence[CallDelta]) -> dict[str, str]:
    """Of the first call, which is the only one that a function_call can tell."""
    piece: dict[str, str] = {}
    for call in calls:
        if call.index == 0:
            if call.name:
                piece["name"] = call.name
            piece["arguments"] = piece.get("arguments", "") + call.arguments
    return piece
