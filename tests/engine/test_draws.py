"""What a request draws is its own: whatever runs beside it, however its prompt is cut, whichever stack computes it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from qwenrt.engine.engine import Engine
from qwenrt.engine.options import EngineOptions
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.sampling_params import SamplingParams
from tests.conftest import GOLDEN
from tests.engine.conftest import FaultyBackend, load_model, make_engine, run, tokens

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [4]]
RULES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 7},
    {"temperature": 1.2, "top_p": 0.7},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]
CROWDS = {
    "together": {},
    "in pieces": {"max_num_batched_tokens": 3},
    "preempted": {"block_size": 2, "num_blocks": 36, "max_model_len": 64, "prefix_caching": False},
}


def params(i: int) -> SamplingParams:
    return SamplingParams(seed=100 + i, max_tokens=16, n=1 + i % 2, **RULES[i % len(RULES)])


@cache
def alone() -> list[list[list[int]]]:
    """What each request draws by itself, by the seams: a list for each of its completions."""
    found = []
    for i, prompt in enumerate(PROMPTS):
        model = load_model(GOLDEN / "ntk_logn", FaultyBackend(torch.device("cpu")))
        engine = Engine(model, None, EngineOptions(max_model_len=128))
        name = engine.add(prompt, params(i))
        outputs = run(engine)[name]
        found.append([tokens(outputs, index) for index in range(params(i).n)])
    return found


@pytest.mark.parametrize("crowd", CROWDS)
def test_each_draws_what_it_draws_alone(crowd: str) -> None:
    engine = make_engine("ntk_logn", **CROWDS[crowd])
    outputs: list[RequestOutput] = []
    for i, prompt in enumerate(PROMPTS):
        engine.add(prompt, params(i), request_id=str(i))
        engine.add([7, 7, i], SamplingParams(temperature=1.0, max_tokens=9, logprobs=i % 2 or None))
        outputs += engine.step()
    while engine.has_work:
        outputs += engine.step()
    if crowd == "preempted":
        assert engine.scheduler.num_preemptions
    for i, wanted in enumerate(alone()):
        own = [output for output in outputs if output.request_id == str(i)]
        assert [tokens(own, index) for index in range(len(wanted))] == wanted


def test_a_text_that_is_continued_draws_as_if_it_had_not_ended() -> None:
    """Numbers belong to positions, so that the second half of an answer can be asked for by itself."""
    whole = alone()[0][0]
    engine = make_engine("ntk_logn")
    name = engine.add([*PROMPTS[0], *whole[:6]], params(0).with_(max_tokens=10))
    assert tokens(run(engine)[name]) == whole[6:]
