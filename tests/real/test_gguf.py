"""A released GGUF file beside the directory of bfloat16 weights that was made from it, and beside llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from scripts.fetch_models import RELEASES, cache_directory, gguf_file

real: Any = pytest.importorskip("tests.real.conftest")  # where checkpoints lie

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
PROMPTS = ("def fibonacci(n):\n", "The capital of France is", "用Python写一个快速排序：")
RECORDED = Path(__file__).parent / "recorded"
NEAR_TIE = 0.05  # of a logit; a token further behind must not come
TIE_OF_8_BITS = 0.25  # the same, where llama.cpp rounds inputs of its linears to 8 bits
GREEDY = qwenrt.SamplingParams(temperature=0, max_tokens=32, repetition_penalty=1.0)


@pytest.mark.parametrize("size", sorted(RELEASES))
def test_its_tokens_are_those_of_the_directory(size: str) -> None:
    file = file_of(size)
    found: list[Any] = []
    of_directory: list[Any] = []
    for source in (real.directory_of(size), file):
        with qwenrt.load(source, activations="exact", max_model_len=512, progress=False) as llm:
            prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
            chat = llm.tokenizer.encode_chat([{"role": "user", "content": PROMPTS[2]}])
            found.append((prompts, chat, llm.tokenizer.special_tokens, llm.tokenizer.added_tokens))
            answers = [llm.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
            if source == file:
                for prompt, ours, theirs in zip(prompts, answers, of_directory, strict=True):
                    assert_same(llm, prompt, ours, theirs)
            of_directory = answers
    assert found[0] == found[1]


@pytest.mark.parametrize("size", sorted(RELEASES))
def test_its_tokens_are_those_of_llama_cpp(size: str) -> None:
    file, path = file_of(size), RECORDED / f"{size}-llama.json"
    if not path.exists():
        pytest.skip(f"nobody recorded it: python -m tests.real.record_llama {size} does")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    with qwenrt.load(file, max_model_len=512, progress=False) as llm:
        for entry in recorded.values():
            prompt, theirs = entry["prompt"], entry["tokens"]
            ours = llm.generate(
                prompt_token_ids=prompt, sampling_params=GREEDY.with_(max_tokens=len(theirs))
            ).token_ids
            assert_same(llm, prompt, ours, theirs[: len(ours)], TIE_OF_8_BITS)


def file_of(size: str) -> Path:
    """Where a released file lies, or a skip."""
    file = gguf_file(RELEASES[size], cache_directory())
    if not file.exists():
        pytest.skip(f"{file} is not there: python scripts/fetch_models.py {size} fetches it")
    return file


def assert_same(
    llm: qwenrt.LLM,
    prompt: list[int],
    ours: Sequence[int],
    theirs: Sequence[int],
    near: float = NEAR_TIE,
) -> None:
    """The same tokens, or the same up to where the two likeliest are nearer than ``near``, by default what a bfloat16
    weight is rounded by: the directory's weights are those of the file, rounded so."""
    pairs = zip(ours, theirs, strict=True)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is not None:
        logits = llm.logits([*prompt, *ours[:at]])[-1]
        assert 0 <= float(logits[ours[at]] - logits[theirs[at]]) < near, f"from token {at} on"
