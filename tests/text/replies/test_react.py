"""ReAct text to messages, whole and streamed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.outputs import CallDelta
from qwenrt.text.chat.react import parse_messages
from qwenrt.text.replies.parser import Piece, Reply, ReplyStream, parse_reply

PARTS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "Thought:",
                "Thought: ",
                "\nAction:",
                "Action: f",
                "\nAction Input:",
                "\nObservation:",
                "\n",
                " ",
                "\nFinal Answer: ",
                "Final Answer:",
                '{"a": 1}',
                "prose",
                "Act",
                "\nFinal",
            ]
        ),
        st.text(max_size=4),
    ),
    max_size=10,
)


def called(reply: Reply) -> list[tuple[str, str]]:
    return [(c["function"]["name"], c["function"]["arguments"]) for c in reply.tool_calls]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (
            'Thought: look it up\nAction: search\nAction Input: {"q": 1}\n',
            "look it up",
            [("search", '{"q": 1}')],
        ),
        ("Thought: t\nAction: f\nAction Input: x\nObservation: made up", "t", [("f", "x")]),
        ("\nAction: f\nAction Input: x", "", [("f", "x")]),
        ("Action: f\nAction Input: x", "", [("f", "x")]),
        (" Action: f\nAction Input:", "", [("f", "{}")]),
        ("Action: f\nAction Input: \nObservation: x", "", [("f", "{}")]),
        ('Action: f\nAction Input: {"q": ', "", [("f", '{"q":')]),
        ("Thought:\nAction: f\nAction Input: x", "", [("f", "x")]),
        ("Sure. Thought: a Thought: b\nAction: f\nAction Input: x", "a Thought: b", [("f", "x")]),
        ("prose first\nAction: f\nAction Input: a\nb\n\nc", "prose first", [("f", "a\nb\n\nc")]),
        (" I see.\nAction: f\nAction Input: x\nAction: g", "I see.", [("f", "x\nAction: g")]),
        ("x\nObservation: o\nAction: f\nAction Input: y", "x\nObservation: o", [("f", "y")]),
        ("Thought: I now know the final answer.\nFinal Answer: 42", "42", []),
        ("Final Answer: 42", "42", []),
        ("Thought: a\nFinal Answer: 1\nFinal Answer: 2", "2", []),
        ("Thought: a\nFinal Answer:\n- one\n- two", "\n- one\n- two", []),
        ("Thought: a\nAction: f", "Thought: a\nAction: f", []),
        ("x\nAction:  \nAction Input: y", "x\nAction:  \nAction Input: y", []),
        ("x\nAction Input: y\nAction: f", "x\nAction Input: y\nAction: f", []),
        ("x\nAction Input: y\nAction: f\nAction Input: z", "x\nAction Input: y", [("f", "z")]),
        ("Thought: t\nAction Input: y\nAction: f\nAction Input: z", "t\nAction Input: y", [("f", "z")]),
        ("Thought: t\nFinal Answer: 1\nAction: f\nAction Input: z", "1\nAction: f\nAction Input: z", []),
        ("just prose, Action: none", "just prose, Action: none", []),
        ("", "", []),
    ],
)
def test_parse(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    reply = parse_reply(text)
    assert (reply.content, called(reply)) == (content, calls)
    for pieces in (list(text), [text]):
        streamed = ReplyStream()
        out = [streamed.push(p).content for p in pieces]
        rest, whole = streamed.finish()
        assert "".join([*out, rest.content]) == whole.content
        assert rest.tool_calls == whole.tool_calls
        assert called(whole) == calls
        if text.count("Final Answer") < 2 and "Sure." not in text:
            assert whole.content.strip() == content.strip()


def test_message_is_ready_to_append() -> None:
    reply = parse_reply("Thought: t\nAction: f\nAction Input: {}")
    message = reply.message()
    assert message["role"] == "assistant" and message["content"] == "t"
    assert re.fullmatch(r"call_[0-9a-f]{24}", message["tool_calls"][0]["id"])
    assert message["tool_calls"][0]["type"] == "function"
    assert parse_reply("Action: f\nAction Input: {}").message()["content"] is None
    assert parse_reply("hi").message() == {"role": "assistant", "content": "hi"}
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "done"}
    turns = parse_messages([{"role": "user", "content": "q"}, message, result])
    assert turns.history[0][1] == "Thought: t\nAction: f\nAction Input: {}\nObservation: done\nThought:"


def test_call_ids_differ() -> None:
    text = "Action: f\nAction Input: {}"
    assert parse_reply(text).tool_calls[0]["id"] != parse_reply(text).tool_calls[0]["id"]


def test_the_final_answer_streams_and_thoughts_do_not() -> None:
    stream = ReplyStream()
    pieces = ["Thought: I now", " know.\nFinal", " Answer:", " It", " is", " 42"]
    assert [stream.push(p).content for p in pieces] == ["", "", "", "It", " is", " 42"]
    assert stream.finish() == (Piece(), Reply("It is 42"))


def test_prose_streams_at_once_and_holds_back_labels() -> None:
    stream = ReplyStream()
    assert [stream.push(p).content for p in ["Hello", " there\n", "Act", "ually"]] == [
        "Hello",
        " there",
        "",
        "\nActually",
    ]
    stream = ReplyStream()
    assert [stream.push(p).content for p in ["Let me see.", "\nAction: f", "\nAction Input: x"]] == [
        "Let me see.",
        "",
        "",
    ]
    rest, reply = stream.finish()
    assert (rest.content, reply.content, called(reply)) == ("", "Let me see.", [("f", "x")])


def test_a_stream_that_continues_a_thought() -> None:
    stream = ReplyStream(in_thought=True)
    assert [stream.push(p).content for p in [" I know.", "\nFinal Answer: ", "7"]] == ["", "", "7"]
    stream = ReplyStream(in_thought=True)
    assert stream.push(" I need f.\nAction: f\nAction Input: ") == Piece()
    begun = stream.push("x")
    assert begun == Piece("I need f.", calls=(CallDelta(0, begun.calls[0].id, "f", "x"),))
    assert stream.push("y \n").calls == (CallDelta(0, arguments="y"),)
    assert stream.push("z").calls == (CallDelta(0, arguments=" \nz"),)
    assert [stream.push(piece) for piece in ("\nObser", "vation: made up")] == [Piece(), Piece()]
    rest, reply = stream.finish()
    assert (rest.content, reply.content, called(reply)) == ("", "I need f.", [("f", "xy \nz")])


@settings(deadline=None, max_examples=300)
@given(PARTS, st.booleans(), st.data())
def test_what_is_streamed_is_what_is_reported(
    parts: list[str], in_thought: bool, data: st.DataObject
) -> None:
    text = "".join(parts)
    size = data.draw(st.integers(1, 7))
    stream = ReplyStream(in_thought=in_thought)
    out = [stream.push(text[i : i + size]).content for i in range(0, len(text), size)]
    rest, reply = stream.finish()
    assert "".join([*out, rest.content]) == reply.content
    at_once = ReplyStream(in_thought=in_thought)
    at_once.push(text)
    again = at_once.finish()[1]
    whole = parse_reply(text)
    assert (again.content, called(again)) == (reply.content, called(reply))
    assert called(whole) == called(reply)
    if not any(label in "\n" + text for label in ("Action:", "Thought:", "Final Answer:")):
        assert reply == Reply(text)


@pytest.mark.parametrize(
    ("arguments", "called_with", "broken"),
    [
        ('{"q": 1}', '{"q": 1}', 0),
        ('{"q": ', '{"q":', 1),
        ("", None, 0),
        (" \n", None, 0),
        ("plain text", "plain text", 1),
        ('{"q": 1}\nObservation:', '{"q": 1}', 0),
        ("plain text\nObservation:", "plain text", 0),
        ("\nObservation:", "{}", 0),
    ],
)
def test_a_call_whose_arguments_were_cut_off_is_unfinished(
    arguments: str, called_with: str | None, broken: int
) -> None:
    text = f"Thought: t\nAction: f\nAction Input: {arguments}"
    stream = ReplyStream()
    shown = "".join(stream.push(char).content for char in text)
    rest, reply = stream.finish(cut_off=True)
    for found in (reply, parse_reply(text, cut_off=True)):
        assert called(found) == ([] if called_with is None else [("f", called_with)])
        assert found.content == (text if called_with is None else "t") == shown + rest.content
        assert (found.broken_calls, len(found.unfinished)) == (broken, broken)
