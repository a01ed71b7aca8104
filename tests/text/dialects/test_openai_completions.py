"""Completions in OpenAI's dialect: prompts of four shapes, and answers in pieces and whole."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.outputs import Delta, FinishReason, Generation, TokenLogprob, Usage
from qwenrt.sampling_params import SamplingParams
from qwenrt.structure import Grammar
from qwenrt.text.dialects.answers import Served, json_bytes
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.openai_completions import CompletionRequest, CompletionWriter, decode, read
from qwenrt.text.dialects.openai_fields import Wishes
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.strategies import JSON, Written, unhurried, written
from tests.text.dialects.test_openai_chat_writer import events


def ask(prompt: Any = "once", **fields: Any) -> Ask:
    return read(decode(json.dumps({"model": "m", "prompt": prompt, **fields}).encode()))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("once", ["once"]),
        ("", [""]),
        (["a", "<|im_end|>"], ["a", "<|im_end|>"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["x"] * 1024, ["x"] * 1024),
    ],
)
def test_prompts_are_texts_or_ids(prompt: Any, prompts: list[Any]) -> None:
    read_as = ask(prompt)
    assert (read_as.prompts, read_as.messages, read_as.sampling, read_as.extra) == (
        prompts,
        None,
        {},
        Wishes(),
    )


BAD = [
    ([], {}, "prompt"),
    ([[]], {}, "prompt[0]"),
    ([-1], {}, "prompt[0]"),
    ([2**40], {}, "prompt[0]"),
    ([1, "a"], {}, "prompt[1]"),
    ([1, [2]], {}, "prompt[1]"),
    (["a", [2]], {}, "prompt[1]"),
    ([[1], "a"], {}, "prompt[1]"),
    ([[1], [2, -3]], {}, "prompt[1][1]"),
    ([[1], ["a"]], {}, "prompt[1][0]"),
    ([1.5], {}, "prompt[0]"),
    ([True], {}, "prompt[0]"),
    (["x"] * 1025, {}, "prompt"),
    (None, {}, "prompt"),
    ("x", {"model": None}, "model"),
    ("x", {"suffix": "the end"}, "suffix"),
    ("x", {"logprobs": 65}, "logprobs"),
    ("x", {"logprobs": -1}, "logprobs"),
    ("x", {"logprobs": 1, "echo": True}, "logprobs"),
    ("x", {"n": 65}, "n"),
    (["x", "y"], {"n": 33}, "n"),
    (["x", "y"], {"n": 2, "best_of": 33}, "best_of"),
    ("x", {"temperature": -1}, "temperature"),
    ("x", {"max_tokens": 0, "echo": True}, "max_tokens"),
    ("x", {"guided_regex": ""}, "guided_regex"),
]


@pytest.mark.parametrize(("prompt", "fields", "param"), BAD, ids=[f"{p!r:.20} {f}" for p, f, _ in BAD])
def test_what_is_wrong_is_named(prompt: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Problem) as caught:
        ask(prompt, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_fields_are_read() -> None:
    read_as = ask(
        suffix="", model="m", n=2, best_of=3, logprobs=4, stop="x", stream=False, priority=9, guided_regex="a"
    )
    assert read_as.sampling == {"n": 3, "logprobs": 4, "stop": "x", "grammar": Grammar.regex("a")}
    assert read_as.extra == Wishes(2, 3, 4)
    assert (read_as.model, read_as.priority, read_as.stream) == ("m", 9, False)
    assert (ask(logprobs=True).extra.logprobs, ask(logprobs=False).extra.logprobs) == (0, None)
    assert ask(["x", "y"], n=32).extra.drawn == 32


FIELDS = st.sampled_from([*CompletionRequest.__struct_fields__, "other"])


@unhurried
@given(
    JSON | st.lists(st.integers(-1, 5) | st.text() | st.lists(st.integers())), st.dictionaries(FIELDS, JSON)
)
def test_any_object_is_an_ask_or_a_problem(prompt: Any, fields: dict[str, Any]) -> None:
    try:
        read_as = read(decode(json.dumps({"model": "m", "prompt": prompt, **fields}).encode()))
    except Problem as found:
        assert found.status == 400
        return
    assert read_as.prompts
    SamplingParams(**{"max_tokens": None, **read_as.sampling})


def served(*prompts: str, texts: dict[int, bytes] | None = None) -> Served:
    texts = texts or {}
    return Served(
        "m",
        "r",
        prompt_tokens=9,
        prompts=prompts,
        token_text=lambda token: (texts[token].decode("utf-8", "replace"), texts[token]),
    )


def writer(*prompts: str, texts: dict[int, bytes] | None = None, **wishes: Any) -> CompletionWriter:
    prompts = prompts or ("once",)
    return CompletionWriter(served(*prompts, texts=texts), Ask(prompts=prompts, extra=Wishes(**wishes)))


@unhurried
@given(written(calls=0), st.booleans(), st.booleans())
def test_joined_chunks_are_the_whole_body(answers: Written, usage: bool, echo: bool) -> None:
    prompts = [f"prompt {i} " for i in range(len(answers.choices))]
    of = writer(*prompts, usage=usage, echo=echo)
    chunks = events(b"".join([of.begin(), *map(of.push, answers.deltas), of.end()]))
    body = json.loads(json_bytes(writer(*prompts, echo=echo).whole(answers.choices)))
    texts, ends = dict.fromkeys(range(len(prompts)), ""), {}
    for chunk in chunks:
        assert chunk["object"] == body["object"] == "text_completion" and chunk["id"] == of.id
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"]
    for i, choice in enumerate(body["choices"]):
        assert choice["index"] == i
        assert choice["text"] == texts[i] == (prompts[i] if echo else "") + answers.choices[i].text
        assert choice["finish_reason"] == ends[i] in ("stop", "length")
    if usage:
        assert chunks[-1]["usage"] == body["usage"]
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4 * len(prompts)}


def test_choices_of_a_prompt_follow_each_other() -> None:
    texts = ["a0", "a1", "b0", "b1"]
    choices = [Generation(text, [], "stop", Usage(5, 1, 2)) for text in texts]
    body = writer("A ", "B ", choices=2, drawn=2, echo=True).whole(choices)
    assert [choice["text"] for choice in body["choices"]] == ["A a0", "A a1", "B b0", "B b1"]
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


def test_the_best_are_chosen_for_each_prompt() -> None:
    values = [-1.0, -2.0, -5.0, -4.0]
    choices = [Generation(str(v), [1], "stop", Usage(), [TokenLogprob(1, v)]) for v in values]
    body = writer("A", "B", drawn=2).whole(choices)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "-1.0"), (1, "-4.0")]


def test_the_older_logprobs_are_four_lists_with_offsets_in_characters() -> None:
    texts = {1: b"ab", 2: "中".encode()[:2], 3: "中".encode()[2:], 4: b"c", 5: b"ab"}
    entries = [
        TokenLogprob(1, -0.5, {1: -0.5, 5: -0.25, 4: -3.0}),
        TokenLogprob(2, -1.0, {4: float("-inf")}),
        TokenLogprob(3, float("-inf")),
        TokenLogprob(4, -2.0),
    ]
    whole = writer(texts=texts, logprobs=2).whole(
        [Generation("ab中c", [1, 2, 3, 4], "stop", Usage(), entries)]
    )
    told = json.loads(json_bytes(whole))["choices"][0]["logprobs"]
    assert told == {
        "tokens": ["ab", "�", "�", "c"],
        "token_logprobs": [-0.5, -1.0, -9999.0, -2.0],
        "top_logprobs": [{"ab": -0.25, "c": -3.0}, {"�": -1.0, "c": -9999.0}, {"�": -9999.0}, {"c": -2.0}],
        "text_offset": [0, 2, 2, 3],
    }
    of = writer(texts=texts, logprobs=2)
    pushed = b"".join(of.push(Delta("", [entry.token_id], logprobs=[entry])) for entry in entries)
    offsets = [c["choices"][0]["logprobs"]["text_offset"] for c in events(pushed + b"data: [DONE]\n\n")]
    assert offsets == [[0], [2], [2], [3]]


def test_nothing_is_told_that_was_not_asked_for() -> None:
    entries = [TokenLogprob(1, -0.5)]
    choice = writer().whole([Generation("x", [1], "stop", Usage(), entries)])["choices"][0]
    assert choice == {"index": 0, "text": "x", "logprobs": None, "finish_reason": "stop"}
    assert writer().begin() == writer().push(Delta("", [1], logprobs=entries)) == b""


@pytest.mark.parametrize("reason", get_args(FinishReason))
def test_every_reason_has_a_word_that_clients_know(reason: FinishReason) -> None:
    [choice] = writer().whole([Generation("x", [], reason, Usage())])["choices"]
    assert choice["finish_reason"] in ("stop", "length")
    assert choice.get("qwenrt") == (
        {"finish_reason": reason} if reason in ("timeout", "abort", "error") else None
    )
