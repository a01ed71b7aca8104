"""Requests of Ollama's clients: whatever the bytes are, an Ask or a Problem; and what each field asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.text.chat.messages import check_messages, given_tools
from qwenrt.text.dialects import ollama
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.strategies import JSON, unhurried
from tests.text.dialects.thoughts import thought

CONTEXT = 4096
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Ask:
    body = json.dumps({"model": "qwen3", "messages": HELLO, **fields}).encode()
    return ollama.read_chat(ollama.decode_chat(body), CONTEXT)


def generate(**fields: Any) -> Ask:
    body = json.dumps({"model": "qwen3", "prompt": "hello", **fields}).encode()
    return ollama.read_generate(ollama.decode_generate(body), CONTEXT)


def problem(kind: Any, **fields: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        kind(**fields)
    assert caught.value.status == 400
    return caught.value


def test_a_plain_chat_streams_and_has_no_limit_of_its_own() -> None:
    ask = chat()
    assert ask.messages == HELLO and ask.stream and ask.model == "qwen3" and ask.extra == "chat"
    assert ask.sampling == {"max_tokens": None}
    assert ask.enable_thinking is None


@pytest.mark.parametrize(("stream", "streams"), [(True, True), (False, False), (None, True)])
def test_stream_is_off_only_where_it_is_false(stream: bool | None, streams: bool) -> None:
    assert chat(stream=stream).stream is generate(stream=stream).stream is streams


def test_a_prompt_is_one_turn_after_its_system() -> None:
    ask = generate(system="be brief", context=[1, 2])
    assert ask.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert ask.before == (1, 2) and not ask.prompts and ask.extra == "generate"
    assert generate(system="", template="", suffix="", context=[]).messages == HELLO


def test_a_raw_prompt_is_continued_as_it_is() -> None:
    ask = generate(raw=True, prompt="<|im_start|>once")
    assert ask.prompts == ("<|im_start|>once",) and ask.messages is None


REFUSED_PROMPTS = {
    "a suffix": ({"suffix": "x"}, "suffix"),
    "a template": ({"template": "{{ .Prompt }}"}, "template"),
    "images": ({"images": ["aGk="]}, "images"),
    "a raw prompt with a system": ({"raw": True, "system": "x"}, "system"),
    "a raw prompt with a context": ({"raw": True, "context": [1]}, "context"),
    "a context of other things": ({"context": ["x"]}, "context[0]"),
    "a negative token": ({"context": [-1]}, "context"),
}


@pytest.mark.parametrize(("fields", "param"), REFUSED_PROMPTS.values(), ids=REFUSED_PROMPTS.keys())
def test_what_a_prompt_cannot_have_is_named(fields: dict[str, Any], param: str) -> None:
    assert problem(generate, **fields).param == param


def test_images_are_refused_by_what_the_model_lacks() -> None:
    found = problem(chat, messages=[*HELLO, {"role": "user", "content": "?", "images": ["aGk="]}])
    assert found.param == "messages[1].images" and "reads text only" in found.message
    assert chat(messages=[{**HELLO[0], "images": []}]).messages == HELLO


OPTIONS = {
    "temperature": ({"temperature": 0}, {"temperature": 0.0}),
    "all of them": (
        {
            "temperature": 0.5,
            "top_k": 20,
            "top_p": 0.9,
            "min_p": 0.1,
            "seed": 3,
            "stop": ["a", "b"],
            "repeat_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
        },
        {
            "temperature": 0.5,
            "top_k": 20,
            "top_p": 0.9,
            "min_p": 0.1,
            "seed": 3,
            "stop": ["a", "b"],
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
        },
    ),
    "one stop": ({"stop": "x"}, {"stop": "x"}),
    "seed 0": ({"seed": 0}, {"seed": 0}),
    "a random seed": ({"seed": -1}, {}),
    "top_k 0": ({"top_k": 0}, {"top_k": 0}),
    "top_p 0 is the likeliest token": ({"top_p": 0, "temperature": 0}, {"temperature": 0.0, "top_k": 1}),
    "nulls": ({"temperature": None, "stop": None, "num_ctx": None}, {}),
    "what loading a model needs": ({"num_gpu": "many", "numa": 3, "mirostat": 2, "num_keep": -5}, {}),
}


@pytest.mark.parametrize(("options", "sampling"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options_are_sampling_under_other_names(options: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert chat(options=options).sampling == {"max_tokens": None, **sampling}
    assert generate(options=options).sampling == {"max_tokens": None, **sampling}


@pytest.mark.parametrize(
    ("num_predict", "limit"),
    [(-1, None), (-2, None), (0, None), (None, None), (5, 5), (5.0, 5), (10**6, 10**6)],
)
def test_only_a_positive_num_predict_is_a_limit(num_predict: Any, limit: int | None) -> None:
    assert chat(options={"num_predict": num_predict}).sampling["max_tokens"] == limit


@pytest.mark.parametrize("num_ctx", [0, 1, 2048, CONTEXT, 4096.0, None])
def test_a_window_that_fits_is_accepted(num_ctx: Any) -> None:
    assert chat(options={"num_ctx": num_ctx}).sampling == {"max_tokens": None}


def test_a_larger_window_is_refused_with_both_numbers() -> None:
    found = problem(chat, options={"num_ctx": 131072})
    assert found.param == "options.num_ctx" and "131072" in found.message and "4096" in found.message


WRONG = {
    "a temperature of text": ({"options": {"temperature": "hot"}}, "options.temperature"),
    "a negative temperature": ({"options": {"temperature": -1}}, "options.temperature"),
    "half a token": ({"options": {"num_predict": 1.5}}, "options.num_predict"),
    "a penalty of nothing": ({"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
    "too many stops": ({"options": {"stop": ["x"] * 65}}, "options.stop"),
    "an unknown format": ({"format": "yaml"}, "format"),
    "a huge schema": ({"format": {"title": "x" * 70000}}, "format"),
    "an unknown effort": ({"think": "a lot"}, "think"),
    "a number to think": ({"think": 3}, "think"),
    "too many alternatives": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "fewer than none": ({"top_logprobs": -1}, "top_logprobs"),
    "a model of numbers": ({"model": 3}, "model"),
    "a role that is none": ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role"),
    "a message without a role": ({"messages": [{"content": ""}]}, "messages[0].role"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    "a tool without a name": ({"tools": [{"function": {}}]}, "tools[0].function.name"),
    "a tool twice": ({"tools": [{"function": {"name": "f"}}] * 2}, "tools[1].function.name"),
    "a call of nothing": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}]},
        "messages[0].tool_calls[0].function.name",
    ),
}


@pytest.mark.parametrize(("fields", "param"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    found = problem(chat, **fields)
    assert found.param == param
    assert ollama.error_body(found) == {"error": found.message}


def test_formats_are_grammars() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert json.loads(chat(format=schema).sampling["grammar"].text) == schema
    assert json.loads(generate(format="json").sampling["grammar"].text) == {"type": "object"}
    assert "grammar" not in chat(format="").sampling and "grammar" not in chat(format=None).sampling


@pytest.mark.parametrize(
    ("think", "thinking", "budget"),
    [(True, True, None), (False, False, None), (None, None, None), ("low", True, 1024), ("high", True, None)],
)
def test_think_is_a_switch_or_an_effort(think: Any, thinking: bool | None, budget: int | None) -> None:
    ask = chat(think=think)
    assert thought(ask) == (thinking, budget, None)


def test_logprobs_are_asked_for_by_a_switch_and_a_number() -> None:
    assert chat(logprobs=True).sampling["logprobs"] == 0
    assert chat(logprobs=True, top_logprobs=3).sampling["logprobs"] == 3
    assert "logprobs" not in chat(top_logprobs=3).sampling


def test_tools_have_openais_shape_and_none_are_none() -> None:
    parameters = {"type": "object", "$defs": {"x": {}}, "properties": {"city": {"type": "string"}}}
    described = {"name": "weather", "description": "of a city", "parameters": parameters}
    assert chat(tools=[{"type": "function", "function": described}]).tools == [
        {"type": "function", "function": described}
    ]
    assert chat(tools=[{"function": {"name": "f"}}]).tools == [
        {"type": "function", "function": {"name": "f"}}
    ]
    assert chat(tools=[]).tools == chat(tools=None).tools == []


def called(*names: str, **more: Any) -> dict[str, Any]:
    calls = [{"id": f"id{i}", "function": {"name": name, "arguments": {}}} for i, name in enumerate(names)]
    return {"role": "assistant", "content": "", "tool_calls": calls, **more}


def result(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


RESULTS = {
    "by place": ([called("f", "g"), result("1"), result("2")], ["tool 1", "tool 2"]),
    "by name": (
        [called("f", "g"), result("2", tool_name="g"), result("1", tool_name="f")],
        ["tool 1", "tool 2"],
    ),
    "by id": (
        [called("f", "f"), result("2", tool_call_id="id1"), result("1", tool_call_id="id0")],
        ["tool 1", "tool 2"],
    ),
    "of an unknown call": ([called("f"), result("1", tool_call_id="other")], ["tool 1"]),
    "of no call": ([result("1")], ["user 1"]),
    "more than calls": ([called("f"), result("1"), result("2"), result("3")], ["tool 1", "user 2", "user 3"]),
    "after somebody else": (
        [called("f"), {"role": "user", "content": "u"}, result("1")],
        ["user u", "user 1"],
    ),
}


@pytest.mark.parametrize(("messages", "said"), RESULTS.values(), ids=RESULTS.keys())
def test_results_follow_their_calls_in_their_order(messages: list[Any], said: list[str]) -> None:
    read = chat(messages=[*HELLO, *messages]).messages
    assert read is not None
    said_after = [f"{m['role']} {m['content']}" for m in read[1:] if m["role"] != "assistant"]
    assert said_after == said
    check_messages(read)


def test_what_litellm_sends_is_understood() -> None:
    """Recorded: empty lists of images everywhere, calls and results by their ids."""
    call = {"id": "c1", "function": {"name": "weather", "arguments": {"city": "x"}}}
    messages = [
        {"role": "user", "content": "hi", "images": []},
        {"role": "assistant", "content": "", "images": [], "tool_calls": [call]},
        {"role": "tool", "content": "20", "images": [], "tool_call_id": "c1"},
    ]
    ask = chat(messages=messages, options={"num_predict": 50}, format="json", stream=False)
    assert [message["role"] for message in ask.messages or ()] == ["user", "assistant", "tool"]
    assert ask.sampling["max_tokens"] == 50 and "grammar" in ask.sampling and not ask.stream
    assert ollama.decode_show(b'{"name":"qwen3"}').name == "qwen3"
    assert generate(prompt="### User:\nhi\n\n", images=[]).messages == [
        {"role": "user", "content": "### User:\nhi\n\n"}
    ]


def test_a_past_answer_has_its_thought_and_calls_as_objects() -> None:
    message = called("f", thinking="hm", content="well")
    message["tool_calls"][0]["function"]["arguments"] = {"city": "杭州"}
    read = chat(messages=[*HELLO, message]).messages
    assert read is not None
    assert read[1] == {
        "role": "assistant",
        "content": "well",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"city": "杭州"}}}],
    }


def test_an_answer_that_is_last_stays_last() -> None:
    last = {"role": "Assistant", "content": "so"}
    assert chat(messages=[*HELLO, last]).messages[-1] == {"role": "assistant", "content": "so"}


def test_nothing_asked_is_a_load() -> None:
    for body in (b"{}", b'{"messages": []}', b'{"messages": null, "keep_alive": 0}'):
        assert ollama.is_load(ollama.decode_chat(body))
    for body in (b"{}", b'{"prompt": ""}', b'{"keep_alive": "5m"}'):
        assert ollama.is_load(ollama.decode_generate(body))
    assert not ollama.is_load(ollama.decode_chat(json.dumps({"messages": HELLO}).encode()))
    assert not ollama.is_load(ollama.decode_generate(b'{"prompt": "x"}'))


def test_texts_to_embed() -> None:
    def read(body: bytes) -> ollama.Embedding:
        return ollama.read_embed(ollama.decode_embed(body))

    assert read(b'{"model": "m", "input": "a"}') == ollama.Embedding("m", ["a"])
    assert read(b'{"input": ["a", ""], "truncate": false, "dimensions": 8}') == ollama.Embedding(
        "", ["a", ""], 8, truncate=False
    )
    assert read(b'{"truncate": null, "dimensions": 0}') == ollama.Embedding("", [])
    older = ollama.read_embed(ollama.decode_embeddings(b'{"model": "m", "prompt": "a"}'))
    assert older == ollama.Embedding("m", ["a"])
    for body in (b'{"input": 3}', b'{"dimensions": "4"}', json.dumps({"input": ["a"] * 2049}).encode()):
        with pytest.raises(Problem):
            read(body)


def test_models_are_not_managed_here() -> None:
    for what in ollama.NOT_SERVED:
        found = ollama.not_served(what)
        assert found.status == 501 and f"/api/{what}" in found.message and "qwenrt serve" in found.message


STRUCTS = (
    ollama.ChatRequest,
    ollama.GenerateRequest,
    ollama.Options,
    ollama.Message,
    ollama.ToolCall,
    ollama.Tool,
    ollama.ToolFunction,
    ollama.CalledFunction,
    ollama.EmbedRequest,
)
KNOWN = [field for kind in STRUCTS for field in kind.__struct_fields__]
NEAR = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["user", "tool", "json", "", "low"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KNOWN), inner, max_size=6),
    max_leaves=30,
)


@unhurried
@given(st.dictionaries(st.sampled_from(KNOWN), NEAR | JSON, max_size=10))
def test_any_body_is_an_ask_or_a_problem(fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    for read in (
        lambda: ollama.read_chat(ollama.decode_chat(body), CONTEXT),
        lambda: ollama.read_generate(ollama.decode_generate(body), CONTEXT),
    ):
        try:
            ask = read()
        except Problem as found:
            assert found.status == 400 and json.dumps(ollama.error_body(found))
            continue
        assert isinstance(ask, Ask)
        check_messages(ask.messages or [])
        given_tools(list(ask.tools))
    for read_texts in (ollama.decode_embed, ollama.decode_embeddings):
        try:
            embedding = ollama.read_embed(read_texts(body))
        except Problem:
            continue
        assert isinstance(embedding, ollama.Embedding)
