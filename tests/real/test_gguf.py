"""A released GGUF file beside the directory of bfloat16 weights that was made from it."""

from __future__ import annotations

from typing import Any

import pytest

import qwenrt
from scripts.fetch_models import RELEASES, cache_directory, gguf_file

real: Any = pytest.importorskip("tests.real.conftest")  # where checkpoints lie

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
PROMPTS = ("def fibonacci(n):\n", "The capital of France is", "用Python写一个快速排序：")
GREEDY = qwenrt.SamplingParams(temperature=0, max_tokens=32, repetition_penalty=1.0)


@pytest.mark.parametrize("size", sorted(RELEASES))
def test_its_tokens_are_those_of_the_directory(size: str) -> None:
    file = gguf_file(RELEASES[size], cache_directory())
    if not file.exists():
        pytest.skip(f"{file} is not there: python scripts/fetch_models.py {size} fetches it")
    found = []
    for source in (file, real.directory_of(size)):
        with qwenrt.load(source, activations="exact", max_model_len=512, progress=False) as llm:
            prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
            chat = llm.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[2]}])
            answers = [llm.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
            found.append((prompts, chat, answers, llm.tokenizer.special_tokens, llm.tokenizer.added_tokens))
    assert found[0] == found[1]
