"""How an answer is written in a dialect: the interface of all writers, and what they share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from qwenrt.outputs import Delta, Generation, Usage
from qwenrt.text.dialects.problem import Problem


@dataclass(frozen=True)
class Served:
    """What a writer knows of the server and the request: ``model`` that answers, ``request_id``, ``prompt_tokens`` of
    all prompts together, ``prompts`` as texts (for echo), ``prompt_token_ids`` of a single one (for Ollama's
    "context"), seconds since the epoch when it began; ``token_text`` tells a token's own text and bytes (for logprobs);
    ``fingerprint`` changes when answers may."""

    model: str
    request_id: str
    prompt_tokens: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    token_text: Any = None  # Callable[[int], tuple[str, bytes]]
    prompts: Sequence[str] = ()
    prompt_token_ids: Sequence[int] = ()
    fingerprint: str = "qwenrt"


class Writer(Protocol):
    """Writes the answers to one request, as a stream of bytes or as one body.

    A stream is begin, then push for each Delta as it comes, then end or fail. ``Delta.index`` counts over all choices
    of the request: those of its first prompt, those of the second, and so on. Concatenated, what these return is a
    valid stream of the dialect whatever the pieces were.
    """

    media_type: str
    id: str  # of the answer, which nobody can guess; told to the client where the dialect has a place for it

    def begin(self) -> bytes:
        """What is said before the first token."""
        ...

    def push(self, delta: Delta) -> bytes:
        """One more piece; often nothing."""
        ...

    def end(self) -> bytes:
        """All choices are finished."""
        ...

    def fail(self, problem: Problem) -> bytes:
        """The error event of a stream that cannot go on; nothing follows it."""
        ...

    def ping(self) -> bytes:
        """What keeps a connection alive while nothing is produced."""
        ...

    def whole(self, choices: Sequence[Generation]) -> Any:
        """The body of an answer that is not streamed, as msgspec can encode it."""
        ...


_encode = msgspec.json.Encoder().encode


_LINE_ENDS = {text.encode(): b"\\u%04x" % ord(text) for text in ("\x85", "\u2028", "\u2029")}


def json_bytes(value: Any) -> bytes:
    """A value as compact UTF-8 JSON on one line, also for clients that end lines where Unicode does."""
    data = _encode(value)
    for character, escaped in _LINE_ENDS.items():
        if character in data:
            data = data.replace(character, escaped)
    return data


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event with JSON data."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + json_bytes(data) + b"\n\n"


SSE_PING = b": ping\n\n"
SSE_DONE = b"data: [DONE]\n\n"


def new_id(prefix: str) -> str:
    """An id nobody can guess, such as "chatcmpl-..."."""
    return prefix + uuid.uuid4().hex


def summed(usages: Sequence[Usage]) -> Usage:
    """The usage of several choices. The prompt of several choices is counted once where ``Served.prompt_tokens`` says
    so: a writer takes prompt_tokens from there."""
    return Usage(
        max((u.prompt_tokens for u in usages), default=0),
        sum(u.completion_tokens for u in usages),
        max((u.cached_tokens for u in usages), default=0),
        sum(u.reasoning_tokens for u in usages),
    )
