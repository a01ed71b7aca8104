"""What a generation gives back: whole (Generation) or piece by piece (Delta)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True)
class Usage:
    """Tokens read and written by one request. ``cached_tokens`` of the prompt came from the KV cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TokenLogprob:
    """One chosen token, its natural-log probability, and the most probable alternatives (id -> logprob)."""

    token_id: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Delta:
    """The next piece of one completion.

    Joined over a stream, ``text`` is the content and ``reasoning`` the thought before it: exactly Generation.text
    and Generation.reasoning (but for Qwen-1's ReAct, where Generation.text is all that was written).
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    index: int = 0  # which of the n completions
    logprobs: list[TokenLogprob] | None = None
    usage: Usage | None = None  # on the last piece
    tool_calls: list[dict[str, Any]] | None = None  # on the last piece, in OpenAI's shape
    reasoning: str = ""


@dataclass(frozen=True)
class Generation:
    """One finished completion.

    ``token_ids`` are all tokens the model wrote, the stopping one included; ``text`` is the visible answer they
    make, without the stop, and ``reasoning`` the thought before it. ``message`` is ready to append to an
    OpenAI-shaped conversation: its content, with the thought as "reasoning_content" and the "tool_calls" where
    there are any. With n > 1, ``choices`` holds all n completions, this one first.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprob] | None = None
    message: dict[str, Any] = field(default_factory=dict)
    choices: tuple[Generation, ...] = ()
    reasoning: str = ""
