"""Answers at random, over a socket: held to random schemas, and calls whose tokens end at random places."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import qwenrt
from tests.schemas import random_schema
from tests.server.asking import CHAT, ask, chat, events, joined, serve
from tests.server.scripted import scripted_llm

SIDE_BY_SIDE = 8


def number_of(prompt: str) -> int:
    """The user's last word."""
    return int(prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0].split()[-1])


# ---- schemas

SCHEMAS = 60
NUMBER, NULL = {"type": "integer"}, {"type": "null"}
PATTERNS: list[Any] = [  # keys of these kinds have been written where they must not
    {
        "patternProperties": {"^a": NUMBER},
        "properties": {"abc": {"minimum": 5}, "b": NULL},
        "required": ["abc"],
    },
    {"patternProperties": {"^a": NUMBER}, "additionalProperties": False, "minProperties": 1},
    {
        "patternProperties": {"b$": {"type": "string"}},
        "properties": {"ab": {"maxLength": 2}},
        "required": ["ab"],
    },
]


def test_finished_answers_to_random_schemas_validate() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    kind = jsonschema.Draft202012Validator
    schemas = [random_schema(random.Random(seed)) for seed in range(SCHEMAS)]
    schemas += [{"type": "object", **schema} for schema in PATTERNS for _ in range(4)]

    def reply(prompt: str) -> list[int]:
        """What ends and parts values, in any order: where the grammar has it otherwise, chance writes."""
        return random.Random(number_of(prompt)).choices(b'"}],:1a', weights=(6, 6, 4, 2, 2, 2, 1), k=200)

    with scripted_llm(reply, max_model_len=1024) as llm, serve(llm) as served:

        def answer(number: int) -> str | None:
            """The text of an answer that came to its end, "" for one that did not, None where the schema is refused."""
            held = {"type": "json_schema", "json_schema": {"name": "x", "schema": schemas[number]}}
            fields = {"response_format": held, "seed": number, "temperature": 1.0, "max_tokens": 150}
            body = chat(str(number), stream=number % 2 == 0, reasoning_effort="none", **fields)
            status, _, told = ask(served, CHAT, body)
            assert status in (200, 400), told
            if status == 400:
                return None
            if number % 2:
                [choice] = told["choices"]
                return str(choice["message"]["content"]) if choice["finish_reason"] == "stop" else ""
            chunks = events(told)
            return joined(chunks) if chunks[-1]["choices"][0]["finish_reason"] == "stop" else ""

        with ThreadPoolExecutor(SIDE_BY_SIDE) as clients:
            answers = list(clients.map(answer, range(len(schemas))))
    for text, schema in zip(answers, schemas, strict=True):
        if text:
            jsonschema.validate(json.loads(text), schema, kind, format_checker=kind.FORMAT_CHECKER)
    assert sum(bool(text) for text in answers[:SCHEMAS]) > SCHEMAS // 2
    assert all(any(answers[SCHEMAS + 4 * n :][:4]) for n in range(len(PATTERNS)))
    assert sum(text is None for text in answers) < SCHEMAS // 3


# ---- calls

CITY, DAYS = '杭州 "😀" é\n}', 3
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
ARGUMENTS = {"city": CITY, "days": DAYS}
JSON_CALL = f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': ARGUMENTS}, ensure_ascii=False)}\n</tool_call>"
XML_CALL = (
    "<tool_call>\n<function=weather>\n"
    f"<parameter=city>\n{CITY}\n</parameter>\n<parameter=days>\n{DAYS}\n</parameter>\n"
    "</function>\n</tool_call>"
)
# By the model's form: what it writes, and how many calls that is.
CALLS = {
    "qwen3": (f"好, I look.\n{JSON_CALL}\n{JSON_CALL}", 2),
    "xml": (f"好, I look.\n{XML_CALL}\n{XML_CALL}", 2),
    "qwen1": (
        f"Thought: 好, I look.\nAction: weather\n"
        f"Action Input: {json.dumps(ARGUMENTS, ensure_ascii=False)}\nObservation:",
        1,
    ),
}


def cut(text: str, llm: qwenrt.LLM, r: random.Random) -> list[int]:
    """Token ids of a text that is cut at random bytes: within words, tags and characters."""
    raw, ids = text.encode(), list[int]()
    while raw:
        piece, raw = raw[: (size := r.randint(1, 7))], raw[size:]
        try:
            ids += llm.tokenizer.encode(piece.decode())
        except UnicodeDecodeError:
            ids += piece  # the first 256 tokens are the bytes
    return ids


def streamed_calls(chunks: list[Any]) -> list[tuple[str, str]]:
    """Name and arguments of each call, joined; a call begins with its name and its id, behind the one before it."""
    calls: list[tuple[str, str]] = []
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls", ())):
        if piece["function"].get("name"):
            assert piece["index"] == len(calls) and piece["id"]
            calls.append((piece["function"]["name"], ""))
        assert piece["index"] == len(calls) - 1
        calls[-1] = calls[-1][0], calls[-1][1] + (piece["function"].get("arguments") or "")
    return calls


@pytest.mark.parametrize("form", CALLS)
def test_calls_are_the_same_wherever_their_tokens_end(form: str) -> None:
    text, count = CALLS[form]

    def reply(prompt: str) -> list[int]:
        return cut(text, llm, random.Random(number_of(prompt)))

    with scripted_llm(reply, max_model_len=2048, chat=form) as llm, serve(llm) as served:

        def asked(number: int) -> None:
            body = chat(str(number), tools=[TOOL], temperature=0, reasoning_effort="none")
            [choice] = ask(served, CHAT, body)[2]["choices"]
            whole = [
                (call["function"]["name"], call["function"]["arguments"])
                for call in choice["message"]["tool_calls"]
            ]
            assert [json.loads(arguments) for _, arguments in whole] == [ARGUMENTS] * count
            chunks = events(ask(served, CHAT, body | {"stream": True})[2])
            assert streamed_calls(chunks) == whole
            assert joined(chunks) == (choice["message"]["content"] or "")
            limit = random.Random(number).randrange(1, len(cut(text, llm, random.Random(number))))
            short = events(ask(served, CHAT, body | {"stream": True, "max_tokens": limit})[2])
            for (name, arguments), (full_name, full) in zip(streamed_calls(short), whole, strict=False):
                assert name == full_name and full.startswith(arguments.rstrip("\ufffd"))

        with ThreadPoolExecutor(SIDE_BY_SIDE) as clients:
            list(clients.map(asked, range(16)))
