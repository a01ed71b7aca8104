"""The recorded checkpoints on an accelerator, run by hand with `pytest -m gpu` or `-m npu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qwenrt
from tests.conftest import DENSE_GOLDENS, GPTQ_GOLDENS

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("npu", marks=pytest.mark.npu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DENSE_GOLDENS + GPTQ_GOLDENS)
def test_recorded_tokens_and_logits(golden_dir: Path, name: str, device: str) -> None:
    golden = load_file(golden_dir / name / "golden.safetensors")
    keys = sorted({key.rsplit(".", 1)[0] for key in golden if not key.startswith("dequant.")})
    torch.set_float32_matmul_precision("highest")
    with qwenrt.load(golden_dir / name, device=device, dtype="float32", progress=False) as llm:
        prompts = [golden[f"{key}.ids"].tolist() for key in keys]
        wanted = [golden[f"{key}.new_tokens"].tolist() for key in keys]
        params = [qwenrt.SamplingParams(temperature=0, max_tokens=len(w), ignore_eos=True) for w in wanted]
        got = llm.generate(prompt_token_ids=prompts, sampling_params=params)
        assert [g.token_ids for g in got] == wanted
        for key, prompt in zip(keys, prompts, strict=True):
            logits = llm.logits(prompt)
            torch.testing.assert_close(logits, golden[f"{key}.prefill_logits"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "settings", [{}, {"quantize": "int8"}, {"quantize": "int4"}, {"kv_cache_dtype": "int8"}]
)
def test_the_demo_answers(device: str, settings: dict[str, str]) -> None:
    with qwenrt.load("demo", device=device, progress=False, **settings) as llm:
        response, _ = llm.chat("What is the capital of France?", temperature=0)
        assert "Paris" in response
