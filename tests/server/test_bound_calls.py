"""Calls of strict tools that the model makes of itself, over a socket: in each form, streamed, beside others."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.asking import CHAT, MESSAGES, RESPONSES, ask, chat, events, joined, serve
from tests.server.scripted import scripted_llm

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "strict": True, "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
# What the model would write: arguments that are not of the schema.
CALLS = {
    "qwen3": 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": 5, "day": ""}}\n</tool_call>',
    "xml": "Let me see.\n<tool_call>\n"
    "<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    "qwen1": 'Thought: I look.\nAction: weather\nAction Input: {"town": "Rome"}\nObservation:',
}


@pytest.mark.parametrize("form", CALLS)
def test_a_call_once_begun_is_of_its_schema(form: str) -> None:
    def reply(prompt: str) -> str:
        return "No <call> at all." if "Hello" in prompt else CALLS[form]

    with scripted_llm(reply, max_model_len=4096, chat=form, max_num_seqs=4) as llm, serve(llm) as served:

        def asked(number: int) -> tuple[str, str, str]:
            """Name and arguments of the call, and the text."""
            text = "Hello" if number % 3 == 2 else "weather"
            fields = {"tools": [TOOL], "seed": number, "temperature": 0.7, "max_tokens": 200}
            status, headers, told = ask(served, CHAT, chat(text, stream=number % 2 == 0, **fields))
            assert status == 200 and "x-qwenrt-ignored" not in headers
            if number % 2:
                message = told["choices"][0]["message"]
                (function,) = [c["function"] for c in message.get("tool_calls", [])] or [
                    {"name": "", "arguments": ""}
                ]
                return function["name"], function["arguments"], message["content"] or ""
            chunks = events(told)
            deltas = [c["delta"] for chunk in chunks for c in chunk["choices"]]
            calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
            name, arguments = (
                "".join(call.get(key) or "" for call in calls) for key in ("name", "arguments")
            )
            return name, arguments, joined(chunks)

        with ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(asked, range(6)))
        for number, (name, arguments, text) in enumerate(answers):
            if number % 3 == 2:
                assert (name, arguments, text) == ("", "", "No <call> at all.")
                continue
            assert name == "weather"
            jsonschema.validate(json.loads(arguments), PARAMETERS)
            assert form == "qwen1" or text.startswith("Let me see.")


def test_other_dialects_bind_them_too() -> None:
    with scripted_llm(lambda prompt: CALLS["qwen3"], max_model_len=4096) as llm, serve(llm) as served:
        tool = {"name": "weather", "strict": True, "input_schema": PARAMETERS}
        _, headers, told = ask(served, MESSAGES, chat("x", max_tokens=200, tools=[tool]))
        (block,) = [block for block in told["content"] if block["type"] == "tool_use"]
        jsonschema.validate(block["input"], PARAMETERS)
        asked: dict[str, Any] = {
            "model": "m",
            "input": "x",
            "tools": [{"type": "function", **FUNCTION}],
            "max_output_tokens": 200,
        }
        _, more, told = ask(served, RESPONSES, asked)
        (call,) = [item for item in told["output"] if item["type"] == "function_call"]
        jsonschema.validate(json.loads(call["arguments"]), PARAMETERS)
        assert "x-qwenrt-ignored" not in {**headers, **more}
        unkept = {"type": "function", "function": FUNCTION | {"parameters": PARAMETERS | {"not": {}}}}
        assert ask(served, CHAT, chat("x", tools=[unkept]))[0] == 400
