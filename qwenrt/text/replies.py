"""From the model's text to an answer, whole (parse_reply) or as it arrives (ReplyStream), for every generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwenrt.text.react_calls import ReactStream, parse_react
from qwenrt.text.reply_style import ReplyStyle
from qwenrt.text.schema_values import parameter_schemas
from qwenrt.text.tagged_calls import TaggedCalls
from qwenrt.text.thinking import ThoughtSplitter
from qwenrt.text.tool_calls import Piece as Piece
from qwenrt.text.tool_calls import Reply as Reply

REACT = ReplyStyle(calls="react", thinking="none")

Tools = Sequence[Mapping[str, Any]]


def parse_reply(
    text: str, style: ReplyStyle = REACT, *, in_thought: bool = False, tools: Tools | None = None
) -> Reply:
    """Read a whole answer: first the thought is split off, then the calls are taken out of the rest.

    style: in which form the model thinks and calls. in_thought: the prompt ended inside a thought (ReAct's
    "Thought:", or "<think>"; the style "open" says the same of every prompt). tools: as they were given to the
    model; their schemas type the values of Qwen3-Coder's calls. Nothing is checked against them: a call of an
    unknown tool is passed on.

    But for ReAct, where a stream cannot see a second "Final Answer:" coming, this is what a ReplyStream says.
    """
    if style.calls != "react":
        stream = ReplyStream(style, in_thought, tools)
        stream.push(text)
        return stream.finish()[1]
    splitter = _splitter(style, in_thought)
    if splitter is None:
        return parse_react(text)
    (thought, answer), (more_thought, more_answer) = splitter.push(text), splitter.finish()
    return replace(parse_react(answer + more_answer), reasoning=thought + more_thought)


class ReplyStream:
    """parse_reply for text that arrives in pieces.

    Held back is only what may yet be a tag, the white space that a tag would drop, and a call until its closing
    tag. Joined over all pieces, content, reasoning and tool_calls are those of the Reply. The cost is linear in
    the text, whatever the pieces.
    """

    def __init__(
        self, style: ReplyStyle = REACT, in_thought: bool = False, tools: Tools | None = None
    ) -> None:
        self._thinking = _splitter(style, in_thought)
        self._calls: ReactStream | TaggedCalls | None = None
        if style.calls == "react":
            self._calls = ReactStream(in_thought)
        elif style.calls != "none":
            self._calls = TaggedCalls(style.calls == "xml", parameter_schemas(tools))
        self._shown: list[Piece] = []
        self._num_calls = 0  # handed on so far

    def push(self, text: str) -> Piece:
        """More text; returns what can be shown now, often nothing."""
        reasoning, answer = self._thinking.push(text) if self._thinking else ("", text)
        content = self._calls.push(answer) if self._calls else answer
        return self._piece(content, reasoning)

    def finish(self) -> tuple[Piece, Reply]:
        """The end: what was not shown yet, and the whole answer."""
        reasoning, answer = self._thinking.finish() if self._thinking else ("", "")
        content = self._calls.push(answer) + self._calls.finish() if self._calls else answer
        last = self._piece(content, reasoning)
        whole = Reply(
            "".join(piece.content for piece in self._shown),
            "".join(piece.reasoning for piece in self._shown),
            [call for piece in self._shown for call in piece.tool_calls],
        )
        return last, whole

    def _piece(self, content: str, reasoning: str) -> Piece:
        calls = self._calls.calls[self._num_calls :] if self._calls else []
        self._num_calls += len(calls)
        piece = Piece(content, reasoning, calls)
        self._shown.append(piece)
        return piece


def _splitter(style: ReplyStyle, in_thought: bool) -> ThoughtSplitter | None:
    """For ReAct, in_thought is about the "Thought:" of its own form."""
    inside = style.thinking == "open" or (in_thought and style.calls != "react")
    return ThoughtSplitter(inside) if inside or style.thinking != "none" else None
