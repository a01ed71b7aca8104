"""Requests of DashScope's clients: whatever the bytes are, an Ask or a Problem; and what each field asks for."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.text.chat.messages import check_messages, given_tools
from qwenrt.text.dialects import dashscope
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.dashscope import Form
from qwenrt.text.dialects.problem import Kind, Problem
from tests.text.dialects.strategies import JSON, unhurried

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def text_of(ids: Any) -> str:
    return "".join(map(chr, ids))


def ask(given: Any = None, *, stream: bool = False, **parameters: Any) -> Ask:
    body = {"model": "qwen-turbo", "input": given or {"messages": HELLO}, "parameters": parameters}
    return dashscope.read(dashscope.decode(json.dumps(body).encode()), stream, text_of)


def problem(given: Any = None, **parameters: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        ask(given, **parameters)
    assert caught.value.status == 400
    return caught.value


def test_a_plain_request() -> None:
    asked = ask()
    assert asked.messages == HELLO and asked.model == "qwen-turbo" and not asked.stream
    assert asked.sampling == {"max_tokens": None} and asked.extra == Form(as_message=False, incremental=False)
    assert asked.tool_choice == "auto" and asked.parallel_tool_calls and not asked.ignored


def test_parameters_may_be_absent_or_null() -> None:
    for body in (b'{"input": {"prompt": "x"}}', b'{"input": {"prompt": "x"}, "parameters": null}'):
        assert dashscope.read(dashscope.decode(body)).messages == [{"role": "user", "content": "x"}]


CONVERSATIONS = {
    "a prompt": ({"prompt": "p"}, ["user p"]),
    "a history and a prompt": (
        {"history": [{"user": "u", "bot": "b"}, {"user": "v", "bot": None}], "prompt": "p"},
        ["user u", "assistant b", "user v", "assistant ", "user p"],
    ),
    "messages": (
        {"messages": [{"role": "system", "content": "s"}, *HELLO, {"role": "bot", "content": "b"}]},
        ["system s", "user hello", "assistant b"],
    ),
    "messages and a prompt": ({"messages": HELLO, "prompt": "p"}, ["user hello", "user p"]),
    "parts": (
        {"messages": [{"role": "user", "content": [{"text": "a"}, {"type": "text", "text": "b"}]}]},
        ["user ab"],
    ),
}


@pytest.mark.parametrize(("given", "said"), CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_what_is_said_becomes_messages(given: dict[str, Any], said: list[str]) -> None:
    messages = ask(given).messages
    assert messages is not None
    assert [f"{message['role']} {message['content']}" for message in messages] == said


def test_calls_and_thoughts_are_read_back() -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}
    result = {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"}
    messages = ask({"messages": [*HELLO, said, result]}).messages
    assert messages is not None
    assert messages[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{k: call[k] for k in ("id", "type", "function")}],
    }
    assert messages[2] == {"role": "tool", "content": "2", "tool_call_id": "c1"}
    last = {"role": "assistant", "content": "so", "partial": True}
    assert ask({"messages": [*HELLO, last]}).messages[-1] == {"role": "assistant", "content": "so"}


SAMPLING = {
    "all of them": (
        {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 20,
            "seed": 3,
            "max_tokens": 5,
            "repetition_penalty": 1.1,
            "presence_penalty": -2,
        },
        {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 20,
            "seed": 3,
            "max_tokens": 5,
            "repetition_penalty": 1.1,
            "presence_penalty": -2,
        },
    ),
    "nulls": ({"temperature": None, "stop": None, "n": None}, {}),
    "zero": ({"temperature": 0, "seed": 0, "top_k": 0}, {"temperature": 0, "seed": 0, "top_k": 0}),
    "top_k beyond 100 is off": ({"top_k": 101}, {"top_k": 0}),
    "several": ({"n": 4}, {"n": 4}),
    "a stop": ({"stop": "a"}, {"stop": ["a"]}),
    "stops": ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    "ids": ({"stop": [1, [2]]}, {"stop_token_ids": [1, 2]}),
    "ids one after the other": ({"stop": [[104, 105], "x"]}, {"stop": ["hi", "x"]}),
    "no stop": ({"stop": []}, {}),
    "logprobs": ({"logprobs": True}, {"logprobs": 0}),
    "alternatives": ({"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
    "alternatives of nothing": ({"top_logprobs": 5}, {}),
}


@pytest.mark.parametrize(("parameters", "sampling"), SAMPLING.values(), ids=SAMPLING.keys())
def test_parameters_are_sampling(parameters: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert ask(**parameters).sampling == {"max_tokens": None, **sampling}


ILLEGAL = {
    "temperature": [2, -0.1, "hot"],
    "top_p": [0, 1.1],
    "top_k": [-1, 1.5],
    "seed": [-1, 2**63],
    "max_tokens": [0, -1],
    "repetition_penalty": [0, -1],
    "presence_penalty": [2.1, -2.1],
    "n": [0, 5],
    "thinking_budget": [0, "many"],
    "top_logprobs": [-1, 6],
    "result_format": ["json", 3],
    "enable_thinking": ["yes"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ILLEGAL.items() for value in values]
)
def test_ranges_are_dashscopes_own(name: str, value: Any) -> None:
    found = problem(**{name: value})
    assert found.param == f"parameters.{name}"
    body = dashscope.error_body(found, "r1")
    assert body == {"code": "InvalidParameter", "message": found.message, "request_id": "r1"}


WRONG = {
    "nothing said": ({"input": {"messages": []}}, "input"),
    "no input": ({}, "input"),
    "a role": ({"input": {"messages": [{"role": "wizard"}]}}, "input.messages[0].role"),
    "an image": (
        {"input": {"messages": [{"role": "user", "content": [{"image": "http://x"}]}]}},
        "input.messages[0].content[0]",
    ),
    "an empty stop": ({"parameters": {"stop": [[]]}}, "parameters.stop[0]"),
    "a negative id": ({"parameters": {"stop": ["a", [1, -1]]}}, "parameters.stop[1]"),
    "a stop of objects": ({"parameters": {"stop": [{}]}}, "parameters.stop[0]"),
    "a tool without a function": (
        {"parameters": {"tools": [{"type": "function"}]}},
        "parameters.tools[0].function",
    ),
    "a tool without a name": (
        {"parameters": {"tools": [{"function": {}}]}},
        "parameters.tools[0].function.name",
    ),
    "a choice": ({"parameters": {"tool_choice": "maybe"}}, "parameters.tool_choice"),
    "a call of nothing": ({"parameters": {"tool_choice": "required"}}, "parameters.tool_choice"),
    "an unknown tool": (
        {"parameters": {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}},
        "parameters.tool_choice",
    ),
    "a format": ({"parameters": {"response_format": {"type": "xml"}}}, "parameters.response_format.type"),
    "no schema": (
        {"parameters": {"response_format": {"type": "json_schema"}}},
        "parameters.response_format.json_schema.schema",
    ),
}


@pytest.mark.parametrize(("body", "param"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named_by_its_path(body: dict[str, Any], param: str) -> None:
    whole = {"input": {"messages": HELLO}, **body} if body else {}
    with pytest.raises(Problem) as caught:
        dashscope.read(dashscope.decode(json.dumps(whole).encode()), text_of=text_of)
    assert caught.value.param == param


def test_several_ids_as_one_stop_need_a_tokenizer() -> None:
    request = dashscope.decode(b'{"input": {"prompt": "x"}, "parameters": {"stop": [[1, 2]]}}')
    with pytest.raises(Problem, match="stop"):
        dashscope.read(request)


def test_tools_need_a_message_and_others_are_listed() -> None:
    asked = ask(tools=[WEATHER, {"type": "web_search"}], enable_search=True, parallel_tool_calls=False)
    assert asked.tools == [WEATHER] and asked.ignored == ("web_search", "enable_search")
    assert asked.extra == Form(as_message=True) and not asked.parallel_tool_calls
    assert ask(tools=[]).extra == ask(n=1).extra == Form(as_message=False)
    assert ask(n=2).extra.as_message


def test_a_tool_may_be_chosen() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    assert ask(tools=[WEATHER], tool_choice=named).tool_choice == {"name": "weather"}
    for word in ("auto", "none", "required"):
        assert ask(tools=[WEATHER], tool_choice=word).tool_choice == word


def test_thoughts() -> None:
    asked = ask(enable_thinking=True, thinking_budget=50)
    assert (asked.enable_thinking, asked.thinking_budget) == (True, 50)
    asked = ask(enable_thinking=False, thinking_budget=50)
    assert (asked.enable_thinking, asked.thinking_budget) == (False, None)


def test_formats() -> None:
    assert ask(result_format="message", incremental_output=True).extra == Form(
        as_message=True, incremental=True
    )
    schema = {"type": "object", "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert json.loads(ask(response_format=wanted).sampling["grammar"].text) == schema
    assert json.loads(ask(response_format={"type": "json_object"}).sampling["grammar"].text)
    assert "grammar" not in ask(response_format={"type": "text"}).sampling


@pytest.mark.parametrize(
    ("headers", "streams"),
    [
        ({"x-dashscope-sse": "enable"}, True),
        ({"x-dashscope-sse": "disable"}, False),
        ({"accept": "text/event-stream"}, True),
        ({"accept": "application/json, text/event-stream;q=0.5"}, True),
        ({"accept": "*/*"}, False),
        ({}, False),
    ],
)
def test_events_are_asked_for_by_headers(headers: dict[str, str], streams: bool) -> None:
    assert dashscope.wants_stream(headers) is streams


def test_every_problem_has_a_code() -> None:
    assert set(dashscope.CODES) == set(get_args(Kind))
    body = dashscope.error_body(Problem.context_length(9000, 8192), "r1")
    assert body["message"].startswith("Range of input length should be [1, 8191]. ")
    assert "maximum context length is 8192 tokens" in body["message"]


STRUCTS = (
    dashscope.GenerationRequest,
    dashscope.Input,
    dashscope.Message,
    dashscope.Parameters,
    dashscope.Part,
    dashscope.Tool,
    dashscope.ToolCall,
    dashscope.CalledFunction,
    dashscope.Turn,
    dashscope.ResponseFormat,
    dashscope.JsonSchema,
)
KNOWN = [field for kind in STRUCTS for field in kind.__struct_fields__]
NEAR = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "tool", "text", "", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KNOWN), inner, max_size=6),
    max_leaves=30,
)
INPUTS = st.fixed_dictionaries({"prompt": st.text(max_size=3)}) | NEAR
PARAMETERS = st.dictionaries(st.sampled_from(dashscope.Parameters.__struct_fields__), NEAR | JSON, max_size=6)


@unhurried
@given(
    st.fixed_dictionaries({"input": INPUTS, "parameters": PARAMETERS})
    | st.dictionaries(st.sampled_from(KNOWN), NEAR | JSON, max_size=10)
)
def test_any_body_is_an_ask_or_a_problem(fields: dict[str, Any]) -> None:
    try:
        asked = dashscope.read(dashscope.decode(json.dumps(fields).encode()), text_of=text_of)
    except Problem as found:
        assert found.status == 400 and json.dumps(dashscope.error_body(found))
        return
    assert isinstance(asked, Ask)
    check_messages(asked.messages)
    given_tools(list(asked.tools))
