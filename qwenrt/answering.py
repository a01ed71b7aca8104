"""From the deltas of a request to what a caller reads: content, thought and calls apart, whole or as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenrt.outputs import Delta, FinishReason, Generation, TokenLogprob, Usage
from qwenrt.text.replies import ReplyStream, parse_reply
from qwenrt.text.reply_style import ReplyStyle

if TYPE_CHECKING:
    from qwenrt.engine.async_engine import Handle
    from qwenrt.sampling_params import SamplingParams
    from qwenrt.text.tokenizer import Tokenizer

PLAIN = ReplyStyle(calls="none", thinking="none")
# What Qwen3 was taught to read as the end of its time to think.
_OUT_OF_TIME = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)
_OPENS_WITHIN = 4  # tokens in which an answer that begins with a thought has opened it
_ANSWER_SHARE = 4  # one token in so many of max_tokens is kept for the answer when a thinking budget is set

Submit = Callable[[list[int], "SamplingParams"], "Handle"]


@dataclass(frozen=True)
class Reading:
    """How the answers to one prompt are read. ``in_thought``: the prompt ended inside a thought."""

    style: ReplyStyle = PLAIN
    in_thought: bool = False
    tools: Any = None

    @property
    def is_plain(self) -> bool:
        return self.style == PLAIN and not self.in_thought

    def stream(self) -> ReplyStream:
        return ReplyStream(self.style, self.in_thought, self.tools)


def deltas_of(handle: Handle) -> Iterator[Delta]:
    """The deltas of a request, which is cancelled when nobody reads on."""
    try:
        yield from handle
    finally:
        handle.cancel()


def readable(deltas: Iterable[Delta], reading: Reading) -> Iterator[Delta]:
    """Raw deltas -> those for a reader: text is content, thoughts are apart, calls come whole with the last one."""
    if reading.is_plain:
        yield from deltas
        return
    replies: dict[int, ReplyStream] = {}
    for delta in deltas:
        reply = replies.setdefault(delta.index, reading.stream())
        piece = reply.push(delta.text)
        if delta.finish_reason is None:
            yield replace(delta, text=piece.content, reasoning=piece.reasoning)
            continue
        rest, whole = reply.finish()
        reason: FinishReason = "tool_calls" if whole.tool_calls else delta.finish_reason
        yield replace(
            delta,
            text=piece.content + rest.content,
            reasoning=piece.reasoning + rest.reasoning,
            finish_reason=reason,
            tool_calls=whole.tool_calls or None,
        )


def generations(deltas: Iterable[Delta], reading: Reading) -> list[Generation]:
    """All raw deltas of one request, joined per completion, in the order of their index."""
    pieces: dict[int, list[Delta]] = {}
    for delta in deltas:
        pieces.setdefault(delta.index, []).append(delta)
    return [_joined(pieces[index], reading) for index in sorted(pieces)]


def _joined(deltas: list[Delta], reading: Reading) -> Generation:
    text = "".join(delta.text for delta in deltas)
    logprobs: list[TokenLogprob] | None = None
    if any(delta.logprobs is not None for delta in deltas):
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    reason: FinishReason = deltas[-1].finish_reason or "abort"
    message: dict[str, Any] = {"role": "assistant", "content": text}
    reasoning = ""
    if not reading.is_plain:
        reply = parse_reply(text, reading.style, in_thought=reading.in_thought, tools=reading.tools)
        message, reasoning = reply.message(), reply.reasoning
        reason = "tool_calls" if reply.tool_calls else reason
        if (
            reading.style.calls != "react"
        ):  # whose text stays the whole transcript, thoughts and calls included
            text = reply.content
    return Generation(
        text=text,
        token_ids=[token for delta in deltas for token in delta.token_ids],
        finish_reason=reason,
        usage=deltas[-1].usage or Usage(),
        logprobs=logprobs,
        message=message,
        reasoning=reasoning,
    )


def within_budget(
    submit: Submit, prompt: list[int], params: SamplingParams, budget: int, tokenizer: Tokenizer, inside: bool
) -> Iterator[Delta]:
    """The raw deltas of one answer whose thought ends after ``budget`` tokens.

    A thought that is longer is cut there, closed with the words the model was taught, and the answer goes on from
    that: a second request, whose prompt is still in the cache. Of ``max_tokens`` a share is kept for the answer.
    ``inside``: the prompt opened the thought.
    """
    opening, closing = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    limit = params.max_tokens
    if limit is not None:
        budget = min(budget, limit - max(1, limit // _ANSWER_SHARE))
    written: list[int] = []
    handle = submit(prompt, params)
    try:
        for delta in handle:
            written += delta.token_ids
            yield delta
            if delta.finish_reason is not None:
                return
            thinking = inside or opening in written[:_OPENS_WITHIN]
            if closing in delta.token_ids or (not thinking and len(written) >= _OPENS_WITHIN):
                yield from handle
                return
            if thinking and len(written) >= budget:
                break
    finally:
        handle.cancel()
    end = tokenizer.encode(_OUT_OF_TIME, allow_special=True)
    yield Delta(_OUT_OF_TIME, end)
    left = None if limit is None else max(1, limit - len(written))
    rest = submit([*prompt, *written, *end], replace(params, max_tokens=left))
    for delta in deltas_of(rest):
        usage = delta.usage
        if usage is not None:
            done = len(written) + len(end) + usage.completion_tokens
            usage = replace(usage, prompt_tokens=len(prompt), completion_tokens=done)
        yield replace(delta, usage=usage)
