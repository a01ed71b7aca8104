"""What is asked of an engine for one answer, and what is made of the Deltas that come: content, thoughts, calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenrt.arguments import as_integer
from qwenrt.engine.thoughts import ThoughtRules
from qwenrt.errors import RequestError, shown
from qwenrt.outputs import Delta, FinishReason, Generation, Timing, TokenLogprob, Usage
from qwenrt.sampling_params import SamplingChanges, SamplingParams
from qwenrt.structure import Grammar, Thought
from qwenrt.text.replies.call_grammar import or_calls
from qwenrt.text.replies.parser import Reply, ReplyStream, parse_reply
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.replies.thinking import CLOSE, OPEN

if TYPE_CHECKING:
    from qwenrt.engine.answers import Handle
    from qwenrt.text.tokenizer.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
# What was said before: (user, assistant) pairs, as `chat` returns them, or alternating messages.
Past = Sequence[Sequence[str] | Mapping[str, Any]] | None
Pairs = list[tuple[str, str]]


class TurnOptions(SamplingChanges, total=False):
    """What else may be asked of a turn: keywords of chat, stream, achat and astream."""

    enable_thinking: bool | None
    thinking_budget: int | None
    reasoning_effort: str | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool
    adapter: str | None
    sampling_params: SamplingParams | None


PLAIN = ReplyFormat(calls="none", thinking="none")
# The sentence that Qwen3 was trained to end a thought with when its budget is used up.
_OUT_OF_TIME = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


@dataclass(frozen=True)
class ReplyReader:
    """How the answers to one prompt are read, and what they are held to.

    ``in_thought``: the prompt ended inside a thought; ``thought_over``: behind one, so that none is to come.
    ``single_call``: an answer ends with its first call. ``grammar``: what it must be because of the prompt, a call, or
    what calls in it must be.
    ``tags``: what the vocabulary has tokens for.
    """

    reply_format: ReplyFormat = PLAIN
    in_thought: bool = False
    tools: Any = None
    single_call: bool = False
    thought_over: bool = False
    grammar: Grammar | None = None
    tags: Collection[str] = ()

    def held(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the grammar of this prompt's answers, which begins after a thought. RequestError where
        both have one."""
        grammar = params.grammar or self.grammar
        if grammar is None:
            return params
        must_call = self.grammar is not None and self.grammar.begins is None
        if params.grammar is not None and must_call:
            raise RequestError(
                "a grammar beside a tool_choice that requires a call",
                "an answer can be held to one of them",
                "Leave one out.",
            )
        if params.grammar is not None and self.tools:
            single, tags = self.single_call, self.tags
            grammar = or_calls(grammar, self.reply_format, self.tools, single=single, tags=tags)
        if self.reply_format.calls != "react" and (self.in_thought or self.reply_format.thinking == "open"):
            thought: Thought = "open"
        else:
            thinks = self.reply_format.thinking == "hybrid" and not self.thought_over
            thought = "possible" if thinks else "none"
        return replace(params, grammar=replace(grammar, thought=thought))

    @property
    def thinks(self) -> bool:
        """Whether an answer may begin with a thought between tags."""
        return self.reply_format.thinking != "none"

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


COMPLETION = ReplyReader()  # all that is written is the answer


@dataclass(frozen=True)
class Prepared:
    """One request, ready for an engine: everything about it that takes time or can be wrong was seen to.

    prompt_token_ids: the prompt. params: as asked for. reader: how the answers are read. stop: strings that end them
    because of the prompt's form. thinking_budget: the longest thought in tokens. adapter: the name of a loaded one.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    reader: ReplyReader = COMPLETION
    stop: tuple[str, ...] = ()
    thinking_budget: int | None = None
    adapter: str | None = None

    def options(self, tokenizer: Tokenizer | None) -> tuple[SamplingParams, dict[str, Any]]:
        """The parameters and options that an engine takes."""
        replies, params = self.reader.replies(self.params)
        if self.stop:
            params = replace(params, stop=(*params.stop, *self.stop))
        thought = None
        if self.reader.thinks and tokenizer is not None:
            thought = thought_rules(tokenizer, self.reader, self.thinking_budget)
        return params, {"replies": replies, "thought": thought, "adapter": self.adapter}


def checked_budget(thinking_budget: object, reader: ReplyReader) -> int | None:
    """The longest thought as it may be given: a number of tokens, or None for any. Raises RequestError."""
    if thinking_budget is None:
        return None
    asked = f"thinking_budget={shown(thinking_budget)}"
    if not reader.thinks:
        raise RequestError(asked, "this model does not think", "Leave it out.")
    budget = as_integer(thinking_budget)
    if budget is None or budget < 1:
        raise RequestError(
            asked, "not a number of tokens", "Use at least 1; enable_thinking=False answers at once."
        )
    return budget


def thought_rules(tokenizer: Tokenizer, reader: ReplyReader, budget: int | None) -> ThoughtRules:
    """How thoughts look in this vocabulary, and what is written to end one that is too long."""
    return ThoughtRules(
        tokenizer.token_id(OPEN),
        tokenizer.token_id(CLOSE),
        tuple(tokenizer.encode(_OUT_OF_TIME, allow_special=True)),
        reader.in_thought or reader.reply_format.thinking == "open",
        budget,
    )


def deltas_of(handle: Handle) -> Iterator[Delta]:
    """The deltas of a request. It is cancelled when the reader stops before the end."""
    try:
        yield from handle
    finally:
        handle.cancel()


def generation_of(
    deltas: Iterable[Delta], reader: ReplyReader = COMPLETION, replies: Sequence[ReplyStream] = ()
) -> Generation:
    """All deltas of one request as its first completion, with all of them in ``choices`` where there are several.
    ``replies``: what read them."""
    choices = joined_by_index(deltas)
    if reader.reply_format.calls == "react":
        choices = [
            _transcript(streamed, reply, reader) for streamed, reply in zip(choices, replies, strict=True)
        ]
    return choices[0] if len(choices) == 1 else replace(choices[0], choices=tuple(choices))


def _transcript(streamed: Generation, reply: ReplyStream, reader: ReplyReader) -> Generation:
    """The text of a ReAct answer includes its thoughts and calls, so the message is parsed from the whole of it."""
    cut_off = streamed.finish_reason not in ("stop", "tool_calls")
    whole = parse_reply(reply.written, reader.reply_format, cut_off=cut_off)
    calls = streamed.message.get("tool_calls", [])
    return replace(streamed, text=reply.written, message=replace(whole, tool_calls=calls).message())


def joined_by_index(deltas: Iterable[Delta]) -> list[Generation]:
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
        timing=deltas[-1].timing or Timing(),
        broken_calls=deltas[-1].broken_calls,
    )
