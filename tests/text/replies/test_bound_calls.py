"""Answers that may call or not: where a call is begun, it becomes one, of the schema if its tool is strict."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from qwenrt.engine.constraint import Constraint  # noqa: E402
from qwenrt.engine.grammar import Compiled, Grammars  # noqa: E402
from qwenrt.errors import RequestError  # noqa: E402
from qwenrt.loading import load_tokenizer  # noqa: E402
from qwenrt.structure import Grammar  # noqa: E402
from qwenrt.text.replies.call_grammar import bound_calls  # noqa: E402
from qwenrt.text.replies.parser import parse_reply  # noqa: E402
from qwenrt.text.replies.reply import Reply  # noqa: E402
from qwenrt.text.replies.reply_format import ReplyFormat  # noqa: E402
from qwenrt.text.tokenizer.tokenizer import Tokenizer  # noqa: E402
from tests.schemas import next_token  # noqa: E402

STRICT = {
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Rome", "Paris"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
    },
}
FREE = {"name": "note", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}
TOOLS: list[Any] = [{"type": "function", "function": function} for function in (STRICT, FREE)]
FORMS = {form: ReplyFormat(form, "none") for form in ("hermes", "xml", "react")}  # type: ignore[arg-type]
# What a model might begin with, right or wrong.
WRITES = {
    "hermes": [
        "<tool_call>\n{",
        "<tool_call>{",
        "<tool_call>\n\n",
        "<tool_call",
        '<tool_call>\n{"name": "note", ',
    ],
    "xml": [
        "<tool_call>\n<function=",
        "<function=note>\n",
        "<function=get_weather",
        "<tool_call>\n{",
        "<tool_call>>",
    ],
    "react": [
        "Thought: so\nAction: ",
        "\nAction:get",
        "\nAction Input: {",
        "\nAction",
        "\nAction: note\nAction Input: x",
    ],
}
PROSE = ["It rains. ", "a < b, ", "\n", "<", "<tool", "</tool_call>", "tool_call>", "Action: ", "> "]


@cache
def compiled(form: str) -> tuple[Grammar, Compiled]:
    grammar = bound_calls(FORMS[form], TOOLS)
    assert grammar is not None
    return grammar, Grammars(load_tokenizer("demo")).compile(grammar)


def answer(form: str, r: random.Random) -> tuple[str, bool]:
    """An answer of a writer who tries this and that, and whether it was not cut off within a call."""
    tokenizer, (grammar, made) = load_tokenizer("demo"), compiled(form)
    constraint, ids = Constraint(made, grammar, [tokenizer.eod_id]), list[int]()
    planned: list[int] = []
    while len(ids) < 600:
        allowed = constraint.allowed()
        free = allowed is None or (allowed.but and constraint._phase.value == "text")
        assert constraint.free is (allowed is None)
        if free and len(ids) > 150:
            return tokenizer.decode(ids, errors="strict"), True
        if not planned and (free or (allowed is not None and allowed.but and r.random() < 0.3)):
            text = r.choice(WRITES[form] if r.random() < 0.4 else PROSE)
            if not free:
                text = "</function>" if form == "xml" else '"'
            planned = (tokenizer.encode(text) if r.random() < 0.5 else list(text.encode()))[::-1]
            if not free and form == "react":
                planned = [tokenizer.eod_id]
        token = planned.pop() if planned else next_token(allowed, tokenizer, r, len(ids)) if allowed else 0
        if allowed is not None and (token in allowed.ids) is allowed.but:
            planned.clear()
            continue
        if token == tokenizer.eod_id:
            return tokenizer.decode(ids, errors="strict"), True
        ids.append(token)
        if constraint.take(token):
            return tokenizer.decode(ids, errors="strict"), True
    return tokenizer.decode(ids), False


def check(reply: Reply) -> list[str]:
    """The names of the calls, each of whose arguments fit."""
    for call in reply.tool_calls:
        if call["function"]["name"] == "get_weather":
            jsonschema.validate(json.loads(call["function"]["arguments"]), STRICT["parameters"])
    names = [call["function"]["name"] for call in reply.tool_calls]
    assert all(names[index] == "note" for index in reply.unfinished)  # a key twice, which no grammar sees
    return names


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_is_begun_becomes_one_that_fits(form: str) -> None:
    names = list[str]()
    for seed in range(25):
        text, whole = answer(form, random.Random(seed))
        if not whole:
            continue
        reply = parse_reply(text, FORMS[form], tools=TOOLS)
        called = check(reply)
        names += called
        assert called or form == "react" or "<tool_call>" not in text
    assert {"get_weather", "note"} == set(names) and len(names) > 10


def constraint_of(form: str) -> Constraint:
    grammar, made = compiled(form)
    return Constraint(made, grammar, [load_tokenizer("demo").eod_id])


def written(constraint: Constraint, text: str) -> bool:
    """Byte by byte -> whether all of it may be written."""
    for byte in text.encode():
        allowed = constraint.allowed()
        if allowed is not None and (byte in allowed.ids) is allowed.but:
            return False
        constraint.take(byte)
    return True


def test_text_is_free_and_calls_are_not() -> None:
    for text in ("anything {at} all, <tool_cal> too", "", "</tool_call>", "a\n<tool_call>\n{"):
        assert written(constraint_of("hermes"), text)
    assert not written(constraint_of("hermes"), '<tool_call>\n{"name": "get_w_"')
    assert not written(
        constraint_of("hermes"), '<tool_call>\n{"name": "get_weather", "arguments": {"city": "R_"'
    )
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
    two = constraint_of("hermes")
    assert written(two, f"Now: {call}\nand {call} yes") and two.free
    assert not written(two, "<tool_call>_")
    assert not written(constraint_of("xml"), "<function=get_weather>\n<parameter=city>\nRum")
    assert written(
        constraint_of("xml"), "<function=note>\n<parameter=what>\nI like\n</parameter>\n</function>\n ok"
    )


def test_react_acts_where_a_line_begins_and_before_its_final_answer() -> None:
    assert not written(constraint_of("react"), "Action: x")
    assert not written(constraint_of("react"), "Thought: so\nAction: get_weather\nAction Input: x")
    assert written(constraint_of("react"), "I said Action: x, and\nAction Input: y")
    assert written(constraint_of("react"), "Thought: none\nFinal Answer: well\nAction: x")
    assert written(constraint_of("react"), "Thought: so\nAction: note\nAction Input: as I like")
    inside = bound_calls(FORMS["react"], TOOLS, in_thought=True)
    assert inside is not None and inside.begins is not None and inside.begins.within_line


def test_tokens_that_reach_over_an_opening_are_told_apart() -> None:
    """Where a token ends the tag and goes on, those stay that go on as a call does."""
    more = [b">\n", b">{", b"l>", b"l>{", b"l>\n", b"x<tool_call>{", b"><", b">>"]
    tokenizer = Tokenizer({token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *more])})
    grammar = compiled("hermes")[0]
    made = Grammars(tokenizer).compile(grammar)
    texts = made.vocabulary.texts
    misfits = {written: {texts[i] for i in ids} for (_, written), ids in made.misfits.items()}
    assert misfits == {0: {b"x<tool_call>{"}, 9: {b"l>{"}, 10: {b">{", b"><", b">>"}}
    constraint = Constraint(made, grammar, [tokenizer.eod_id])
    for token in tokenizer.encode("a <tool_call"):
        constraint.take(token)
    allowed = constraint.allowed()
    assert allowed is not None and {texts[i] for i in allowed.ids} >= misfits[10] and not constraint.free
    constraint.take(texts.index(b">\n"))
    allowed = constraint.allowed()
    assert allowed is not None and {texts[i] for i in allowed.ids} == {b"{"}


def test_nothing_is_bound_where_no_tool_is_strict() -> None:
    for form in FORMS.values():
        assert bound_calls(form, TOOLS[1:]) is None
    unkept = {"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}
    grammar = bound_calls(FORMS["hermes"], [{"type": "function", "function": unkept}])
    with pytest.raises(RequestError, match="not"):
        Grammars(load_tokenizer("demo")).compile(grammar)  # type: ignore[arg-type]
