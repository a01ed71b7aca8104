"""Calls as they are written: however the text is cut, the pieces are the whole, and at any time a beginning of JSON.

Each form by eighty random calls, and by ten thousand in the slow run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.text.replies.json_rewriter import JsonRewriter
from qwenrt.text.replies.parser import REACT, Reply, ReplyStream, parse_reply
from qwenrt.text.replies.reply_format import ReplyFormat
from qwenrt.text.replies.schema_values import ParameterSchema
from qwenrt.text.replies.strict_json import read_json, write_json
from tests.text.replies.test_parser import HERMES, OPEN, TEXTS, XML, F, X, called

MANY = [
    pytest.param(80, id="some"),
    pytest.param(10_000, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
]
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=6)
TAGS = [
    "</tool_call>",
    "<tool_call>",
    "\n</tool_call>",
    "</parameter",
    "<function=f>",
    "```",
    '{"name": "f"',
    "<think>",
]
TEXT = st.lists(
    st.one_of(
        st.sampled_from([*TAGS, '"', "\\", "\n", "世", "😀", "\\u00", "\x00", "\u2028", "é̂"]),
        st.text(max_size=4),
    ),
    max_size=6,
).map("".join)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        NUMBERS,
        TEXT,
        st.sampled_from(["\ud83d", "a\ude00b", "\ude00\ud83d", "{}", "[1]"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.one_of(TEXT, st.sampled_from("abc")), VALUES, max_size=3)
NAMES = st.text("abcz_é世", min_size=1, max_size=6)


def begins_json(text: str) -> bool:
    """Whether some valid JSON begins with the text, which ends behind a character, a mark or a value."""
    open_brackets, in_string, escape = [], False, False
    for char in text:
        if escape or in_string:
            escape, in_string = not escape and char == "\\", escape or char != '"'
        elif char == '"':
            in_string = True
        elif char in "{[":
            open_brackets.append("}" if char == "{" else "]")
        elif char in "}]":
            open_brackets.pop()
    for middle in ("", '"', '": 0', ": 0", "0", '"one more key": 0'):
        try:
            json.loads(text + middle + "".join(reversed(open_brackets)))
        except ValueError:
            continue
        return True
    return False


def streamed(
    text: str,
    style: ReplyFormat,
    sizes: Sequence[int],
    cut_off: bool = False,
    each_prefix: bool = True,
    **options: Any,
) -> Reply:
    """The reply of a stream, with all that is promised of its pieces checked on the way."""
    stream = ReplyStream(style, **options)
    begun: dict[int, list[str]] = {}  # name, id, arguments so far
    content, whole_calls, open_call, at, turn = "", [], False, 0, 0
    done = False
    while not done:
        if at < len(text) and not stream.stopped:
            size = sizes[turn % len(sizes)]
            piece = stream.push(text[at : at + size])
            at, turn = at + size, turn + 1
        else:
            (piece, reply), done = stream.finish(cut_off), True
        for call in piece.calls:
            first = call.index not in begun
            assert bool(call.id) is bool(call.name) is first
            if first:
                assert call.index == len(begun)
                begun[call.index] = [call.name, call.id, ""]
            else:
                assert call.arguments and call.index >= len(whole_calls), "a piece of a call that had ended"
            begun[call.index][2] += call.arguments
            assert not each_prefix or style == REACT or begins_json(begun[call.index][2])
        ended = len(whole_calls) + len(piece.tool_calls)
        if open_call and ended == len(whole_calls):
            assert not piece.content, "content within a call"
        content, whole_calls = content + piece.content, [*whole_calls, *piece.tool_calls]
        open_call = len(begun) > ended
    assert not open_call and content == reply.content and whole_calls == reply.tool_calls
    assert list(begun.values()) == [
        [call["function"]["name"], call["id"], call["function"]["arguments"]] for call in reply.tool_calls
    ]
    assert reply.broken_calls >= len(reply.unfinished)
    for index, (_, arguments) in enumerate(called(reply.tool_calls)):
        arguments.encode()
        if style != REACT and index in reply.unfinished:
            with pytest.raises(ValueError):
                json.loads(arguments)
        elif style != REACT:
            assert isinstance(json.loads(arguments), dict)
    return reply


def every_way(text: str, style: ReplyFormat, sizes: Sequence[int], **options: Any) -> Reply:
    """The reply, the same whole, letter by letter and cut into ``sizes``."""
    whole = parse_reply(text, style, **options)
    for cut in (sizes, [1], [len(text) or 1]):
        reply = streamed(text, style, cut, each_prefix=cut is sizes, **options)
        assert called(reply.tool_calls) == called(whole.tool_calls)
        assert (reply.broken_calls, reply.unfinished) == (whole.broken_calls, whole.unfinished)
        assert style == REACT or (reply.content, reply.reasoning) == (whole.content, whole.reasoning)
    return whole


HALF = F[:-16]  # to the end of the last value


class Pen:
    """Writes JSON in one of the many ways it can be written. ``draw``: a number below."""

    def __init__(self, draw: Callable[[int], int]) -> None:
        self._draw = draw

    def value(self, value: Any) -> str:
        if isinstance(value, dict):
            pairs = [f"{self.string(key)}{self._space()}:{self.value(inner)}" for key, inner in value.items()]
            return self._around("{" + ",".join(self._space() + pair for pair in pairs) + self._space() + "}")
        if isinstance(value, list):
            return self._around("[" + ",".join(map(self.value, value)) + self._space() + "]")
        return self._around(self.string(value) if isinstance(value, str) else json.dumps(value))

    def string(self, text: str) -> str:
        style = self._draw(4)
        if style == 0:
            return json.dumps(text)
        # A raw newline in front of a tag ends the call.
        ends = [char == "\n" and text[at:].lstrip()[:1] == "<" for at, char in enumerate(text)]
        return (
            '"'
            + "".join("\\n" if end else self._char(char) for end, char in zip(ends, text, strict=True))
            + '"'
        )

    def _char(self, char: str) -> str:
        must = char in '"\\' or "\ud800" <= char <= "\udfff"
        if not must and self._draw(5):
            return char  # newlines and other controls too, as models write them
        if char == "/":
            return "\\/"
        written = json.dumps(char)[1:-1]
        if self._draw(2) and len(written) <= 2:
            written = f"\\u{ord(char):04X}"
        return written

    def _around(self, text: str) -> str:
        return self._space() + text + self._space()

    def _space(self) -> str:
        return ["", "", " ", "\n", "\t\r\n  "][self._draw(5)]


@st.composite
def written_json(draw: Any, values: Any) -> tuple[Any, str]:
    value = draw(values)
    seeds = draw(st.lists(st.integers(0, 59), min_size=1, max_size=12))
    turn = iter(range(10**9))
    return value, Pen(lambda below: seeds[next(turn) % len(seeds)] % below).value(value)


@settings(deadline=None, max_examples=100)
@given(written_json(VALUES), st.text(max_size=3), SIZES)
def test_json_is_written_anew_as_it_comes(written: tuple[Any, str], behind: str, sizes: list[int]) -> None:
    value, text = written
    behind = " " + behind
    for cut in (sizes, [1]):
        rewriter, out, at, turn = JsonRewriter(), "", 0, 0
        while not rewriter.done:
            stop = at + cut[turn % len(cut)]
            at, turn = at + rewriter.push((text + behind)[at:stop]), turn + 1
            out += rewriter.take()
            assert begins_json(out) and not rewriter.broken
        assert out == write_json(value) and (text + behind)[at:].strip() == behind.strip()


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.one_of(
            st.sampled_from('{}[]",:\\')
            | st.sampled_from(["1", "-", "tru", "e", "\\u", "d83d", "\\ude00", "NaN", '"a"', " "]),
            st.text(max_size=1),
        ),
        max_size=12,
    ).map("".join),
    SIZES,
)
def test_what_is_no_json_breaks(text: str, sizes: list[int]) -> None:
    try:
        value, _ = read_json(text.lstrip(" \t\n\r"))
        expected = write_json(value)
    except ValueError:
        expected = None
    ends = []
    for cut in (sizes, [1], [len(text) + 1]):
        rewriter, at, turn, out = JsonRewriter(), 0, 0, ""
        given_text = text + "\n"  # ends a number
        while at < len(given_text) and not rewriter.done and not rewriter.broken:
            at, turn = at + rewriter.push(given_text[at : at + cut[turn % len(cut)]]), turn + 1
            out += rewriter.take()
            assert begins_json(out)
        ends.append((out, rewriter.done, rewriter.broken, rewriter.held() + given_text[at:]))
        assert (out if rewriter.done else None) == expected
    assert ends[0] == ends[1] == ends[2]


@st.composite
def hermes_calls(draw: Any) -> tuple[list[tuple[str, Any]], str]:
    """Calls of an answer, and a text that means them."""
    calls, text = [], ""
    for _ in range(draw(st.integers(1, 2))):
        name, (arguments, written) = draw(NAMES), draw(written_json(ARGUMENTS))
        _, written_name = draw(written_json(st.just(name)))
        if draw(st.integers(0, 5)) == 0:
            written = json.dumps(written)  # a text that holds JSON
        pairs = [
            f'"name":{written_name}',
            f'"{draw(st.sampled_from(["arguments", "arguments", "parameters"]))}":{written}',
        ]
        if draw(st.booleans()):
            pairs.reverse()
        if draw(st.integers(0, 3)) == 0:
            pairs.insert(draw(st.integers(0, 2)), f'"id": {draw(written_json(VALUES))[1]}')
        text += (
            draw(st.sampled_from(["", "\n", "I look.\n"]))
            + "<tool_call>\n{"
            + ", ".join(pairs)
            + "}\n</tool_call>"
        )
        calls.append((name, arguments))
    return calls, text


@pytest.mark.parametrize("examples", MANY)
def test_json_calls(examples: int) -> None:
    @settings(deadline=None, max_examples=examples)
    @given(hermes_calls(), SIZES, st.sampled_from([HERMES, XML, OPEN]))
    def check(given_calls: tuple[list[tuple[str, Any]], str], sizes: list[int], style: ReplyFormat) -> None:
        calls, text = given_calls
        if style == OPEN:
            text = f"Hm. {F}</think>\n{text}"  # a call in a thought is none
        reply = every_way(text, style, sizes)
        assert called(reply.tool_calls) == [(name, write_json(arguments)) for name, arguments in calls]
        assert not reply.broken_calls and reply.reasoning == (f"Hm. {F}" if style == OPEN else "")

    check()


KINDS: list[Any] = [
    None, {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"},
    {"type": "array"}, {"type": "object"}, {"type": ["string", "null"]}, {"type": ["boolean", "integer"]},
    {"anyOf": [{"type": "string"}, {"type": "array"}]}, {"enum": ["a", 1, None]}, {"type": "file"},
]  # fmt: skip
XML_TEXT = st.one_of(
    TEXT,
    st.sampled_from(
        [
            "null",
            "None",
            " true\n",
            "TRUE",
            "falsehood",
            "tr ue",
            "nul",
            "true  x",
            "5",
            "-5.0",
            "1e999",
            "01",
            "\n\n",
        ]
    ),
    VALUES.map(write_json),
    st.text(" \n\u3000tn", max_size=6),
).filter(
    lambda value: not any(tag in f"\n{value}\n" for tag in ("</parameter>", "\n<parameter=", "\n</function>"))
)


@st.composite
def xml_calls(draw: Any) -> tuple[list[tuple[str, dict[str, Any]]], str, list[Any]]:
    """Calls of an answer, a text that means them, the tools."""
    calls, text, tools = [], "", []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(
            st.text("abc_世", min_size=1, max_size=4).filter(lambda name: name not in [c[0] for c in calls])
        )
        values = draw(st.dictionaries(st.text("abÄ \"\\'", min_size=1, max_size=3), XML_TEXT, max_size=4))
        properties = {key: draw(st.sampled_from(KINDS)) for key in values}
        schema = {"properties": {key: kind for key, kind in properties.items() if kind is not None}}
        tools.append({"type": "function", "function": {"name": name, "parameters": schema}})
        typed = ParameterSchema(schema)
        calls.append((name, {key: typed.value(key, value) for key, value in values.items()}))
        body = f"<function={name}>\n"
        for key, value in values.items():
            end = draw(st.sampled_from(["\n</parameter>\n", "\n</parameter>\n", "\n"]))  # models leave it out
            body += f"<parameter={key}>\n{value}{end}"
        body += "</function>"
        text += draw(st.sampled_from([f"\n<tool_call>\n{body}\n</tool_call>", f"I look.\n{body}\n"]))
    return calls, text, tools


@pytest.mark.parametrize("examples", MANY)
def test_xml_calls(examples: int) -> None:
    @settings(deadline=None, max_examples=examples)
    @given(xml_calls(), SIZES)
    def check(given_calls: tuple[list[tuple[str, dict[str, Any]]], str, list[Any]], sizes: list[int]) -> None:
        calls, text, tools = given_calls
        reply = every_way(text, XML, sizes, tools=tools)
        assert called(reply.tool_calls) == [(name, write_json(arguments)) for name, arguments in calls]
        assert not reply.broken_calls

    check()


@pytest.mark.parametrize("examples", MANY)
def test_react_calls(examples: int) -> None:
    @settings(deadline=None, max_examples=examples)
    @given(
        NAMES,
        st.one_of(written_json(ARGUMENTS).map(lambda written: written[1]), TEXT, st.just("")),
        st.sampled_from(["", "\nObservation: made up\nAction: g\nAction Input: 1", "\nObserv", " \n"]),
        st.booleans(),
        SIZES,
    )
    def check(name: str, arguments: str, behind: str, cut_off: bool, sizes: list[int]) -> None:
        text = f"Thought: t\nAction: {name}\nAction Input: {arguments}{behind}"
        reply = every_way(text, REACT, sizes, cut_off=cut_off)
        raw = (arguments + behind).partition("\nObservation:")[0].strip()
        ended = not cut_off or "\nObservation:" in text
        if raw or ended:
            assert called(reply.tool_calls) == [(name, raw or "{}")] and reply.content == "t"
        else:
            assert reply == Reply(text)
        assert ended or not raw or (reply.broken_calls == 0) is _is_object(raw)

    check()


def _is_object(text: str) -> bool:
    try:
        value, end = read_json(text)
    except ValueError:
        return False
    return isinstance(value, dict) and end == len(text)


@st.composite
def spoiled(draw: Any, text: str) -> str:
    """The text with something taken out, put in or cut off."""
    start = draw(st.integers(0, len(text)))
    end = draw(st.one_of(st.just(len(text)), st.integers(start, min(len(text), start + 3))))
    put = draw(
        st.one_of(
            st.just(""), st.sampled_from([*TAGS, '"', "}", "{", ",", ":", "\n", "x", "NaN", "\\", F, X])
        )
    )
    return text[:start] + put + text[end:]


@pytest.mark.parametrize("examples", MANY)
def test_broken_calls(examples: int) -> None:
    @settings(deadline=None, max_examples=examples)
    @given(st.data(), st.sampled_from([HERMES, XML, OPEN, REACT]), st.booleans(), SIZES)
    def check(data: st.DataObject, style: ReplyFormat, with_tools: bool, sizes: list[int]) -> None:
        texts = [TEXTS, hermes_calls().map(lambda drawn: drawn[1]), xml_calls().map(lambda drawn: drawn[1])]
        if style == REACT:
            texts.append(
                TEXT.map(lambda text: f"Thought: t\nAction: f\nAction Input: {text}\nObservation: o")
            )
        text = data.draw(st.one_of(*texts).flatmap(spoiled))
        tools = [{"name": "f"}, {"name": "a"}] if with_tools else None
        every_way(text, style, sizes, tools=tools, cut_off=data.draw(st.booleans()))

    check()


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(hermes_calls(), TEXTS.map(lambda text: ([], text))),
    SIZES,
    st.sampled_from([HERMES, XML, REACT]),
)
def test_a_single_call_ends_the_answer(given_calls: Any, sizes: list[int], style: ReplyFormat) -> None:
    _, text = given_calls
    free = parse_reply(text, style)
    for cut in (sizes, [1], [len(text) or 1]):
        reply = streamed(text, style, cut, single_call=True)
        assert called(reply.tool_calls) == called(free.tool_calls[:1])
        assert free.content.startswith(reply.content)
        assert reply.finish_reason("stop") == (
            "tool_calls" if len(reply.tool_calls) > len(reply.unfinished) else "stop"
        )
        if not free.tool_calls:
            assert reply == free


def test_after_a_single_call_nothing_counts() -> None:
    stream = ReplyStream(HERMES, single_call=True)
    assert not stream.stopped
    stream.push(f"a\n{F}")
    assert stream.stopped
    piece = stream.push(f"b{F}<tool_call>{{x")
    last, reply = stream.finish()
    assert (piece.content, piece.calls, last.content, last.calls) == ("", (), "", ())
    assert (reply.content, called(reply.tool_calls), reply.broken_calls) == ("a", [("f", '{"n": 1}')], 0)
    stream = ReplyStream(HERMES, single_call=True)
    stream.push('<tool_call>{"name": "f", "arguments": {x')
    assert stream.stopped and stream.finish()[1].unfinished == (0,)


@pytest.mark.parametrize(
    ("text", "ended_by", "reason"),
    [
        ("hi", "stop", "stop"),
        ("hi", "length", "length"),
        (F, "stop", "tool_calls"),
        (F, "length", "tool_calls"),
        (F, "timeout", "timeout"),
        (F, "abort", "abort"),
        (F, "error", "error"),
        (F + HALF, "stop", "tool_calls"),
        (F + HALF, "length", "length"),
        (HALF + "x" + F, "length", "tool_calls"),
        (HALF, "length", "length"),
        (HALF, "stop", "stop"),
        (F + "<tool_call>{x", "length", "tool_calls"),
    ],
)
def test_why_an_answer_ended(text: str, ended_by: Any, reason: str) -> None:
    assert parse_reply(text, HERMES, cut_off=ended_by != "stop").finish_reason(ended_by) == reason


@pytest.mark.parametrize(
    ("head", "unit", "style"),
    [
        ('<tool_call>{"name": "f", "arguments": {"s": "', "\\u4e16 <tool_call>\n", HERMES),
        ('<tool_call>{"name": "f", "arguments": {"s": [', "{}, ", HERMES),
        ('<tool_call>{"name": "f", "arguments": {"', "k", HERMES),
        ('<tool_call>{"name": "f", "arguments": {"s": ', "1", HERMES),
        ('<tool_call>{"name": "f", "arguments": ', " ", HERMES),
        ('<tool_call>{"arguments": {"s": "', "a", HERMES),
        ('<tool_call>{"name": "f", "arguments": "', "a", HERMES),
        ('<tool_call>{"name": "f", "arguments": {}}', " b", HERMES),
        ("<tool_call><function=f><parameter=s>", "\n </function>", XML),
        ("<tool_call><function=f><parameter=o>", " ", XML),
        ("<tool_call><function=f><parameter=o>true", " ", XML),
        ("<tool_call><function=f><parameter=o>[", "1,", XML),
        ("<tool_call><function=f><parameter=", "s", XML),
        ("Action: f\nAction Input: ", "\nObs", REACT),
        ("Action: f\nAction Input: ", " ", REACT),
        ("Action: f\nAction Input: x", "\n", REACT),
    ],
)
def test_half_a_megabyte_in_ten_thousand_pieces(head: str, unit: str, style: ReplyFormat) -> None:
    parameters = {"properties": {"o": {"type": ["array", "boolean"]}}}
    stream = ReplyStream(style, tools=[{"name": "f", "parameters": parameters}])
    stream.push(head)
    text = unit * (500_000 // len(unit))
    for at in range(0, len(text), 50):
        stream.push(text[at : at + 50])
    stream.finish()
