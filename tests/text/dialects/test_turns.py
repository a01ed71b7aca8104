"""Pieces of a conversation as messages: each is put by what stands around it, so that more of them change nothing."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qwenrt.text.chat.messages import check_messages
from qwenrt.text.dialects.turns import Turns


def turns(pieces: list[tuple[str, Any]], head: str = "h") -> list[dict[str, Any]]:
    made = Turns(head)
    for what, text in pieces:
        if what == "call":
            made.call(text, "f", "{}")
        elif what == "result":
            made.result(text, f"result {text}")
        else:
            getattr(made, what)(text)
    return made.messages()


def test_an_aside_goes_with_what_the_user_says_and_else_with_the_last_result() -> None:
    begun = [("user", "q"), ("call", "1"), ("call", "2")]
    results = [("result", "1"), ("result", "2")]
    asides = [("aside", "a"), ("system", "b")]
    assert [m["content"] for m in turns([*begun, *results, *asides])[3:]] == [
        "result 1",
        "result 2\n\na\n\nb",
    ]
    spoken = turns([*begun, *results, *asides, ("user", "u")])[3:]
    assert [(m["role"], m["content"]) for m in spoken] == [
        ("tool", "result 1"),
        ("tool", "result 2"),
        ("user", "a\n\nb\n\nu"),
    ]


def test_a_result_that_says_nothing_takes_an_aside() -> None:
    made = Turns()
    made.user("q")
    made.call("1", "f", "{}")
    made.result("1", "")
    made.aside("a")
    assert made.messages()[-1] == {"role": "tool", "tool_call_id": "1", "content": "a"}


def test_the_parts_of_an_assistants_turn() -> None:
    made = turns(
        [("user", "q"), ("thought", "t"), ("said", "a"), ("call", "1"), ("said", "\nb"), ("thought", "u")]
    )
    assert made[-1] == {
        "role": "assistant",
        "content": "a\nb",
        "reasoning_content": "t\nu",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }


def test_calls_are_those_of_the_latest_turn() -> None:
    made = Turns()
    made.call("1", "f", "{}")
    made.call("2", "f", "{}")
    made.result("1", "x")
    assert made.calls == {"1", "2"}
    made.said("y")
    assert made.calls == set()


PIECE = st.tuples(
    st.sampled_from(["user", "aside", "system", "thought", "said"]), st.text("ab\n", max_size=3)
) | st.tuples(st.sampled_from(["call", "result"]), st.sampled_from("12"))


@given(st.lists(PIECE, max_size=12), st.lists(PIECE, max_size=6), st.sampled_from(["", "h"]))
def test_after_an_answer_nothing_changes_what_came_before(
    before: list[tuple[str, Any]], after: list[tuple[str, Any]], head: str
) -> None:
    """What was the prompt of one turn stands in front of the next, whatever the client adds."""
    first = turns(before, head)
    assert turns([*before, ("thought", "t"), ("said", "an answer"), ("user", "u"), *after], head)[
        : len(first)
    ] == (
        first if not first or first[-1]["role"] != "assistant" else [*first[:-1], turns_joined(before, head)]
    )


def turns_joined(before: list[tuple[str, Any]], head: str) -> dict[str, Any]:
    """The assistant's last turn, where the answer goes on with it."""
    return turns([*before, ("thought", "t"), ("said", "an answer")], head)[-1]


@given(st.lists(PIECE, max_size=12), st.sampled_from(["", "h"]))
def test_any_pieces_are_messages_in_which_user_and_assistant_take_turns(
    pieces: list[tuple[str, Any]], head: str
) -> None:
    made = turns(pieces, head)
    assert len(check_messages(made)) == len(made)
    roles = [message["role"] for message in made]
    assert "system" not in roles[1:]
    for one, other in itertools.pairwise(roles):
        assert (one, other) not in {
            ("user", "user"),
            ("assistant", "assistant"),
            ("user", "tool"),
            ("system", "system"),
        }
