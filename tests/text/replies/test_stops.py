"""Stop strings within an answer with thoughts and calls: where they are looked for, and that no cut changes it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.text.replies.parser import Reply, ReplyStream
from qwenrt.text.replies.reply_format import ReplyFormat
from tests.text.replies.test_parser import FRAGMENTS, HERMES, HYBRID, OPEN, XML, F, X, called

TOOLS = [{"name": "f"}]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*FRAGMENTS, "```json\n", "\n```", "ab", "abc", "b"]), st.text("abc", max_size=3)
    ),
    max_size=14,
).map("".join)
STOPS = st.lists(
    st.one_of(st.text("abc<\n", min_size=1, max_size=3), st.sampled_from(["PROSE", "f", "n", '"']))
)


def stream(
    text: str, reply_format: ReplyFormat, stop: list[str], sizes: tuple[int, ...] = (1,), **options: Any
) -> Any:
    """(whole reply, stopped); every piece joined is the whole."""
    reply = ReplyStream(reply_format, stop=stop, tools=TOOLS, **options)
    pieces, at, turn = [], 0, 0
    while at < len(text) and not reply.stopped:
        pieces.append(reply.push(text[at : at + sizes[turn % len(sizes)]]))
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    last, whole = reply.finish()
    pieces.append(last)
    assert "".join(piece.content for piece in pieces) == whole.content
    assert "".join(piece.reasoning for piece in pieces) == whole.reasoning
    assert [call for piece in pieces for call in piece.tool_calls] == whole.tool_calls
    return whole, reply.stopped


@pytest.mark.parametrize(
    ("text", "reply_format", "stop", "content", "reasoning", "calls"),
    [
        ("a stop\n</think>\n\nb stop c", OPEN, ["stop"], "b ", "a stop", 0),
        ("<think>stop</think>b", HYBRID, ["stop"], "b", "stop", 0),
        ("a</think>\n\nb\n\nc", OPEN, ["\n\n"], "b", "a", 0),
        ("a</think>b", OPEN, ["</think>"], "b", "a", 0),
        (f"a\n{F}\nb stop {F}", HERMES, ["stop"], "a\nb ", "", 1),
        (f"a\n{F}\nb", HERMES, ['"f"', "arguments", "<tool_call>", "name"], "a\nb", "", 1),
        (f"st\n{F}\nop", HERMES, ["stop", "st\nop", "t\n"], "st\nop", "", 1),
        (f"stop\n{F}", HERMES, ["stop"], "", "", 0),
        (f"{X}\nstop", XML, ["stop", "parameter"], "", "", 1),
        ('<tool_call>\n{"stop"}\n</tool_call>b', HERMES, ["stop"], '<tool_call>\n{"', "", 0),
        ("```json\n" + F[12:-13] + "\n```\nb stop", HERMES, ["json", "```", "name", "stop"], "b ", "", 1),
    ],
)
def test_where_stop_strings_count(
    text: str, reply_format: ReplyFormat, stop: list[str], content: str, reasoning: str, calls: int
) -> None:
    for sizes in ((1,), (3, 2), (len(text),)):
        whole, _ = stream(text, reply_format, stop, sizes)
        assert (whole.content, whole.reasoning, len(whole.tool_calls)) == (content, reasoning, calls)


@settings(deadline=None, max_examples=100)
@given(
    TEXTS,
    st.sampled_from([HERMES, HYBRID, OPEN, XML]),
    STOPS,
    st.lists(st.integers(1, 9), min_size=1).map(tuple),
)
def test_no_cut_changes_where_an_answer_ends(
    text: str, reply_format: ReplyFormat, stop: list[str], sizes: tuple[int, ...]
) -> None:
    whole, stopped = stream(text, reply_format, stop)
    for cut in (sizes, (max(1, len(text)),)):
        other, also = stream(text, reply_format, stop, cut)
        assert (other.content, also) == (whole.content, stopped)
        assert called(other.tool_calls) == called(whole.tool_calls)
    free, _ = stream(text, reply_format, [])
    assert free.content.startswith(whole.content) and called(free.tool_calls)[
        : len(whole.tool_calls)
    ] == called(whole.tool_calls)
    if not free.tool_calls:
        places = [free.content.find(s) for s in stop if s in free.content]
        assert stopped is bool(places)
        assert whole.content == (free.content[: min(places)] if places else free.content)
    if not stopped:
        assert (
            isinstance(whole, Reply) and whole.content == free.content and whole.reasoning == free.reasoning
        )
