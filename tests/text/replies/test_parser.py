"""Thoughts and tagged calls out of the model's text: exact cases, and what holds for every text and every cut."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.outputs import CallDelta
from qwenrt.text.replies.parser import REACT, Piece, Reply, ReplyStream, parse_reply
from qwenrt.text.replies.reply_format import ReplyFormat

HERMES = ReplyFormat("hermes", "none")
XML = ReplyFormat("xml", "none")
HYBRID = ReplyFormat("hermes", "hybrid")
OPEN = ReplyFormat("hermes", "open")
STYLES = [
    ReplyFormat(calls, thinking)
    for calls in ("hermes", "xml", "none")
    for thinking in ("none", "hybrid", "open")
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"n": {"type": "integer"}, "o": {"type": "object"}, "s": {"type": "string"}},
            },
        },
    }
]
F = '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>'
X = "<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>"
FRAGMENTS = [
    "<think>", "</think>", "<think>\n", "\n</think>\n\n", "<thi", "nk>", "</", "<", ">", "\n", " ", "\n\n", '"', "\\",
    "<tool_call>", "</tool_call>", "\n</tool_call>\n", "<tool_", "call>", "{", "}", '{"name": "f", "arguments": ',
    '{"n": 1}', '"arguments"', F, X, '{"s": "</tool_call>"}', "<function=f>", "<function=",
    "</function>", "\n</function>", "<parameter=n>", "\n<parameter=s>", "</parameter>", "7", "Ω世", "PROSE", "é̂",
    "\u3000", "\x1c",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=14).map("".join)


def called(calls):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def streamed(text, reply_format, sizes=(1,), **options):
    """The pieces of a stream (the last one from finish()), and the whole reply; cut into ``sizes`` in turn."""
    stream = ReplyStream(reply_format, **options)
    pieces, at, turn = [], 0, 0
    while at < len(text):
        pieces.append(stream.push(text[at : at + sizes[turn % len(sizes)]]))
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    last, reply = stream.finish()
    return [*pieces, last], reply


def check(text, reply_format, content, reasoning="", calls=(), **options):
    for reply in (parse_reply(text, reply_format, **options), streamed(text, reply_format, **options)[1]):
        assert (reply.content, reply.reasoning, called(reply.tool_calls)) == (content, reasoning, list(calls))


@pytest.mark.parametrize(
    ("text", "reply_format", "content", "reasoning"),
    [
        ("<think>\nOkay.\n</think>\n\nHello.", HYBRID, "Hello.", "Okay."),
        ("\n<think>\n\n</think>\n\nHello.\n", HYBRID, "Hello.", ""),
        ("Hello.", HYBRID, "Hello.", ""),
        ("", HYBRID, "", ""),
        ("<think>\nOkay, the user", HYBRID, "", "Okay, the user"),
        ("<think>\nOkay</thi", HYBRID, "", "Okay</thi"),
        ("Okay.\n</think>\n\nHello.", OPEN, "Hello.", "Okay."),
        ("<think>\nOkay.\n</think>\n\nHello.", OPEN, "Hello.", "Okay."),
        ("Okay, the user", OPEN, "", "Okay, the user"),
        ("Okay.</think>Hello.", OPEN, "Hello.", "Okay."),
        ("Okay.</think>\n    code()\n", OPEN, "    code()", "Okay."),
        ("<think>a</think>\n<think>b</think>\n</think>c", HYBRID, "c", "a\nb"),
        ("<think>a</think>Write </think> to end it.", HYBRID, "Write </think> to end it.", "a"),
        ("Write <think> first.</think>", HYBRID, "Write <think> first.</think>", ""),
        ("</think>\n\nHello.", HYBRID, "Hello.", ""),
        ("<think>\nplan: " + F + "\n</think>\nHi", HYBRID, "Hi", "plan: " + F),
        ("<think>a</think>b\n", ReplyFormat("hermes", "none"), "<think>a</think>b\n", ""),
        (" \n<tool_call> b\n", ReplyFormat("none", "none"), " \n<tool_call> b\n", ""),
    ],
)
def test_thoughts(text, reply_format, content, reasoning):
    check(text, reply_format, content, reasoning)


def test_a_prompt_may_end_inside_the_thought():
    check("a\n</think>\n\nb", HYBRID, "b", "a", in_thought=True)
    reply = parse_reply("<think>\na\n</think>\n\nAction: f\nAction Input: x", ReplyFormat("react", "hybrid"))
    assert (reply.content, reply.reasoning, called(reply.tool_calls)) == ("", "a", [("f", "x")])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (F, "", [("f", '{"n": 1}')]),
        (f"I look.\n{F}\n{F}\n", "I look.", [("f", '{"n": 1}')] * 2),
        (f"A\n{F}\n\n{F}\n  B", "A\n  B", [("f", '{"n": 1}')] * 2),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"n\\": 1}"}</tool_call>', "", [("f", '{"n": 1}')]),
        ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "parameters": {"n": 1}}</tool_call>', "", [("f", '{"n": 1}')]),
        (
            '<tool_call>{"name": "f", "arguments": {"s": "</tool_call> <tool_call> \\" }"}}</tool_call>',
            "",
            [("f", '{"s": "</tool_call> <tool_call> \\" }"}')],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": {"b": [{}]}}}</tool_call>',
            "",
            [("f", '{"a": {"b": [{}]}}')],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"s": "a\nb"}}</tool_call>',
            "",
            [("f", '{"s": "a\\nb"}')],
        ),
        ('<tool_call>\n{"name": "f", "arguments": {"n": 1}}', "", [("f", '{"n": 1}')]),
        ('<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_', "", [("f", '{"n": 1}')]),
        ('<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n' + F, "", [("f", '{"n": 1}')] * 2),
        ('<tool_call>\n{"name": "f", "argu', '<tool_call>\n{"name": "f", "argu', []),
        ("<tool_call> is a tag.", "<tool_call> is a tag.", []),
        ("See <tool_call>\n" + F, "See <tool_call>", [("f", '{"n": 1}')]),
        (
            "<tool_call>\n{broken}\n</tool_call>\n" + F,
            "<tool_call>\n{broken}\n</tool_call>",
            [("f", '{"n": 1}')],
        ),
        (
            '<tool_call>\n{"name": "f", "arguments": {"s": "open}}\n</tool_call>\n' + F,
            "",
            [("f", '{"s": "open}}\\n'), ("f", '{"n": 1}')],
        ),
        (X, "", [("f", '{"n": "1"}')]),
        ("<function=f>\n</function>", "<function=f>\n</function>", []),
        ("a < b </tool_call> \n", "a < b </tool_call> \n", []),
    ],
)
def test_hermes_calls(text, content, calls):
    check(text, HERMES, content, calls=calls)


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "n is 1"}',
        '{"name": "f", "arguments": "{} and"}',
        '{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 1}"}',
        '{"name": "", "arguments": {}}',
        '{"name": 7, "arguments": {}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "name": "f", "arguments": {}}',
        '{"arguments": {}}',
        '{"arguments": {"n": NaN}, "name": "f"}',
        '{"name": "f"}}',
        '{"name": "f" "arguments": {}}',
        "{name: f}",
        '{"name": "f", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_a_broken_call_is_content(body):
    text = f"<tool_call>\n{body}\n</tool_call>"
    assert parse_reply(text, HERMES) == Reply(text, broken_calls=1)


@pytest.mark.parametrize(
    ("body", "arguments", "content"),
    [
        ('{"name": "f", "arguments": {"n": NaN}}', '{"n": ', "NaN}}"),
        ('{"name": "f", "arguments": {"n": 1e999}}', '{"n": ', "1e999}}"),
        ('{"name": "f", "arguments": {"n": 01, "m": 2}}', '{"n": ', '01, "m": 2}}'),
        ('{"name": "f", "arguments": {"n": 1, "n": 2}}', '{"n": 1, ', '"n": 2}}'),
        ('{"name": "f", "arguments": {"n": 1, "\\u006e": 2}}', '{"n": 1, ', '"n": 2}}'),
        ('{"name": "f", "arguments": {"n": 1,}}', '{"n": 1, ', "}}"),
        ('{"name": "f", "arguments": {"s": "print("hi")"}}', '{"s": "print("', 'hi")"}}'),
        ('{"name": "f", "arguments": {"s": "\\x"}}', '{"s": "', '\\x"}}'),
        ('{"name": "f", "arguments": {"s": "a\\ud800\\u00"}}', '{"s": "a', '\\ud800\\u00"}}'),
        ('{"name": "f", "arguments": {"n": 1}}}', '{"n": 1', "}"),
        ('{"name": "f", "arguments": {"n": 1}, "arguments": {}}', '{"n": 1', '"arguments": {}}'),
        ('{"name": "f", "parameters": {"n": 1}, "arguments": {}}', '{"n": 1', '"arguments": {}}'),
        ('{"name": "f", "arguments": {"n": ' + "9" * 5000 + "}}", '{"n": ', "9" * 5000 + "}}"),
    ],
)
def test_a_call_that_breaks_after_it_has_begun_is_unfinished(body, arguments, content):
    text = f"I look.\n<tool_call>\n{body}\n</tool_call>\nDone. </tool_call>"
    check(text, HERMES, f"I look.\n{content}\nDone. </tool_call>", calls=[("f", arguments)])
    reply = parse_reply(text, HERMES)
    assert (reply.broken_calls, reply.unfinished) == (1, (0,))
    with pytest.raises(ValueError):
        json.loads(arguments)
    both = parse_reply(text + F, HERMES)
    assert called(both.tool_calls) == [("f", arguments), ("f", '{"n": 1}')] and both.unfinished == (0,)


def test_a_nest_without_a_bottom_is_unfinished():
    text = (
        '<tool_call>\n{"name": "f", "arguments": '
        + '{"a":' * 100_000
        + "1"
        + "}" * 100_001
        + "\n</tool_call>"
    )
    reply = parse_reply(text, HERMES)
    assert called(reply.tool_calls) == [("f", '{"a": ' * 500)] and reply.broken_calls == 1


def test_arguments_can_always_be_sent():
    text = '<tool_call>{"name": "f", "arguments": {"s": "\\ud800 世"}}</tool_call>'
    (call,) = parse_reply(text, HERMES).tool_calls
    call["function"]["arguments"].encode()
    assert json.loads(call["function"]["arguments"]) == {"s": "\ud800 世"}


def typed(kind, value):
    schema = kind if isinstance(kind, dict) else {"type": kind}
    parameters = {"properties": {"k": schema}, "$defs": {"T": {"type": "array"}, "R": {"$ref": "#/$defs/R"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    text = f"<tool_call>\n<function=f>\n<parameter=k>\n{value}\n</parameter>\n</function>\n</tool_call>"
    (call,) = parse_reply(text, XML, tools=tools).tool_calls
    return json.loads(call["function"]["arguments"])["k"]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("integer", "5", 5),
        ("integer", "-5.0", -5),
        ("integer", "5.5", "5.5"),
        ("integer", "true", "true"),
        ("integer", "9" * 5000, "9" * 5000),
        ("int", "5", 5),
        ("number", "5", 5),
        ("number", "0.25", 0.25),
        ("number", "1e999", "1e999"),
        ("number", "NaN", "NaN"),
        ("boolean", "true", True),
        ("boolean", "False", False),
        ("boolean", "1", "1"),
        ("null", "None", None),
        ("array", '[1, "a"]', [1, "a"]),
        ("array", "{}", "{}"),
        ("object", '\n{"a": {"b": null}}\n', {"a": {"b": None}}),
        ("object", '{"a": 1} x', '{"a": 1} x'),
        ("object", "", ""),
        ("string", "5", "5"),
        ("string", "null", "null"),
        ("string", "\n a\n\n", "\n a\n\n"),
        (["string", "null"], "null", None),
        (["string", "null"], "5", "5"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "7", 7),
        ({"$ref": "#/$defs/T"}, "[]", []),
        ({"$ref": "#/$defs/R"}, "[]", "[]"),
        ({"$ref": "elsewhere"}, "[]", "[]"),
        ({"enum": [1, 2]}, "2", 2),
        ({"const": True}, "true", True),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"properties": {}}, "{}", {}),
        ({"type": 5, "anyOf": 3, "enum": None}, "x", "x"),
        ({}, "5", "5"),
    ],
)
def test_values_by_schema(kind, text, value):
    found = typed(kind, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (X, "", [("f", '{"n": 1}')]),
        (f"I look.\n\n{X}\n{X}", "I look.", [("f", '{"n": 1}')] * 2),
        (X.removeprefix("<tool_call>\n"), "", [("f", '{"n": 1}')]),
        ("Ok\n" + X[12:-13] + "\n" + X[12:-13] + "\nB", "Ok\nB", [("f", '{"n": 1}')] * 2),
        (X.replace("</function>\n", ""), "", [("f", '{"n": 1}')]),
        (X.replace("\n</parameter>", ""), "", [("f", '{"n": 1}')]),
        ("<function=f></function>", "", [("f", "{}")]),
        (X.replace("=f>", "=unknown>"), "", [("unknown", '{"n": "1"}')]),
        ("Write <function=unknown> here", "Write <function=unknown> here", []),
        ("Write <function=f> here", "Write <function=f> here", []),
        ("<function=f", "<function=f", []),
        (X[: X.index("<parameter")], X[: X.index("<parameter")], []),
        (X[: X.index("</function>")], "", [("f", '{"n": 1')]),
        (X.replace("</parameter>", "</parameter> PROSE"), "PROSE\n</function>", [("f", '{"n": 1')]),
        (X.replace("</parameter>", "</parameter> ```"), "```\n</function>\n</tool_call>", [("f", '{"n": 1')]),
        (X.replace("<parameter", "PROSE<parameter"), X.replace("<parameter", "PROSE<parameter"), []),
        (X.replace("=n>", ">"), X.replace("=n>", ">"), []),
        (
            "<function=f>\n<parameter=s>\na\n</parameter>\n<parameter=s>\nb\n</parameter>\n</function>",
            "<parameter=s>\nb\n</parameter>\n</function>",
            [("f", '{"s": "a"')],
        ),
        (
            "<function=f>\n<parameter=s>\n<a>\n</tool_call>\n  </function>\n\n</parameter>\n</function>",
            "",
            [("f", '{"s": "<a>\\n</tool_call>\\n  </function>\\n"}')],
        ),
        (
            "<function=f>\n<parameter=s>\nx\n<parameter=n>\n2\n</parameter>\n</function>",
            "",
            [("f", '{"s": "x", "n": 2}')],
        ),
        (F, "", [("f", '{"n": 1}')]),
    ],
)
def test_xml_calls(text, content, calls):
    check(text, XML, content, calls=calls, tools=TOOLS)


@pytest.mark.parametrize(
    "tools", [None, [], [{}], [{"function": {"name": 5}}], [{"name": "f", "parameters": []}], [{"name": "f"}]]
)
def test_tools_of_any_shape_are_no_reason_to_fail(tools):
    check(X, XML, "", calls=[("f", '{"n": "1"}')], tools=tools)


def test_a_schema_that_multiplies_itself_costs_nothing():
    fork = {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}] * 20}
    parameters = {"properties": {"n": fork}, "$defs": {"A": fork, "B": fork}}
    check(X, XML, "", calls=[("f", '{"n": "1"}')], tools=[{"name": "f", "parameters": parameters}])


def test_what_streams_and_what_waits():
    stream = ReplyStream(HYBRID)
    steps = [
        ("<thi", "", ""),
        ("nk>\n", "", ""),
        ("Let", "", "Let"),
        (" me\n", "", " me"),
        ("see", "", "\nsee"),
        ("\n</thin", "", ""),
        ("k>\n\n", "", ""),
        ("Hi", "Hi", ""),
        (" a <", " a", ""),
        ("b", " <b", ""),
        ("\n<tool_call>\n", "", ""),
        ('{"name": "f", "argu', "", ""),
    ]
    for piece, content, reasoning in steps:
        assert stream.push(piece) == Piece(content, reasoning)
    begun = stream.push('ments": {"n": 1').calls
    assert begun == (CallDelta(0, begun[0].id, "f", '{"n": '),) and begun[0].id
    assert stream.push("2") == Piece()
    assert stream.push(', "s": "a').calls == (CallDelta(0, arguments='12, "s": "a'),)
    assert stream.push('b"}}\n</tool_cal').calls == (CallDelta(0, arguments='b"'),)
    closed = stream.push("l>")
    assert closed.calls == (CallDelta(0, arguments="}"),) and not closed.content
    assert called(closed.tool_calls) == [("f", '{"n": 12, "s": "ab"}')]
    last, reply = stream.finish()
    assert last == Piece()
    assert reply == Reply("Hi a <b", "Let me\nsee", closed.tool_calls)


def test_text_that_cannot_be_a_call_is_not_held():
    for begin in ("<tool_call> x", "<function=two words", "<function=f> x", "<tool_call>\n<function=f>\n x"):
        stream = ReplyStream(XML)
        assert stream.push(begin).content == begin
        assert stream.push(" y").content == " y"


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.sampled_from(STYLES), st.booleans(), st.booleans(), st.lists(st.integers(1, 9), min_size=1))
def test_every_cut_of_every_text_gives_the_same(text, reply_format, in_thought, with_tools, sizes):
    options = {"in_thought": in_thought, "tools": TOOLS if with_tools else None}
    whole = parse_reply(text, reply_format, **options)
    for cut in (sizes, [1]):
        pieces, reply = streamed(text, reply_format, cut, **options)
        assert (reply.content, reply.reasoning) == (whole.content, whole.reasoning)
        assert called(reply.tool_calls) == called(whole.tool_calls)
        assert "".join(piece.content for piece in pieces) == reply.content
        assert "".join(piece.reasoning for piece in pieces) == reply.reasoning
        assert [call for piece in pieces for call in piece.tool_calls] == reply.tool_calls


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.sampled_from(STYLES), st.booleans())
def test_nothing_is_lost_and_nothing_is_broken(text, reply_format, in_thought):
    reply = parse_reply(text, reply_format, in_thought=in_thought)
    shown = "".join((reply.reasoning + reply.content).split())
    visible = "".join(text.split())
    remaining = iter(visible)
    assert all(char in remaining for char in shown), "shown in another order than it was written"
    missing = Counter(visible) - Counter(shown)
    for index, (name, arguments) in enumerate(called(reply.tool_calls)):
        assert arguments.encode()
        if index not in reply.unfinished:
            assert isinstance(json.loads(arguments), dict)
        missing -= Counter(name + arguments)
    tags = "<think></think><tool_call></tool_call><function=></function><parameter=n></parameter>"
    assert set(missing) <= set(tags + '{"name": "f", "arguments": {\\}' + "s")
    if not reply.tool_calls:
        assert set(missing) <= set("</think>")
        lengths = {7 * i + 8 * j for i in range(20) for j in range(20)}
        assert missing.total() in lengths
    if reply_format.thinking == "none" and not reply.tool_calls and not in_thought:
        assert reply == Reply(text, broken_calls=reply.broken_calls)
    assert reply.reasoning == reply.reasoning.rstrip()
    if reply_format.thinking != "none":
        assert reply.content == reply.content.rstrip()


WORDS = st.text("abc Ω世,.\n", max_size=20).map(str.strip)
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.from_regex(r"[a-z_.]{1,8}", fullmatch=True), st.dictionaries(st.text(), JSON, max_size=3))
)


def as_text(message):
    """The message as the templates of Qwen3 write it."""
    text = f"<think>\n{message.get('reasoning_content', '')}\n</think>\n\n{message['content'] or ''}"
    for call in message.get("tool_calls", ()):
        function = call["function"]
        body = f'{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}'
        text += f"\n<tool_call>\n{body}\n</tool_call>"
    return text


@settings(deadline=None, max_examples=50)
@given(WORDS, WORDS, CALLS, st.lists(st.integers(1, 20), min_size=1))
def test_a_message_survives_template_and_parser(reasoning, content, calls, sizes):
    given_calls = [
        {"function": {"name": n, "arguments": json.dumps(a, ensure_ascii=False)}} for n, a in calls
    ]
    text = as_text({"content": content, "reasoning_content": reasoning, "tool_calls": given_calls})
    _, reply = streamed(text, HYBRID, sizes)
    assert (reply.content, reply.reasoning) == (content, reasoning)
    assert [(n, json.loads(a)) for n, a in called(reply.tool_calls)] == calls
    message = reply.message()
    assert set(message) == {"role", "content"} | ({"reasoning_content"} if reasoning else set()) | (
        {"tool_calls"} if calls else set()
    )
    assert message["content"] == (content or (None if calls else ""))
    again = parse_reply(as_text(message), HYBRID)
    assert (again.content, again.reasoning) == (content, reasoning)
    assert called(again.tool_calls) == called(reply.tool_calls)


XML_VALUES = st.text('ab<>=/\n"{}Ω ', max_size=30).filter(
    lambda value: not any(tag in "\n" + value for tag in ("</parameter>", "\n<parameter=", "\n</function>"))
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), XML_VALUES, max_size=3), st.booleans())
def test_xml_values_are_verbatim(arguments, wrapped):
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    text = f"<function=f>\n{parameters}</function>"
    text = f"<tool_call>\n{text}\n</tool_call>" if wrapped else text
    for reply in (parse_reply(text, XML), streamed(text, XML, [3])[1]):
        (call,) = reply.tool_calls
        assert json.loads(call["function"]["arguments"]) == arguments and reply.content == ""


@pytest.mark.parametrize("reply_format", [HYBRID, ReplyFormat("xml", "open"), REACT], ids=lambda f: f.calls)
@pytest.mark.parametrize(
    "unit", ["hello world ", '<tool_call>{"', '</tool_call>"', "<function=f>\n<parameter=a>\n", "\n"]
)
def test_a_megabyte_in_ten_thousand_pieces(reply_format, unit):
    if reply_format == REACT and unit == "\n":
        unit = "Thought: a\n"
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "' + unit * (1_000_000 // len(unit))
    stream = ReplyStream(reply_format)
    for at in range(0, len(text), 100):
        stream.push(text[at : at + 100])
    stream.finish()
