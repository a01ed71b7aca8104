"""Calls in JSON without tags: which count, which are an answer, and what a reader sees of them meanwhile."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.text.replies.parser import ReplyStream, parse_reply
from tests.text.replies.test_parser import HERMES, XML, F, X, called, streamed

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "get_weather")]
ONE = '{"name": "f", "arguments": {"n": 1}}'
TWO = '{\n  "name": "get_weather",\n  "arguments": {\n    "city": "北京"\n  }\n}'
FIRST, SECOND = ("f", '{"n": 1}'), ("get_weather", '{"city": "北京"}')


def block(body: str, language: str = "json") -> str:
    return f"```{language}\n{body}\n```"


def check(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for style in (HERMES, XML):
        whole = parse_reply(text, style, tools=TOOLS)
        assert (whole.content, called(whole.tool_calls)) == (content, calls)
        for sizes in ((1,), (3,), (7, 2)):
            other = streamed(text, style, sizes, tools=TOOLS)[1]
            assert (other.content, called(other.tool_calls)) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (block(ONE), "", [FIRST]),
        (block(TWO), "", [SECOND]),
        (f"Let me see.\n\n{block(TWO)}\n", "Let me see.", [SECOND]),
        (f"{block(ONE)}\n\n{block(TWO)}", "", [FIRST, SECOND]),
        (f"A\n{block(ONE)}\nB\n{block(TWO)}\nC", "A\nB\nC", [FIRST, SECOND]),
        (block(f"[{ONE}, {TWO}]"), "", [FIRST, SECOND]),
        (block(f"{ONE}\n{TWO}"), "", [FIRST, SECOND]),
        (block(f"{ONE},\n{TWO}"), "", [FIRST, SECOND]),
        (block(ONE, ""), "", [FIRST]),
        (block(ONE, "JSON"), "", [FIRST]),
        (f"```json {ONE} ```", "", [FIRST]),
        (block('{"arguments": {"n": 1}, "name": "f"}'), "", [FIRST]),
        (block('{"name": "f", "arguments": "{\\"n\\": 1}"}'), "", [FIRST]),
        (block('{"name": "\\u0066", "arguments": {}}'), "", [("f", "{}")]),
        (block('{"name": "f", "arguments": {"s": "a ``` b"}}'), "", [("f", '{"s": "a ``` b"}')]),
        (f"```json\n{ONE}", "", [FIRST]),
        (f"```json\n{ONE}\n``", "", [FIRST]),
        (f"use ``` so:\n{block(ONE)}", "use ``` so:", [FIRST]),
        (f"```python\nx\n```\n{block(ONE)}", "```python\nx\n```", [FIRST]),
        (f"{F}\n{block(ONE)}", "", [FIRST, FIRST]),
        (f"```xml\n{F}\n```", "```xml\n```", [FIRST]),
        (f"<tool_call></tool_call>{block(ONE)}", "<tool_call></tool_call>", [FIRST]),
        (f"<tool_call>\n{block(ONE)}", "<tool_call>", [FIRST]),
        (f"<tool_call><function=f> x{block(ONE)}", "<tool_call><function=f> x", [FIRST]),
        (f"<tool_call><function=f>\n{block(ONE)}", "<tool_call><function=f>", [FIRST]),
        (ONE, "", [FIRST]),
        (f"\n{ONE}\n{TWO}\n", "", [FIRST, SECOND]),
        (f"[{ONE}, {TWO}]", "", [FIRST, SECOND]),
        (f"{ONE}\n\nThat is all.", "That is all.", [FIRST]),
        (f"{ONE}\n</tool_call>", "", [FIRST]),
        (f"{ONE}\n{F}\n{block(TWO)}", "", [FIRST, FIRST, SECOND]),
        (f"{ONE}</tool", "</tool", [FIRST]),
        (f"{ONE}<x></function></tool_call>y", "<x></function></tool_call>y", [FIRST]),
        (f"{ONE} {{x", f"{ONE} {{x", []),
    ],
)
def test_fenced_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(text, content, calls)


@pytest.mark.parametrize(
    "text",
    [
        block('{"name": "Ann", "age": 30}'),
        block('{"name": "Ann", "arguments": {}}'),
        block('{"name": "f", "age": 30}'),
        block('{"name": "f"}'),
        block('{"name": "f", "description": "d", "parameters": {}}'),
        block('{"name": "f", "arguments": {}, "id": 1}'),
        block('{"name": "f", "arguments": "n is 1"}'),
        block('{"name": ["f"], "arguments": {}}'),
        block('{"name": "f", "name": "f", "arguments": {}}'),
        block('{"type": "function", "function": {"name": "f"}}'),
        block("[1, 2]"),
        block("[]"),
        block("{}"),
        block(f"{ONE}\n7"),
        block(f"[{ONE}, 7]"),
        block(f'{ONE}\n{{"name": "unknown", "arguments": {{}}}}'),
        block(ONE, "python"),
        block(ONE, "jsonl"),
        f"`{block(ONE)}`",
        f"```json\n{ONE[:-3]}",
        f"```python\nx\n```\n{ONE}\n```",
        block('{"name": "f", "arguments": {"s": "open}}'),
        "```",
        "``````",
        "```json\n```",
        f"See {ONE}",
        block("{" + " " * 2_000 + "x"),
        block('{"name": "' + "\\\\" * 2_000),
        f"{ONE[:-1]}",
        f"{ONE}\n{{}}",
        '{"name": "Ann", "arguments": {}}',
        '{"city": "x"}',
        "[1, 2]",
        "[]",
        "{",
        f"{ONE[:-1]}</tool_call>",
    ],
)
def test_other_blocks_are_left_alone(text: str) -> None:
    check(text, text, [])


def test_without_tools_nothing_is_looked_for() -> None:
    for tools in (None, [], [{"function": {"name": 5}}]):
        assert parse_reply(block(ONE), HERMES, tools=tools).content == block(ONE)


def test_nothing_of_a_call_is_shown_and_other_blocks_stream() -> None:
    stream = ReplyStream(HERMES, tools=TOOLS)
    assert "".join(stream.push(char).content for char in f"Hi.\n{block(TWO)}") == "Hi."
    for begin, shown in (
        ("```json\n{", ""),
        ('```json\n{"na', ""),
        ('```json\n{"name": "get_', ""),
        ('```json\n{"name": "get_x', '```json\n{"name": "get_x'),
        ('```json\n{"city"', '```json\n{"city"'),
        ('```json\n{"name": 5', '```json\n{"name": 5'),
        ("```p", "```p"),
        ("```\nx", "```\nx"),
        ('{"name": "get_', ""),
        ('{"name": "get_x', '{"name": "get_x'),
        ('{ "ar', ""),
        ('{ "ax', '{ "ax'),
        ("[1", "[1"),
    ):
        stream = ReplyStream(HERMES, tools=TOOLS)
        assert "".join(stream.push(char).content for char in begin) == shown, begin


def test_a_quote_too_few_does_not_swallow_the_next_call() -> None:
    broken = block('{"name": "f", "arguments": {"s": "open}}')
    check(f"{broken}\nand\n{block(ONE)}", f"{broken}\nand", [FIRST])


PARTS = [
    "```",
    "```json\n",
    "\n```",
    "\n",
    " ",
    ",",
    ONE,
    TWO,
    "[",
    "]",
    "{",
    '{"name": "',
    "f",
    '"',
    ": ",
    "\\",
    "x",
]
PARTS += [F, X, "<tool_call>", "</tool_call>", "<function=", "</function>", '"arguments"', "`"]


@settings(deadline=None, max_examples=120)
@given(
    st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=2)), max_size=14).map("".join),
    st.sampled_from([HERMES, XML]),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_no_cut_of_a_text_changes_it(text: str, style: Any, sizes: list[int]) -> None:
    whole = parse_reply(text, style, tools=TOOLS)
    for cut in (sizes, [1]):
        pieces, other = streamed(text, style, cut, tools=TOOLS)
        assert (other.content, called(other.tool_calls)) == (whole.content, called(whole.tool_calls))
        assert "".join(piece.content for piece in pieces) == other.content
    if not whole.tool_calls:
        assert whole.content == text
    for _, arguments in called(whole.tool_calls):
        assert isinstance(json.loads(arguments), dict)


ARGUMENTS = st.dictionaries(
    st.text(max_size=5), st.one_of(st.text(), st.integers(), st.lists(st.text(max_size=3)))
)


@settings(deadline=None, max_examples=40)
@given(st.lists(ARGUMENTS, min_size=1, max_size=3), st.sampled_from([None, 2]), st.booleans(), st.booleans())
def test_any_arguments_survive(
    given_arguments: list[Any], indent: int | None, escaped: bool, as_list: bool
) -> None:
    bodies = [
        json.dumps({"name": "f", "arguments": arguments}, indent=indent, ensure_ascii=escaped)
        for arguments in given_arguments
    ]
    bare = f"[{', '.join(bodies)}]" if as_list else "\n".join(bodies)
    fenced = block(bare) if as_list else "\n".join(map(block, bodies))
    for text in (bare, fenced):
        reply = streamed(text, HERMES, [3], tools=TOOLS)[1]
        assert [json.loads(arguments) for _, arguments in called(reply.tool_calls)] == given_arguments
        assert reply.content == ""
