"""What callers pass: numpy's and torch's scalars are taken, everything else is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qwenrt
from qwenrt.arguments import as_integer, as_list, as_number, flag
from qwenrt.errors import QwenrtError, RequestError, shown
from tests.fuzz.values import Hostile


@pytest.fixture(scope="module")
def llm(tiny_dir: Path) -> Any:
    with qwenrt.load(str(tiny_dir), progress=False) as model:
        yield model


def test_numbers_of_other_libraries() -> None:
    for three in (3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)):
        assert type(as_integer(three)) is int and as_integer(three) == 3
    for half in (0.5, np.float32(0.5), np.float64(0.5)):
        assert type(as_number(half)) in (float, np.float64) and as_number(half) == 0.5
    for none in (True, np.bool_(True), torch.tensor(True), 3.0, "3", None, Hostile(), np.array([3, 4])):
        assert as_integer(none) is None
    for none in (True, "1", None, float("nan"), float("inf"), 10**400, torch.tensor(0.5), Hostile()):
        assert as_number(none) is None
    assert flag("x", np.bool_(True)) is True
    assert (
        as_list("x", np.array([1, 2])) == as_list("x", torch.tensor([1, 2])) == as_list("x", (1, 2)) == [1, 2]
    )


class Unreadable:
    """Whatever is looked for in it, nothing is found but an error of its own."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __iter__(self) -> Any:
        raise RuntimeError("no")

    __str__ = __repr__ = __iter__


@pytest.mark.parametrize(
    "value",
    [{1: "a"}, {1, 2}, frozenset((1,)), "ab", b"ab", 3, None, Unreadable()],
    ids=lambda v: type(v).__name__,
)
def test_what_is_no_list(llm: Any, value: Any) -> None:
    """Sets have no order of their own, and of a mapping only the keys would be seen."""
    for asked in (
        lambda: as_list("texts", value),
        lambda: llm.generate(prompt_token_ids=value),
        lambda: llm.tokenizer.decode(value),
        lambda: llm.logits(value),
        lambda: llm.embed([value] if isinstance(value, str) else value, prompt_name=value),
    ):
        with pytest.raises(RequestError):
            asked()
    assert as_integer(value) == (3 if value == 3 else None)


def test_sampling_params_hold_pythons_own_numbers() -> None:
    params = qwenrt.SamplingParams(
        top_k=np.int64(5),
        temperature=np.float32(0.5),
        seed=torch.tensor(7),
        logit_bias={np.int64(3): np.float32(1)},
        stop_token_ids={1, 2},
        max_tokens=np.uint16(9),
    )
    kept = (params.top_k, params.temperature, params.seed, params.max_tokens)
    assert kept == (5, 0.5, 7, 9) and [type(value) for value in kept] == [int, float, int, int]
    assert params.logit_bias == {3: 1.0} and params.stop_token_ids == (1, 2)
    assert all(type(key) is int for key in params.logit_bias)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (10**400, "an integer of 1329 bits"),
        ("a" * 10**6, "aaa..."),
        ([[[[[1]]]]], "[[[...]]]"),
        ({"b": 1, "a": 2}, "{'b': 1, 'a': 2}"),
        (Hostile(), "<Hostile>"),
        ([Hostile()], "[<Hostile>]"),
    ],
    ids=range(6),
)
def test_values_are_shown_in_few_words(value: object, words: str) -> None:
    text = shown(value)
    assert len(text) <= 80 and (words in text or "..." in text)


def test_decode_of_anything(llm: qwenrt.LLM) -> None:
    tokenizer = llm.tokenizer
    hello = tokenizer.encode("hello")
    for ids in (np.array(hello), torch.tensor(hello), iter(hello), tuple(map(np.int32, hello))):
        assert tokenizer.decode(ids) == "hello"
    for bad in (object(), 5, None, "5", [0.5], [object()], [10**5000], torch.tensor([[1]]), Hostile(), [[1]]):
        with pytest.raises(RequestError):
            tokenizer.decode(bad)  # type: ignore[arg-type]
    for errors in (5, None, "no such", Hostile()):
        with pytest.raises(RequestError, match="errors="):
            tokenizer.decode([1], errors=errors)  # type: ignore[arg-type]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "tools",
    [
        np.array(["a", "b"]),
        torch.ones(2),
        np.array([{"name": "f"}], dtype=object),
        5,
        [{"type": np.array([1, 2]), "function": {"name": "f"}}],
        [{"name": np.array([1, 2])}],
        [{"name": "f", "description": torch.ones(2)}],
        [{"name": "f", "parameters": {"default": np.float32(1)}}],
        [{"name": "f", "parameters": deep(100_000)}],
        [{"name": "f", "parameters": {Hostile(): 1}}],
    ],
    ids=range(10),
)
def test_tools_that_are_none(llm: qwenrt.LLM, tools: Any) -> None:
    for use in (lambda: llm.chat("a", tools=tools), lambda: list(llm.stream("a", tools=tools))):
        with pytest.raises(RequestError, match="tools"):
            use()


def test_arguments_of_calls_may_be_deep_but_not_endless(llm: qwenrt.LLM) -> None:
    def ask(arguments: Any) -> None:
        call = {"function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
        llm.tokenizer.encode_chat([*messages, {"role": "tool", "content": "r"}])

    ask(deep(82))
    for arguments in (deep(100_000), {"a": np.float32(1)}, {"a": torch.ones(2)}, {1j: 1}):
        with pytest.raises(RequestError, match="expressible as JSON"):
            ask(arguments)


@pytest.mark.parametrize(
    "value", [np.array([1, 2]), torch.ones(2), Hostile(), object(), 10**5000, b"a"], ids=range(6)
)
def test_messages_hold_what_no_template_knows(llm: qwenrt.LLM, value: Any) -> None:
    user = {"role": "user", "content": "a"}
    for messages in (
        value,
        [value],
        [{**user, "role": value}],
        [{**user, "content": value}],
        [{**user, "content": [{"type": value, "text": "a"}]}],
        [{**user, "tool_call_id": [value]}],
    ):
        with pytest.raises(QwenrtError):
            llm.chat(messages=messages, max_tokens=1)
