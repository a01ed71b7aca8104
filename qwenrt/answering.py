"""The answers to a chat prompt, whole or as a stream, with content, thoughts and calls separated; thinking budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenrt.arguments import as_integer
from qwenrt.errors import RequestError, shown
from qwenrt.outputs import Delta, FinishReason, Generation, TokenLogprob, Usage
from qwenrt.structure import Grammar, Thought
from qwenrt.text.replies.parser import Reply, ReplyStream, parse_reply
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.tokenizer.detokenizer import Detokenizer

if TYPE_CHECKING:
    from qwenrt.engine.async_engine import Handle
    from qwenrt.sampling_params import SamplingParams
    from qwenrt.text.tokenizer.tokenizer import Tokenizer

PLAIN = ReplyFormat(calls="none", thinking="none")
# The sentence that Qwen3 was trained to end a thought with when its budget is used up.
_OUT_OF_TIME = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)
_OPENS_WITHIN = 4  # an answer that begins with a thought has its <think> among so many first tokens
_ANSWER_SHARE = 4  # with a thinking budget, one of so many of max_tokens is reserved for the answer

Submit = Callable[[list[int], "SamplingParams", Sequence[ReplyStream]], "Handle"]


@dataclass(frozen=True)
class ReplyReader:
    """How the answers to one prompt are read, and what they are held to.

    ``in_thought``: the prompt ended inside a thought; ``thought_over``: behind one, so that none is to come.
    ``single_call``: an answer ends with its first call. ``grammar``: what it must be because of the prompt, a call.
    """

    reply_format: ReplyFormat = PLAIN
    in_thought: bool = False
    tools: Any = None
    single_call: bool = False
    thought_over: bool = False
    grammar: Grammar | None = None

    def held(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the grammar of this prompt's answers, which begins after a thought. RequestError where
        both have one."""
        grammar = params.grammar or self.grammar
        if grammar is None:
            return params
        if params.grammar is not None and self.grammar is not None:
            raise RequestError(
                "a grammar beside a tool_choice that requires a call",
                "an answer can be held to one of them",
                "Leave one out.",
            )
        if self.reply_format.calls != "react" and (self.in_thought or self.reply_format.thinking == "open"):
            thought: Thought = "open"
        else:
            thinks = self.reply_format.thinking == "hybrid" and not self.thought_over
            thought = "possible" if thinks else "none"
        return replace(params, grammar=replace(grammar, thought=thought))

    def replies(self, params: SamplingParams) -> tuple[list[ReplyStream], SamplingParams]:
        """What reads each of the n completions, nothing where all of an answer is content; and the parameters without
        the stop strings that it searches for.

        Stop strings are about the content that a reader gets, unless ``include_reasoning_in_stop``: then they are
        searched for in all that is written. So they are for Qwen-1, whose thoughts and actions are lines of one text.
        """
        params = self.held(params)
        if self.reply_format == PLAIN and not self.in_thought:
            return [], params
        stop: Sequence[str] = ()
        if self.reply_format.calls != "react" and not params.include_reasoning_in_stop:
            stop, params = params.stop, replace(params, stop=())
        return [
            ReplyStream(self.reply_format, self.in_thought, self.tools, stop, self.single_call)
            for _ in range(params.n)
        ], params


class Answer:
    """The answers to one chat prompt.

    Iterating gives their Deltas, once: text is content, thoughts are apart, calls come as they are written, and whole
    with the last one. Ending the iteration early cancels the request. ``thinking_budget``: the longest thought, in
    tokens.
    """

    def __init__(
        self,
        submit: Submit,
        prompt: list[int],
        params: SamplingParams,
        reader: ReplyReader,
        thinking_budget: int | None,
        tokenizer: Tokenizer,
    ) -> None:
        self._submit, self._prompt, self._asked, self._reader = submit, prompt, params, reader
        self._replies, self._params = reader.replies(params)
        if thinking_budget is None:
            self._deltas = deltas_of(submit(prompt, self._params, self._replies))
            return
        if reader.reply_format.thinking == "none":
            asked = f"thinking_budget={shown(thinking_budget)}"
            raise RequestError(asked, "this model does not think", "Leave it out.")
        budget = as_integer(thinking_budget)
        if budget is None or budget < 1 or params.n != 1:
            raise RequestError(
                f"thinking_budget={shown(thinking_budget)}",
                f"with n={params.n}" if budget is not None and budget >= 1 else "not a number of tokens",
                "Use at least 1 and n=1; enable_thinking=False answers at once.",
            )
        self._deltas = self._within_budget(budget, tokenizer)

    def __iter__(self) -> Iterator[Delta]:
        return self._deltas

    def generation(self) -> Generation:
        """The whole answer, the first of n with all of them in ``choices``."""
        if self._reader.reply_format.calls != "react":
            return generation_of(self._deltas)
        each = zip(_joined_by_index(self._deltas), self._replies, strict=True)
        return _with_choices([self._transcript(streamed, reply) for streamed, reply in each])

    def _transcript(self, streamed: Generation, reply: ReplyStream) -> Generation:
        """The text of a ReAct answer includes its thoughts and calls, so the message is parsed from the whole of it."""
        cut_off = streamed.finish_reason in ("length", "abort")
        whole = parse_reply(reply.written, self._reader.reply_format, cut_off=cut_off)
        calls = streamed.message.get("tool_calls", [])
        return replace(streamed, text=reply.written, message=replace(whole, tool_calls=calls).message())

    def _within_budget(self, budget: int, tokenizer: Tokenizer) -> Iterator[Delta]:
        """The Deltas of one answer whose thought ends after ``budget`` tokens.

        A thought that is longer is cut there, closed with the words the model was taught, and the answer goes on from
        that: a second request, whose prompt is still in the cache. Of ``max_tokens`` a share is kept for the answer.
        """
        opening, closing = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
        limit = self._params.max_tokens
        if limit is not None:
            budget = min(budget, limit - max(1, limit // _ANSWER_SHARE))
        written: list[int] = []
        given = [0, 0]  # characters of content and of thought
        handle = self._submit(self._prompt, self._params, self._replies)
        try:
            for delta in handle:
                written += delta.token_ids
                given = [given[0] + len(delta.text), given[1] + len(delta.reasoning)]
                yield delta
                if delta.finish_reason is not None:
                    return
                thinking = self._reader.in_thought or opening in written[:_OPENS_WITHIN]
                if closing in delta.token_ids or (not thinking and len(written) >= _OPENS_WITHIN):
                    yield from handle
                    return
                if thinking and len(written) >= budget:
                    break
        finally:
            handle.cancel()
        yield from self._out_of_time(written, given, tokenizer)

    def _out_of_time(self, written: list[int], given: list[int], tokenizer: Tokenizer) -> Iterator[Delta]:
        """The end of a thought that was cut, and the answer after it. Another ReplyStream parses them, since the engine
        may have advanced the first one; what the first one had held back is emitted now."""
        end = tokenizer.encode(_OUT_OF_TIME, allow_special=True)
        self._replies, _ = self._reader.replies(self._asked)
        detokenizer = Detokenizer(tokenizer)
        thought = "".join(map(detokenizer.add, written))
        piece = self._replies[0].push(thought + _OUT_OF_TIME)
        yield Delta(piece.content[given[0] :], end, reasoning=piece.reasoning[given[1] :])
        limit, done = self._params.max_tokens, len(written)
        rest = replace(
            self._params,
            max_tokens=None if limit is None else max(1, limit - done),
            grammar=None if self._params.grammar is None else replace(self._params.grammar, thought="none"),
            min_tokens=max(0, self._params.min_tokens - done - len(end)),
        )
        for delta in deltas_of(self._submit([*self._prompt, *written, *end], rest, self._replies)):
            usage = delta.usage
            if usage is not None:
                total = done + len(end) + usage.completion_tokens
                usage = replace(usage, prompt_tokens=len(self._prompt), completion_tokens=total)
            yield replace(delta, usage=usage)


def deltas_of(handle: Handle) -> Iterator[Delta]:
    """The deltas of a request. It is cancelled when the reader stops before the end."""
    try:
        yield from handle
    finally:
        handle.cancel()


def generation_of(deltas: Iterable[Delta]) -> Generation:
    """All deltas of one request as its first completion, with all of them in ``choices`` where there are several."""
    return _with_choices(_joined_by_index(deltas))


def _with_choices(choices: list[Generation]) -> Generation:
    return choices[0] if len(choices) == 1 else replace(choices[0], choices=tuple(choices))


def _joined_by_index(deltas: Iterable[Delta]) -> list[Generation]:
    pieces: dict[int, list[Delta]] = {}
    for delta in deltas:
        pieces.setdefault(delta.index, []).append(delta)
    return [_joined(pieces[index]) for index in sorted(pieces)]


def _joined(deltas: list[Delta]) -> Generation:
    logprobs: list[TokenLogprob] | None = None
    if any(delta.logprobs is not None for delta in deltas):
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    reply = Reply(
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        deltas[-1].tool_calls or [],
    )
    reason: FinishReason = deltas[-1].finish_reason or "abort"
    return Generation(
        text=reply.content,
        token_ids=[token for delta in deltas for token in delta.token_ids],
        finish_reason=reason,
        usage=deltas[-1].usage or Usage(),
        logprobs=logprobs,
        message=reply.message(),
        reasoning=reply.reasoning,
        broken_calls=deltas[-1].broken_calls,
    )
