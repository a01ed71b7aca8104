"""The list of models, tokenize and detokenize, render."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.text.dialects import openai_chat, openai_completions, openai_retrieval
from qwenrt.text.dialects.openai_models import (
    DetokenizeRequest,
    TokenizeAsk,
    TokenizeRequest,
    decode_detokenize,
    decode_tokenize,
    detokenize_body,
    model_body,
    models_body,
    read_tokenize,
    render_body,
    tokenize_body,
)
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.strategies import JSON, unhurried

USER = {"role": "user", "content": "hello"}


def test_a_model_has_what_every_client_looks_for() -> None:
    model = model_body("qwen-turbo", 1_700_000_000, 8192, "Qwen-7B-Chat")
    assert model["id"] == model["display_name"] == "qwen-turbo"
    assert model["max_model_len"] == 8192
    assert (model["object"], model["type"], model["owned_by"]) == ("model", "model", "qwenrt")
    assert model["created_at"] == "2023-11-14T22:13:20Z"
    listed = models_body(["a", "b"], 1_700_000_000, 8192, "Qwen-7B-Chat")
    assert [one["id"] for one in listed["data"]] == ["a", "b"]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("a", "b", False)
    assert [one["name"] for one in listed["models"]] == ["a", "b"]
    assert models_body([], 0, 1, "")["data"] == []


def ask(**fields: Any) -> TokenizeAsk:
    return read_tokenize(decode_tokenize(json.dumps(fields).encode()))


def test_a_text_or_a_chat_is_tokenised() -> None:
    assert ask(prompt="") == TokenizeAsk("", None)
    assert ask(prompt="<|im_end|>", add_special_tokens=False, return_token_strs=True) == TokenizeAsk(
        "<|im_end|>", None, False, True
    )
    chat = ask(
        messages=[USER], tools=[{"function": {"name": "a"}}], chat_template_kwargs={"enable_thinking": False}
    ).chat
    assert chat is not None
    assert (chat.messages, len(chat.tools), chat.enable_thinking) == ([USER], 1, False)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [USER]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Problem) as caught:
        ask(**fields)
    assert caught.value.param == param


def test_tokens_are_told() -> None:
    assert tokenize_body(ask(prompt="x"), [1, 2], 8192, ["a", "b"]) == {
        "count": 2,
        "max_model_len": 8192,
        "tokens": [1, 2],
        "token_strs": None,
    }
    assert tokenize_body(ask(prompt="x", return_token_strs=True), [1], 8, ["a"])["token_strs"] == ["a"]
    assert render_body("<|im_start|>", [5], 8192) == {
        "object": "render",
        "prompt": "<|im_start|>",
        "prompt_token_ids": [5],
        "count": 1,
        "max_model_len": 8192,
    }


def test_every_request_can_be_described() -> None:
    """The types make the server's openapi.json."""
    requests = [
        openai_chat.ChatRequest,
        openai_completions.CompletionRequest,
        openai_retrieval.EmbeddingRequest,
        openai_retrieval.RerankRequest,
        openai_retrieval.ScoreRequest,
        TokenizeRequest,
        DetokenizeRequest,
    ]
    _, components = msgspec.json.schema_components(requests)
    assert {request.__name__ for request in requests} <= set(components)
    chat = components["ChatRequest"]
    assert sorted(chat["required"]) == ["messages", "model"]
    assert {"type": "number"} in chat["properties"]["temperature"]["anyOf"]


def test_ids_are_text_again() -> None:
    assert decode_detokenize(b'{"tokens": [0, 5], "model": "m"}').tokens == [0, 5]
    assert detokenize_body("x") == {"prompt": "x"}
    for body, param in (
        (b"{}", "tokens"),
        (b'{"tokens": [1, -1]}', "tokens[1]"),
        (b'{"tokens": [1.5]}', "tokens[0]"),
        (b'{"tokens": [99999999999]}', "tokens[0]"),
    ):
        with pytest.raises(Problem) as caught:
            decode_detokenize(body)
        assert caught.value.param == param


@unhurried
@given(st.dictionaries(st.sampled_from(["prompt", "messages", "add_special_tokens", "tools"]), JSON))
def test_any_object_is_read_or_a_problem(fields: dict[str, Any]) -> None:
    try:
        assert isinstance(ask(**fields), TokenizeAsk)
    except Problem as found:
        assert found.status == 400
