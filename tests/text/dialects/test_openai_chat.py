"""Requests for chat completions: what they become, and the place of what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.sampling_params import SamplingParams
from qwenrt.structure import Grammar
from qwenrt.text.chat.messages import check_messages, check_tools
from qwenrt.text.dialects import openai_chat
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.openai_chat import ChatRequest, decode, read
from qwenrt.text.dialects.openai_fields import Wishes
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.strategies import JSON, unhurried
from tests.text.dialects.thoughts import thought

USER = {"role": "user", "content": "hello"}


def ask(messages: Any = None, **fields: Any) -> Ask:
    return read(decode(json.dumps({"model": "m", "messages": messages or [USER], **fields}).encode()))


def problem(messages: Any = None, **fields: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        ask(messages, **fields)
    assert caught.value.status == 400
    return caught.value


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def test_a_request_that_says_nothing_leaves_all_to_the_checkpoint() -> None:
    assert ask() == Ask(model="m", messages=[USER], tools=[], extra=Wishes())
    nothing = dict.fromkeys(ChatRequest.__struct_fields__)
    del nothing["messages"], nothing["model"]
    assert ask(**nothing) == Ask(model="m", messages=[USER], tools=[], extra=Wishes())
    assert ask(user="u", store=True, metadata={}, functions=[], unknown=[[]]) == ask()


SAME = {
    "temperature": 0,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": -1,
    "frequency_penalty": 0.5,
    "seed": 0,
    "stop": ["a", "<|im_end|>"],
    "stop_token_ids": [5],
    "max_tokens": 7,
    "min_tokens": 2,
    "ignore_eos": True,
    "cache_salt": "pepper",
    "timeout": 1.5,
    "draft": "lookup",
}


@pytest.mark.parametrize(("field", "value"), SAME.items(), ids=SAME.keys())
def test_sampling_fields_are_those_of_sampling_params(field: str, value: Any) -> None:
    assert ask(**{field: value}).sampling == {field: value}
    SamplingParams(**ask(**{field: value, "max_tokens": 7}).sampling)


OTHER = [
    ({"top_k": -1}, {"top_k": 0}),
    ({"stop": "x"}, {"stop": "x"}),
    ({"n": 3}, {"n": 3}),
    ({"n": 1}, {}),
    ({"n": 2, "best_of": 4}, {"n": 4, "logprobs": 0}),
    ({"logprobs": True}, {"logprobs": 0}),
    ({"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
    ({"logprobs": False, "top_logprobs": 0}, {}),
    ({"logit_bias": {"151643": -100, "0": 2}}, {"logit_bias": {151643: -100.0, 0: 2.0}}),
    ({"max_tokens": 7, "max_completion_tokens": 9}, {"max_tokens": 9}),
    ({"max_tokens": 128000}, {"max_tokens": 128000}),
    ({"response_format": {"type": "text"}}, {}),
    ({"response_format": {"type": "json_object"}}, {"grammar": Grammar.json_object()}),
    (
        {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        {"grammar": Grammar.json_schema({"type": "object"})},
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": {"a": 1}},
            }
        },
        {"grammar": Grammar.json_schema({"a": 1})},
    ),
    ({"guided_json": '{"type": "object"}'}, {"grammar": Grammar.json_schema('{"type": "object"}')}),
    ({"guided_json": {"type": "string"}}, {"grammar": Grammar.json_schema({"type": "string"})}),
    ({"guided_regex": "a+"}, {"grammar": Grammar.regex("a+")}),
    ({"guided_choice": ["是", "<|im_start|>"]}, {"grammar": Grammar.choice(["是", "<|im_start|>"])}),
    ({"guided_grammar": 'start: "a"'}, {"grammar": Grammar.lark('start: "a"')}),
    ({"structured_outputs": {"json": True}}, {"grammar": Grammar.json_schema(True)}),
    ({"structured_outputs": {"regex": "a+"}}, {"grammar": Grammar.regex("a+")}),
    ({"structured_outputs": {"choice": ["a"]}}, {"grammar": Grammar.choice(["a"])}),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": Grammar.lark('start: "a"')}),
    ({"structured_outputs": {"json_object": True}}, {"grammar": Grammar.json_object()}),
]


@pytest.mark.parametrize(("fields", "sampling"), OTHER, ids=[json.dumps(fields)[:60] for fields, _ in OTHER])
def test_other_fields_become_sampling(fields: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert ask(**fields).sampling == sampling


BAD = [
    ({"model": 5}, "model"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"temperature": 0, "top_p": 0}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": 10**6}, "n"),
    ({"best_of": 65}, "best_of"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**63 + 1}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x" * 1025]}, "stop"),
    ({"stop": [str(i) for i in range(65)]}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": {}}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"１": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    ({"logprobs": True, "top_logprobs": 10**4}, "top_logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"timeout": 0}, "timeout"),
    ({"draft": "model"}, "draft"),
    ({"cache_salt": "x" * 2000}, "cache_salt"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"reasoning_effort": "utmost"}, "reasoning_effort"),
    ({"thinking_budget": -1}, "thinking_budget"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"thinking_budget": -1}}, "chat_template_kwargs.thinking_budget"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template": ""}, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"x": "y" * 70000}}}},
        "response_format.json_schema.schema",
    ),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", ""]}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice[0]"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": 5}]}, "tools[0].type"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
    ({"tools": [tool("a\n")]}, "tools[0].function.name"),
    ({"tools": [tool("x" * 257)]}, "tools[0].function.name"),
    ({"tools": [tool("a", parameters="x")]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools[0].function.name"),
    ({"functions": [{"name": "a"}, {}]}, "functions[1].name"),
    ({"functions": [{"name": "a"}], "tools": [tool("b")]}, "functions"),
    ({"functions": [{"name": "a"}], "function_call": {"name": "b"}}, "function_call"),
    ({"functions": [{"name": "a"}], "function_call": "always"}, "function_call"),
    ({"tools": [tool("a")], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [tool("a")], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [tool("a")], "tool_choice": tool("b")}, "tool_choice"),
    ({"tool_choice": tool("b")}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [tool("a")], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    (
        {
            "tools": [tool("a")],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": 5, "tools": []}},
        },
        "tool_choice.allowed_tools.mode",
    ),
    (
        {
            "tools": [tool("a")],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [tool("b")]}},
        },
        "tool_choice.allowed_tools.tools[0]",
    ),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=[json.dumps(fields)[:60] for fields, _ in BAD])
def test_what_is_wrong_is_named_by_its_own_field(fields: dict[str, Any], param: str) -> None:
    found = problem(**fields)
    assert (found.kind, found.param) == ("invalid_request", param)
    assert len(found.message) < 1000


BAD_MESSAGES = [
    ([{"content": "x"}], "messages[0].role"),
    ([USER, {"role": "bot", "content": "x"}], "messages[1].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages[0].content[0].type",
    ),
    ([{"role": "user", "content": ["a", {"type": "input_audio"}]}], "messages[0].content[1].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
    ([USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[1].tool_calls[0].function"),
    (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "\x00"}}]}],
        "messages[1].tool_calls[0].function.name",
    ),
    (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 5}}]}],
        "messages[1].tool_calls[0].function.arguments",
    ),
    ([USER, {"role": "assistant", "reasoning": 5}], "messages[1].reasoning"),
    ({"role": "user"}, "messages"),
]


@pytest.mark.parametrize(("messages", "param"), BAD_MESSAGES, ids=[param for _, param in BAD_MESSAGES])
def test_what_is_wrong_in_a_message_is_named_by_its_path(messages: Any, param: str) -> None:
    assert problem(messages).param == param


def test_messages_must_be_there() -> None:
    for body in (b'{"model": ""}', b'{"model": "m", "messages": []}', b'{"model": "m", "messages": null}'):
        with pytest.raises(Problem) as caught:
            read(decode(body))
        assert caught.value.param == "messages"


def test_a_model_is_named_by_any_text() -> None:
    assert decode(b'{"model": "", "messages": []}').model == ""
    with pytest.raises(Problem) as caught:
        decode(b'{"messages": []}')
    assert caught.value.param == "model"


def test_an_image_is_refused_in_words_about_the_model() -> None:
    assert "reads text only" in problem([{"role": "user", "content": [{"type": "image_url"}]}]).message


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}, **more}


MESSAGES = [
    ({"role": "developer", "content": "be brief"}, {"role": "system", "content": "be brief"}),
    ({"role": "user", "content": None}, {"role": "user", "content": ""}),
    ({"role": "user", "content": []}, {"role": "user", "content": ""}),
    (
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "<|im_end|>"}],
        },
        {"role": "user", "content": "ab<|im_end|>"},
    ),
    (
        {"role": "user", "content": "x", "name": "Ann", "refusal": 5},
        {"role": "user", "content": "x", "name": "Ann"},
    ),
    (
        {"role": "assistant", "content": "x", "reasoning_content": "a", "reasoning": "b"},
        {"role": "assistant", "content": "x", "reasoning_content": "a"},
    ),
    (
        {"role": "assistant", "content": "x", "reasoning": "b"},
        {"role": "assistant", "content": "x", "reasoning_content": "b"},
    ),
    (
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": "no"},
    ),
    (
        {
            "role": "assistant",
            "tool_calls": [call("a", '{"x": 1}', id="1", type="function"), call("b", {"y": 2})],
        },
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "a", "arguments": '{"x": 1}'}},
                {"id": None, "type": "function", "function": {"name": "b", "arguments": {"y": 2}}},
            ],
        },
    ),
    (
        {"role": "assistant", "content": None, "function_call": {"name": "a"}},
        {"role": "assistant", "content": "", "function_call": {"name": "a", "arguments": ""}},
    ),
    (
        {"role": "tool", "content": [{"type": "text", "text": "18"}], "tool_call_id": "1"},
        {"role": "tool", "content": "18", "tool_call_id": "1"},
    ),
    (
        {"role": "function", "content": "18", "name": "a"},
        {"role": "function", "content": "18", "name": "a"},
    ),
]


@pytest.mark.parametrize(("said", "read_as"), MESSAGES, ids=[json.dumps(said)[:50] for said, _ in MESSAGES])
def test_messages_have_one_shape(said: dict[str, Any], read_as: dict[str, Any]) -> None:
    messages = ask([USER, said, USER]).messages
    assert messages == [USER, read_as, USER]
    check_messages(messages)


THOUGHTS = [
    ({}, (None, None)),
    ({"reasoning_effort": "none"}, (False, None)),
    ({"reasoning_effort": "minimal"}, (True, 512)),
    ({"reasoning_effort": "low"}, (True, 1024)),
    ({"reasoning_effort": "medium"}, (True, 4096)),
    ({"reasoning_effort": "high"}, (True, None)),
    ({"enable_thinking": False}, (False, None)),
    ({"enable_thinking": True, "thinking_budget": 50}, (True, 50)),
    ({"thinking_budget": 50}, (True, 50)),
    ({"thinking_budget": 0}, (False, None)),
    ({"chat_template_kwargs": {"enable_thinking": False, "other": 1}}, (False, None)),
    ({"chat_template_kwargs": {"thinking_budget": 9}, "thinking_budget": 50}, (True, 9)),
    ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, (True, None)),
    ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}, (False, None)),
    ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "low"}, (True, 1024)),
    ({"enable_thinking": True, "thinking_budget": 0}, (False, None)),
]


@pytest.mark.parametrize(
    ("fields", "wish"), THOUGHTS, ids=[json.dumps(fields)[:60] for fields, _ in THOUGHTS]
)
def test_thinking_is_off_or_has_a_budget(fields: dict[str, Any], wish: tuple[Any, Any]) -> None:
    assert thought(ask(**fields)) == (*wish, None)


def test_an_effort_is_for_the_template_that_knows_it_and_what_is_said_to_that_goes_first() -> None:
    known = ("low", "medium", "xhigh")
    assert thought(ask(reasoning_effort="high"), known) == (True, None, "xhigh")
    both = ask(reasoning_effort="high", chat_template_kwargs={"reasoning_effort": "low"}, thinking_budget=7)
    assert thought(both, known) == (True, 7, "low")


ASSISTANT = {"role": "assistant", "content": "Once upon"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [call("a", "{}")]}


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ([USER], {}),
        ([USER, ASSISTANT], {}),
        ([USER, ASSISTANT], {"continue_final_message": True, "add_generation_prompt": False}),
        ([USER, ASSISTANT, USER], {"add_generation_prompt": True}),
        ([USER, CALLING], {}),
    ],
)
def test_an_assistants_text_at_the_end_is_continued(messages: Any, fields: dict[str, Any]) -> None:
    assert ask(messages, **fields).messages[-1]["role"] == messages[-1]["role"]


@pytest.mark.parametrize("fields", [{"continue_final_message": False}, {"add_generation_prompt": True}])
def test_a_new_answer_behind_an_assistants_text_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Problem, match="It is continued here") as caught:
        ask([USER, ASSISTANT], **fields)
    assert caught.value.param == next(iter(fields))


def test_tools_are_functions_and_others_are_told() -> None:
    flat = {"type": "function", "name": "b", "parameters": {}}
    tools = [tool("a", strict=True), {"type": "web_search"}, flat, {"function": {"name": "<|im_start|>"}}]
    read_as = ask(tools=tools)
    assert read_as.tools == [tool("a", strict=True), tool("b", parameters={}), tool("<|im_start|>")]
    assert read_as.ignored == ("web_search",)
    assert (read_as.tool_choice, read_as.parallel_tool_calls) == ("auto", True)
    assert ask(tools=tools, parallel_tool_calls=False).parallel_tool_calls is False


@pytest.mark.parametrize(
    ("choice", "read_as"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (tool("a"), {"name": "a"}),
        ({"function": {"name": "b"}}, {"name": "b"}),
    ],
)
def test_the_choice_of_a_tool(choice: Any, read_as: Any) -> None:
    assert ask(tools=[tool("a"), tool("b")], tool_choice=choice).tool_choice == read_as


def test_allowed_tools_are_the_only_ones_the_model_sees() -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("b")]}}
    read_as = ask(tools=[tool("a"), tool("b")], tool_choice=allowed)
    assert (read_as.tools, read_as.tool_choice) == ([tool("b")], "required")


def test_functions_are_tools_whose_calls_have_the_older_shape() -> None:
    qwen1 = {"name_for_model": "search", "name_for_human": "Search", "parameters": [{"name": "q"}]}
    read_as = ask(functions=[{"name": "a"}, qwen1], stop=["Observation:"])
    assert read_as.tools == [tool("a"), {"type": "function", "function": qwen1}]
    assert read_as.extra.old_calls and not read_as.parallel_tool_calls
    assert read_as.sampling == {"stop": ["Observation:"]}
    assert ask(functions=[{"name": "a"}], function_call={"name": "a"}).tool_choice == {"name": "a"}
    assert ask(functions=[{"name": "a"}], function_call="none").tool_choice == "none"


def test_service_fields() -> None:
    read_as = ask(model="gpt-5", stream=True, stream_options={"include_usage": True}, return_progress=True)
    assert (read_as.model, read_as.stream, read_as.include_usage, read_as.progress) == (
        "gpt-5",
        True,
        True,
        True,
    )
    assert [ask(priority=p).priority for p in (None, 0, 9, -5, 10**9)] == [5, 0, 9, 0, 9]
    always = ask(stream_options={"include_usage": True, "continuous_usage_stats": True}).extra
    assert always.usage and always.usage_always


FIELDS = st.sampled_from([*ChatRequest.__struct_fields__, "other"])
MESSAGE_FIELDS = st.sampled_from([*openai_chat.ChatMessage.__struct_fields__, "other"])
ROLE = st.sampled_from(openai_chat.ROLES)
MESSAGE = st.builds(
    lambda role, more: {"role": role, "content": "x", **more},
    ROLE,
    st.dictionaries(MESSAGE_FIELDS, JSON, max_size=3),
)


@unhurried
@given(st.lists(MESSAGE, max_size=3), st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_object_is_an_ask_or_a_problem(messages: list[Any], fields: dict[str, Any]) -> None:
    try:
        read_as = read(decode(json.dumps({"model": "m", "messages": messages, **fields}).encode()))
    except Problem as found:
        assert found.status == 400
        return
    takes(read_as)


def takes(read_as: Ask) -> None:
    """What was read needs no second look: each part of it is what the chat formats and the engine take."""
    check_messages(read_as.messages)
    check_tools(read_as.tools)
    SamplingParams(**{"max_tokens": None, **read_as.sampling})


SOME = st.sampled_from(
    [None, "", "a", 0, -1, 1, 2.5, True, [], ["a"], [1], {}, {"a": 1}, {"type": "text"}, {"name": "a"}]
)


@unhurried
@given(
    st.dictionaries(FIELDS, SOME | JSON, max_size=6), SOME, st.dictionaries(MESSAGE_FIELDS, SOME, max_size=4)
)
def test_likely_values_in_wrong_places_are_an_ask_or_a_problem(
    fields: dict[str, Any], function: Any, message: dict[str, Any]
) -> None:
    tools = [{"type": "function", "function": function}]
    body = {"model": "m", "messages": [{**USER, **message}], "tools": tools, **fields}
    try:
        read_as = read(decode(json.dumps(body).encode()))
    except Problem as found:
        assert found.status == 400
        return
    takes(read_as)
