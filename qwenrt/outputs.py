"""What a generation gives back: whole (Generation) or piece by piece (Delta)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "tool_calls", "timeout", "abort", "error"]


@dataclass(frozen=True)
class Usage:
    """Tokens read and written by one request. ``cached_tokens`` of the prompt came from the KV cache;
    ``reasoning_tokens`` of the completion are its thought."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

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
class Timing:
    """Where the time of one completion went, in seconds: ``queue_s`` until it was first computed, ``first_token_s``
    from its arrival to its first token, ``total_s`` to its end. ``tokens_per_s``: of the tokens after the first.
    ``drafted_tokens`` were guessed for it, and ``accepted_tokens`` of them the model confirmed."""

    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    tokens_per_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class CallDelta:
    """A piece of one call of a tool. ``index``: which call of the answer, from 0. The first piece of a call has its
    ``id`` and ``name``, later ones are empty there; joined, ``arguments`` are those of the call."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """The next piece of one completion.

    Joined over a stream, ``text`` is the content and ``reasoning`` the thought before it: exactly Generation.text
    and Generation.reasoning (but for Qwen-1's ReAct, where Generation.text is all that was written).

    ``calls`` are what this piece adds to the calls, as they are written; joined, the arguments of each are those in
    ``tool_calls``. In one Delta, pieces that go on with a call (no name) come before the text, and calls that begin
    come after it. A call that turned out to be broken ends unfinished, its arguments the beginning of JSON and never
    whole.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    index: int = 0  # which of the n completions
    logprobs: list[TokenLogprob] | None = None
    usage: Usage | None = None  # on the last piece
    tool_calls: list[dict[str, Any]] | None = None  # all of them, on the last piece, in OpenAI's shape
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    timing: Timing | None = None  # on the last piece
    broken_calls: int = 0  # on the last piece: how many calls were none, as text or unfinished


@dataclass(frozen=True)
class Generation:
    """One finished completion.

    ``token_ids`` are all tokens the model wrote, the stopping one included; ``text`` is the visible answer they
    make, without the stop, and ``reasoning`` the thought before it. ``message`` is ready to append to an
    OpenAI-shaped conversation: its content, with the thought as "reasoning_content" and the "tool_calls" where
    there are any. ``broken_calls`` counts what was meant as a call and is none: it is text, or is among the tool_calls
    with arguments that break off, which no reader of JSON takes. With n > 1, ``choices`` holds all n completions, this
    one first.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprob] | None = None
    message: dict[str, Any] = field(default_factory=dict)
    choices: tuple[Generation, ...] = ()
    reasoning: str = ""
    timing: Timing = field(default_factory=lambda: Timing())
    broken_calls: int = 0
