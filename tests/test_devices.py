"""The recorded checkpoints on an accelerator, run by hand with `pytest -m gpu` or `-m npu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qwenrt
from qwenrt.backends import registry
from qwenrt.backends.cuda import CudaBackend
from qwenrt.backends.graphs import EagerGraphs, Graphs
from tests.backends.test_graphs import MODELS, check, small_stack
from tests.conftest import DENSE_GOLDENS, GPTQ_GOLDENS
from tests.steps import step_of

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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_captured_and_right(name: str, dtype: torch.dtype) -> None:
    """Seams beside definitions, then replays beside the seams, on the device itself."""
    backend = registry.create("cuda")
    assert check(backend, MODELS[name], dtype) == {}


@pytest.mark.gpu
def test_a_replay_gives_the_bits_of_the_body_run_as_it_is() -> None:
    backends = registry.create("cuda"), EagerCuda(torch.device("cuda"))
    steps = [step_of([3, 4, 5], [1] * 3, [n] * 3, [[4], [5], [6]]) for n in (1, 2, 3)]
    captured, eager = (small_stack(backend)[0] for backend in backends)
    with torch.no_grad():
        for step in steps:
            got, wanted = captured.run(step), eager.run(step)
            assert got.served_by is captured and got.tokens() == wanted.tokens()
            assert torch.equal(got.logits, wanted.logits)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DENSE_GOLDENS)
def test_what_was_captured_is_in_explain(golden_dir: Path, name: str) -> None:
    with qwenrt.load(golden_dir / name, device="cuda", dtype="float32", progress=False) as llm:
        llm.generate(prompt_token_ids=[[1, 2, 3]], sampling_params=qwenrt.SamplingParams(max_tokens=4))
        assert "steps that decode, of up to 1 sequences: captured in 1 graph, which took" in llm.explain()


class EagerCuda(CudaBackend):
    """The body of a captured step, asked for op by op."""

    def graphs(self) -> Graphs:
        return EagerGraphs()
