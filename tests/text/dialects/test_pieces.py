"""What a Delta adds, in an order in which each content ends before the next one begins."""

from __future__ import annotations

from qwenrt.outputs import CallDelta, Delta
from qwenrt.text.dialects.pieces import Pieces, Said, Thought, whole_call

BEGUN = CallDelta(0, "call_1", "f", "{")
WHOLE = {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}}


def test_more_of_a_call_comes_before_the_text_and_new_calls_after_it() -> None:
    pieces = Pieces()
    assert pieces.of(Delta("b", reasoning="a", calls=(BEGUN,))) == [Thought("a"), Said("b"), BEGUN]
    more, following = CallDelta(0, arguments="}"), CallDelta(1, "call_2", "g", "")
    assert pieces.of(Delta("c", calls=(more, following))) == [more, Said("c"), following]
    assert pieces.seen == 2


def test_calls_that_only_came_whole_are_pieces_too_and_only_those() -> None:
    pieces = Pieces()
    pieces.of(Delta("", calls=(BEGUN,)))
    first = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert pieces.of(Delta("", tool_calls=[first, WHOLE])) == [whole_call(1, WHOLE)]


def test_more_of_a_call_that_was_followed_by_text_belongs_nowhere() -> None:
    pieces = Pieces()
    pieces.of(Delta("", calls=(BEGUN,)))
    pieces.of(Delta("x"))
    assert pieces.of(Delta("", calls=(CallDelta(0, arguments="}"),))) == []
