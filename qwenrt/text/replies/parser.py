"""From the model's text to an answer, whole (parse_reply) or as it arrives (ReplyStream), for every generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwenrt.outputs import CallDelta
from qwenrt.text.replies.react import ReactStream, parse_react
from qwenrt.text.replies.reply import CallEnd, Part, joined_calls
from qwenrt.text.replies.reply import Piece as Piece
from qwenrt.text.replies.reply import Reply as Reply
from qwenrt.text.replies.reply import joined as joined
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.replies.schema_values import parameter_schemas
from qwenrt.text.replies.tagged_calls import TaggedCalls
from qwenrt.text.replies.thinking import ThoughtSplitter
from qwenrt.text.tokenizer.detokenizer import StopMatcher

REACT = ReplyFormat(calls="react", thinking="none")

Tools = Sequence[Mapping[str, Any]]


def parse_reply(
    text: str,
    reply_format: ReplyFormat = REACT,
    *,
    in_thought: bool = False,
    tools: Tools | None = None,
    cut_off: bool = False,
) -> Reply:
    """Read a whole answer: first the thought is split off, then the calls are taken out of the rest.

    reply_format: in which form the model thinks and calls. in_thought: the prompt ended inside a thought (ReAct's
    "Thought:", or "<think>"; the format "open" says the same of every prompt). tools: as they were given to the
    model; their schemas type the values of Qwen3-Coder's calls. Nothing is checked against them: a call of an
    unknown tool is returned as well. cut_off: max_tokens ended the text.

    A call that breaks after it has begun is among the calls, unfinished (see Reply), as a stream has shown it.

    This is what a ReplyStream says, but for the content of ReAct: a stream cannot see a second "Final Answer:" coming,
    nor take back what was said before a thought.
    """
    if reply_format.calls != "react":
        stream = ReplyStream(reply_format, in_thought, tools)
        stream.push(text)
        return stream.finish(cut_off)[1]
    splitter = _splitter(reply_format, in_thought)
    if splitter is None:
        return parse_react(text, cut_off)
    (thought, answer), (more_thought, more_answer) = splitter.push(text), splitter.finish()
    return replace(parse_react(answer + more_answer, cut_off), reasoning=thought + more_thought)


class ReplyStream:
    """parse_reply for text that arrives in pieces.

    Only what may become a tag is held back, white space that a tag would drop, and a call until it is certain that it
    is one: its name and the brace of its arguments were read. From there it comes as it is written, in ``calls``, but
    for the last brace, which waits for the call's end. Joined over all pieces, content, reasoning, tool_calls and the
    arguments in calls are those of the Reply, also of calls that break (see Reply): nothing is taken back. The cost is
    linear in the text, whatever the pieces.

    ``stop``: strings that end the answer where its content first contains one, which is cut there. They are searched
    for in the content between two calls; what is thought and what is called never ends an answer. ``single_call``: the
    first call ends the answer, whole or broken. stopped: one of these ended it. written: all the text so far, as the
    model wrote it.
    """

    def __init__(
        self,
        reply_format: ReplyFormat = REACT,
        in_thought: bool = False,
        tools: Tools | None = None,
        stop: Sequence[str] = (),
        single_call: bool = False,
    ) -> None:
        self._thinking = _splitter(reply_format, in_thought)
        self._calls: ReactStream | TaggedCalls | None = None
        if reply_format.calls == "react":
            self._calls = ReactStream(in_thought)
        elif reply_format.calls != "none":
            self._calls = TaggedCalls(reply_format.calls == "xml", parameter_schemas(tools))
        self._stop = tuple(stop)
        self._matcher = StopMatcher(self._stop)
        self._written: list[str] = []
        self._shown: list[Piece] = []
        self._single_call, self._called = single_call, False
        self._broken = 0
        self._unfinished: list[int] = []
        self._ended = 0  # calls, whole or not

    @property
    def written(self) -> str:
        return "".join(self._written)

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped or self._called

    def push(self, text: str, searched: bool = True) -> Piece:
        """More text; returns what can be shown now, often nothing. ``searched``: whether it may stop the answer."""
        self._written.append(text)
        reasoning, answer = self._thinking.push(text) if self._thinking else ("", text)
        return self._piece(self._parts(answer), reasoning, searched)

    def finish(self, cut_off: bool = False) -> tuple[Piece, Reply]:
        """The end: what was not shown yet, and the whole answer. ``cut_off``: max_tokens ended it."""
        reasoning, answer = self._thinking.finish() if self._thinking else ("", "")
        parts = self._parts(answer)
        if self._calls:
            parts += self._calls.finish(cut_off)
        last = self._piece(parts, reasoning, searched=True)
        rest = self._matcher.finish()
        if rest:
            last = replace(last, content=last.content + rest)
            self._shown[-1] = last
        whole = Reply(
            "".join(piece.content for piece in self._shown),
            "".join(piece.reasoning for piece in self._shown),
            [call for piece in self._shown for call in piece.tool_calls],
            self._broken,
            tuple(self._unfinished),
        )
        return last, whole

    def _parts(self, answer: str) -> list[Part]:
        if self._calls:
            return self._calls.push(answer)
        return [answer] if answer else []

    def _piece(self, parts: list[Part], reasoning: str, searched: bool) -> Piece:
        """What may be shown of the next parts: all, up to a stop string."""
        content: list[str] = []
        calls: list[CallDelta] = []
        ended: list[dict[str, Any]] = []
        for part in parts:
            if self.stopped:
                break
            if isinstance(part, str):
                content.append(self._matcher.push(part) if searched else part)
            elif isinstance(part, CallDelta):
                if part.name:  # no stop string goes on behind the beginning of a call
                    content.append(self._matcher.finish())
                if not self.stopped:
                    self._matcher = StopMatcher(self._stop) if part.name else self._matcher
                    calls.append(part)
            else:
                ended += self._call_ended(part)
        piece = Piece("".join(content), reasoning, ended, joined_calls(calls))
        self._shown.append(piece)
        return piece

    def _call_ended(self, end: CallEnd) -> list[dict[str, Any]]:
        self._broken += end.broken
        if end.call is None:
            return []
        if end.broken:
            self._unfinished.append(self._ended)
        self._ended += 1
        self._called = self._single_call
        return [end.call]


def _splitter(reply_format: ReplyFormat, in_thought: bool) -> ThoughtSplitter | None:
    """For ReAct, in_thought is about the "Thought:" of its own form."""
    inside = reply_format.thinking == "open" or (in_thought and reply_format.calls != "react")
    return ThoughtSplitter(inside) if inside or reply_format.thinking != "none" else None
