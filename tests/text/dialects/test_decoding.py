"""Bodies: whatever the bytes are, a Struct or a Problem; and whose fault an error of SamplingParams is."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType

from qwenrt.sampling_params import SamplingParams
from qwenrt.structure import Grammar
from qwenrt.text.dialects.decoding import (
    MAX_DEPTH,
    at_most,
    between,
    blamed_on,
    checked_tools,
    chosen_tool,
    decode,
    said,
    sampling_from,
)
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.strategies import JSON, unhurried


class Message(msgspec.Struct):
    role: str
    content: Any = UNSET


class Body(msgspec.Struct):
    model: str = ""
    messages: list[Message] | UnsetType = UNSET
    temperature: float | UnsetType | None = UNSET
    num_predict: int | UnsetType | None = UNSET
    least: int | UnsetType | None = UNSET
    bias: dict[str, float] | UnsetType | None = UNSET
    anything: Any = UNSET


def problem(body: bytes | str) -> Problem:
    with pytest.raises(Problem) as caught:
        decode(body.encode() if isinstance(body, str) else body, Body)
    assert caught.value.status == 400
    return caught.value


NOT_JSON = {
    "nothing": b"",
    "text": b"hello",
    "half": b'{"model": "x"',
    "more after it": b'{"model": "x"} x',
    "not UTF-8": b'{"model": "\xff"}',
    "not UTF-8 in what is ignored": b'{"unknown": "\xff"}',
    "a surrogate in UTF-8": b'{"model": "\xed\xa0\x80"}',
    "UTF-16": '{"model": "x"}'.encode("utf-16"),
    "a lone surrogate": rb'{"model": "\ud800"}',
    "a lone surrogate before text": rb'{"model": "\ud800abc"}',
    "a lone low surrogate": rb'{"anything": "\udc00"}',
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": -Infinity}',
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "deep lists": b'{"anything": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects in what is ignored": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_no_json_object_is_told(body: bytes) -> None:
    assert problem(body).kind == "invalid_json"


def test_half_of_a_surrogate_pair_is_named() -> None:
    assert "surrogate" in problem(rb'{"model": "\ud83d"}').message
    assert decode(rb'{"model": "\ud83d\ude00"}', Body).model == "\U0001f600"


WRONG_TYPES = [
    ('{"temperature": "hot"}', "temperature"),
    ('{"temperature": true}', "temperature"),
    ('{"temperature": 1e400}', "temperature"),
    ('{"num_predict": 1.5}', "num_predict"),
    ('{"num_predict": "7"}', "num_predict"),
    ('{"num_predict": true}', "num_predict"),
    ('{"messages": {}}', "messages"),
    ('{"messages": [{"role": "user"}, {"role": 1}]}', "messages[1].role"),
    ('{"messages": [{"role": "user"}, {"content": "x"}]}', "messages[1].role"),
    ('{"messages": [5]}', "messages[0]"),
    ('{"bias": {"5": "much"}}', "bias[...]"),
    ('{"anything": ' + "9" * 5000 + "}", "anything"),
]


@pytest.mark.parametrize(("body", "path"), WRONG_TYPES, ids=[body[:40] for body, _ in WRONG_TYPES])
def test_a_wrong_type_is_named_by_its_path(body: str, path: str) -> None:
    found = problem(body)
    assert (found.kind, found.param) == ("invalid_request", path)
    assert path in found.message


def test_unknown_fields_duplicates_and_a_byte_order_mark_are_taken() -> None:
    body = decode(b'\xef\xbb\xbf {"unknown": {"x": [1]}, "num_predict": 1, "num_predict": 2}\n', Body)
    assert body.num_predict == 2


def test_absent_null_and_zero_are_three_things() -> None:
    bodies = [decode(body, Body) for body in (b"{}", b'{"num_predict": null}', b'{"num_predict": 0}')]
    assert [body.num_predict for body in bodies] == [UNSET, None, 0]
    assert [said(body.num_predict) for body in bodies] == [None, None, 0]


def nested(depth: int) -> bytes:
    return b'{"anything":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_depth_is_bounded_exactly_and_text_has_none() -> None:
    decode(nested(MAX_DEPTH), Body)
    assert "nested" in problem(nested(MAX_DEPTH + 1)).message
    brackets = json.dumps({"model": '[{"\\' * 1000, "anything": ["[", "\\", '"[', {"{": '\\"'}]}).encode()
    assert decode(brackets, Body).model == '[{"\\' * 1000
    wide = json.dumps({"anything": [{}] * 5000}).encode()
    assert decode(wide, Body).anything == [{}] * 5000


FIELDS = st.sampled_from(["model", "messages", "temperature", "num_predict", "bias", "anything", "role", "x"])


@unhurried
@given(st.binary(max_size=200) | st.dictionaries(FIELDS, JSON).map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_body_or_a_problem(body: bytes) -> None:
    try:
        assert isinstance(decode(body, Body), Body)
    except Problem as found:
        assert found.kind in ("invalid_json", "invalid_request")
        assert (found.param is None) == (found.kind == "invalid_json")


@unhurried
@given(JSON)
def test_depth_counts_no_brackets_of_texts(value: Any) -> None:
    """The limit never refuses what is flat: the values made here are at most some tens deep."""
    body = json.dumps({"anything": [value] * 40, "model": "x"}).encode()
    try:
        decode(body, Body)
    except Problem as found:
        assert "nested" not in found.message


NAMES = {
    "temperature": "temperature",
    "num_predict": "max_tokens",
    "least": "min_tokens",
    "bias": "logit_bias",
}


def sampling(body: str, **more: Any) -> dict[str, Any]:
    return sampling_from(decode(body.encode(), Body), NAMES, **more)


def test_sampling_has_what_is_said_under_the_names_of_sampling_params() -> None:
    assert sampling("{}") == sampling('{"temperature": null}') == {}
    assert sampling('{"temperature": 0, "num_predict": 5}') == {"temperature": 0.0, "max_tokens": 5}
    assert sampling('{"least": 2000}') == {"min_tokens": 2000}
    SamplingParams(**sampling('{"temperature": 0}', also={"stop": ["x"]}))


@pytest.mark.parametrize(
    ("body", "at", "path"),
    [
        ('{"temperature": -1}', "", "temperature"),
        ('{"temperature": 1e308}', "options", "options.temperature"),
        ('{"num_predict": 0}', "options", "options.num_predict"),
        ('{"num_predict": 9223372036854775809}', "", "num_predict"),
        ('{"num_predict": 3, "least": 4}', "", "least"),
    ],
)
def test_what_sampling_params_refuses_is_blamed_on_the_dialects_own_field(
    body: str, at: str, path: str
) -> None:
    with pytest.raises(Problem) as caught:
        sampling(body, at=at)
    assert caught.value.param == path
    assert caught.value.message.startswith(f"{path}: ")


def test_sizes_and_numbers_and_foreign_errors_name_their_place() -> None:
    at_most("input", [1, 2], 2)
    between("priority", 9, 0, 9)
    for check in (lambda: at_most("input", [1, 2, 3], 2), lambda: between("input", 10, 0, 9)):
        with pytest.raises(Problem) as caught:
            check()
        assert caught.value.param == "input"
    with pytest.raises(Problem) as caught, blamed_on("guided_regex"):
        Grammar.regex("")
    assert caught.value.param == "guided_regex"


def tool(name: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def test_tools_are_names_each_once() -> None:
    tools = [tool("weather"), tool("查询天气", parameters={}), tool("<|im_start|>")]
    assert checked_tools(tools) == tools
    qwen1 = {"function": {"name_for_model": "search", "name_for_human": "Search", "parameters": [{}]}}
    assert chosen_tool("search", checked_tools([qwen1])) == {"name": "search"}
    assert chosen_tool("weather", tools) == {"name": "weather"}
    bad = [
        ([tool("")], "tools[0].function.name"),
        ([tool("a"), tool("b\n")], "tools[1].function.name"),
        ([tool("x" * 257)], "tools[0].function.name"),
        ([tool("a"), tool("a")], "tools[1].function.name"),
        ([tool("a", parameters="{}")], "tools[0].function.parameters"),
        ([tool(5)], "tools[0].function.name"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([tool(f"t{i}") for i in range(1025)], "tools"),
    ]
    for tools, path in bad:
        with pytest.raises(Problem) as caught:
            checked_tools(tools)
        assert caught.value.param == path
    with pytest.raises(Problem) as caught:
        chosen_tool("absent", [tool("weather")])
    assert caught.value.param == "tool_choice" and "weather" in caught.value.message
