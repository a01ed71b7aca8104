"""What a type checker says of the public calls. mypy reads this file in `make types`; nothing runs it."""
# mypy: warn-unused-ignores

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import assert_type

import qwenrt

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS: list[dict[str, Any]] = [{"name": "now"}]


def loading() -> qwenrt.LLM:
    qwenrt.load(
        "demo", dtype=torch.bfloat16, device=torch.device("cpu"), quantize="int4", kv_cache_dtype="int8"
    )
    qwenrt.load(dtype="int3")  # type: ignore[arg-type]
    qwenrt.load(torch_dtype="auto")  # type: ignore[call-arg]
    kept: qwenrt.Quantize = "int8"
    return qwenrt.load("demo", quantize=kept)


def chatting(llm: qwenrt.LLM) -> None:
    response, history = llm.chat("Hi", history=None)
    assert_type(response, str)
    assert_type(history, list[tuple[str, str]])
    assert_type(llm.chat("Hi", history=history, system="S", temperature=0), tuple[str, list[tuple[str, str]]])
    assert_type(llm.chat("Hi", tools=TOOLS), qwenrt.Generation)
    assert_type(llm.chat(messages=MESSAGES), qwenrt.Generation)
    assert_type(llm.chat(messages=MESSAGES, tools=TOOLS, tool_choice="required"), qwenrt.Generation)
    llm.chat("Hi", max_new_tokens=5)  # type: ignore[call-overload]
    llm.chat("Hi", temperature="hot")  # type: ignore[call-overload]
    llm.chat_stream("Hi")  # type: ignore[attr-defined]
    assert_type(llm.stream("Hi", history=history, max_tokens=3), Iterator[qwenrt.Delta])
    assert_type(llm.tokenizer.encode("Hi"), list[int])


def completing(llm: qwenrt.LLM) -> None:
    params = qwenrt.SamplingParams(max_tokens=5)
    assert_type(llm.generate("Hi", params), qwenrt.Generation)
    assert_type(llm.generate(["a", "b"], [params, params]), list[qwenrt.Generation])
    assert_type(llm.generate(("a", "b"), max_tokens=3), list[qwenrt.Generation])
    assert_type(llm.generate(prompt_token_ids=[1, 2]), qwenrt.Generation)
    assert_type(llm.generate(prompt_token_ids=[[1], [2]]), list[qwenrt.Generation])
    assert_type(llm.generate("Hi").finish_reason, qwenrt.FinishReason)
    assert_type(llm.logits([1, 2]), torch.Tensor)


async def waiting(llm: qwenrt.LLM) -> None:
    assert_type(await llm.achat("Hi"), tuple[str, list[tuple[str, str]]])
    assert_type(await llm.achat(messages=MESSAGES), qwenrt.Generation)
    assert_type(await llm.agenerate("Hi"), qwenrt.Generation)
    assert_type(await llm.agenerate(["a", "b"]), list[qwenrt.Generation])
    async for delta in llm.astream(messages=MESSAGES, max_tokens=5):
        assert_type(delta, qwenrt.Delta)
