"""Required calls and structured answers through the library, with the built-in model and with models that think."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from qwenrt.errors import RequestError
from qwenrt.structure import Grammar
from qwenrt.text.chat.tool_choice import chosen_tools
from tests.model.tiny_models import build
from tests.model.tiny_models import load as load_tiny
from tests.test_later_text import write_tokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

PARAMETERS = {
    "type": "object",
    "properties": {
        "expression": {"enum": ["1+1", "2*3"]},
        "digits": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["expression", "digits"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "calculate", "description": "Calculates", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "now", "description": "The time"}},
]
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is 1+1?"}],
    "tools": TOOLS,
    "max_tokens": 200,
    "seed": 5,
}
NAMED = {"type": "function", "function": {"name": "calculate"}}


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with qwenrt.load("demo", progress=False) as loaded:
        yield loaded


def called(generation: Any) -> list[str]:
    names = []
    for call in generation.message.get("tool_calls", []):
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "calculate":
            jsonschema.validate(arguments, PARAMETERS)
        names.append(call["function"]["name"])
    return names


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_named_tool_is_called(llm: qwenrt.LLM, temperature: float) -> None:
    for choice in (NAMED, {"name": "calculate"}):
        generation = llm.chat(**ASKED, tool_choice=choice, temperature=temperature)
        assert called(generation) == ["calculate"] and generation.finish_reason == "tool_calls"
    hello = {**ASKED, "messages": [{"role": "user", "content": "Hello"}]}
    assert called(llm.chat(**hello, tool_choice="required"))[0] in ("calculate", "now")
    assert not called(llm.chat(**hello, temperature=0.0))


def test_streams_and_several_answers(llm: qwenrt.LLM) -> None:
    deltas = list(llm.stream(**ASKED, tool_choice=NAMED))
    assert (
        deltas[-1].tool_calls
        and "".join(piece.name for delta in deltas for piece in delta.calls) == "calculate"
    )
    generation = llm.chat(**ASKED, tool_choice=NAMED, n=3, temperature=1.5)
    assert all(called(choice) == ["calculate"] for choice in generation.choices)


def test_none_shows_no_tools(llm: qwenrt.LLM) -> None:
    without = llm.prepare(messages=ASKED["messages"])
    assert (
        llm.prepare(messages=ASKED["messages"], tools=TOOLS, tool_choice="none").prompt_token_ids
        == without.prompt_token_ids
    )
    shown = llm.prepare(messages=ASKED["messages"], tools=TOOLS).prompt_token_ids
    assert shown != without.prompt_token_ids
    assert llm.prepare(messages=ASKED["messages"], tools=TOOLS, tool_choice=NAMED).prompt_token_ids == shown


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        (TOOLS, {"name": "other"}, "other.*'calculate', 'now'"),
        (None, "required", "no tools"),
        (TOOLS, "sometimes", "known"),
        (TOOLS, {"type": "function"}, "known"),
        (TOOLS, {"type": "file", "name": "now"}, "known"),
        (TOOLS, 3, "known"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(tools: Any, choice: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        chosen_tools(tools, choice)


def test_what_cannot_be_held_to_is_refused_when_it_is_prepared(llm: qwenrt.LLM) -> None:
    grammar = Grammar.json_object()
    with pytest.raises(RequestError, match="Leave one out"):
        llm.prepare(**ASKED, tool_choice="required", grammar=grammar)
    bad = Grammar.json_schema({"properties": {"a": {"not": {}}}})
    for asked in ({"messages": ASKED["messages"]}, {"prompt": "x"}, {"prompt_token_ids": [1, 2]}):
        with pytest.raises(RequestError, match=r"\$\.properties\.a\.not"):
            llm.prepare(**asked, grammar=bad)
    with pytest.raises(RequestError, match=r"\$\.properties\.a\.not"):
        asyncio.run(llm.agenerate("x", grammar=bad))
    with pytest.raises(RequestError, match="parallel_tool_calls"):
        llm.prepare(**ASKED, parallel_tool_calls="no")


def test_structured_answers_of_generate_chat_and_asyncio(llm: qwenrt.LLM) -> None:
    grammar = Grammar.json_schema(OK)
    texts = [
        llm.generate("It is", grammar=grammar).text,
        llm.chat("Is it?", grammar=grammar)[0],
        asyncio.run(llm.agenerate("It is", grammar=grammar)).text,
        "".join(delta.text for delta in llm.stream("Is it?", grammar=grammar)),
    ]
    assert all(type(json.loads(text)["ok"]) is bool for text in texts)


# ---- models that think, with random weights


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3: an answer may begin with a thought, calls are Hermes' form."""
    made = tmp_path_factory.mktemp("qwen3")
    build("Qwen3", {"vocab_size": 320, "head_dim": 16, "max_position_embeddings": 4096}, made)
    write_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def hybrid(directory: Path) -> Iterator[qwenrt.LLM]:
    with load_tiny(directory) as loaded:
        yield loaded


def with_template(directory: Path, made: Path, template: str) -> qwenrt.LLM:
    for file in directory.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    (made / "chat_template.jinja").write_text(template)
    return load_tiny(made)


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OK = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
HELLO: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hello"}],
    "grammar": Grammar.json_schema(OK),
}


def test_a_thought_is_free_and_the_answer_after_it_held(hybrid: qwenrt.LLM) -> None:
    tags = hybrid.tokenizer.added_tokens
    thinks = {tags["<think>"]: 100.0}
    free = hybrid.chat(**HELLO, seed=1, logit_bias={tags["<think>"]: 9.0}, max_tokens=60, ignore_eos=True)
    assert free.token_ids[0] == tags["<think>"] and free.reasoning
    assert free.text == "" and free.finish_reason == "length"
    for seed in range(3):
        plain = hybrid.chat(**HELLO, seed=seed, logit_bias={tags["<think>"]: -100.0}, max_tokens=60)
        assert not plain.reasoning and type(json.loads(plain.text)["ok"]) is bool
        asked = {**HELLO, "seed": seed, "logit_bias": thinks, "ignore_eos": True}
        cut = hybrid.chat(**asked, max_tokens=900, thinking_budget=10)
        assert "Considering the limited time" in cut.reasoning and cut.finish_reason == "stop"
        assert type(json.loads(cut.text)["ok"]) is bool
        off = hybrid.chat(**asked, max_tokens=60, enable_thinking=False)
        assert not off.reasoning and type(json.loads(off.text)["ok"]) is bool
        pieces = list(hybrid.stream(**asked, max_tokens=900, thinking_budget=10))
        assert "".join(piece.text for piece in pieces) == cut.text


def test_a_prompt_that_opens_the_thought(directory: Path, tmp_path: Path) -> None:
    opens = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    with with_template(directory, tmp_path, opens) as llm:
        ends = {llm.tokenizer.added_tokens["</think>"]: 8.0}
        for seed in range(3):
            reply = llm.chat(**HELLO, seed=seed, logit_bias=ends, ignore_eos=True, max_tokens=1500)
            assert type(json.loads(reply.text)["ok"]) is bool
            done = llm.chat(**HELLO, seed=seed, thinking_budget=4, ignore_eos=True, max_tokens=900)
            assert type(json.loads(done.text)["ok"]) is bool


def test_required_calls_of_a_model_that_thinks(hybrid: qwenrt.LLM) -> None:
    tags = hybrid.tokenizer.added_tokens
    asked = {**ASKED, "max_tokens": 900}
    for bias in (-100.0, 100.0):
        again = {**asked, "logit_bias": {tags["<think>"]: bias}, "ignore_eos": bias > 0}
        reply = hybrid.chat(**again, tool_choice=NAMED, thinking_budget=5, parallel_tool_calls=False)
        assert called(reply) == ["calculate"] and reply.finish_reason == "tool_calls"
        assert bool(reply.reasoning) is (bias > 0) and not reply.text
        assert reply.token_ids.count(tags["<tool_call>"]) == 1 == reply.token_ids.count(tags["</tool_call>"])
    reply = hybrid.chat(**asked, tool_choice="required", enable_thinking=False)
    assert len(called(reply)) >= 1


def test_an_answer_held_to_json_may_be_a_call_instead(hybrid: qwenrt.LLM) -> None:
    opening = hybrid.tokenizer.added_tokens["<tool_call>"]
    for bias in (-100.0, 100.0):
        asked = {**ASKED, "logit_bias": {opening: bias}, "enable_thinking": False}
        reply = hybrid.chat(**asked, grammar=HELLO["grammar"], parallel_tool_calls=False)
        if bias < 0:
            assert type(json.loads(reply.text)["ok"]) is bool and reply.finish_reason == "stop"
        else:
            assert called(reply)[0] in ("calculate", "now") and not reply.text
    with pytest.raises(RequestError, match=r"\$\.not"):
        hybrid.prepare(**ASKED, grammar=Grammar.json_schema({"not": {}}))


def test_required_calls_in_xml(directory: Path, tmp_path: Path) -> None:
    tools = "{% if tools %}<tool_call>\n<function=example>{{ tools | tojson }}{% endif %}"
    with with_template(directory, tmp_path, tools + TURNS + "<|im_start|>assistant\n") as llm:
        for seed in range(4):
            asked = {**ASKED, "seed": seed, "max_tokens": 600, "temperature": 1.0}
            reply = llm.chat(**asked, tool_choice=NAMED, parallel_tool_calls=False)
            assert called(reply) == ["calculate"], reply
