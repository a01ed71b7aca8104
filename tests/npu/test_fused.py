"""Ops and whole models through the fused operators, as documentation defines these, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qwenrt
from qwenrt import assembly
from qwenrt.backends import selfcheck
from qwenrt.backends.ascend import fused
from qwenrt.backends.ascend.backend import A2Backend
from qwenrt.config import Environment
from qwenrt.conformance.case import Case
from qwenrt.conformance.run import chosen, run
from qwenrt.conformance.subjects import Subject
from qwenrt.llm import LLM
from qwenrt.load_options import LoadOptions
from qwenrt.ops.steps import DecodePlan
from tests.npu import declared

GOLDEN = Path(__file__).parents[1] / "golden"


class OnCPU(A2Backend):
    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 31


@pytest.fixture
def backend() -> OnCPU:
    made = declared.backend(OnCPU, "A2")
    assert isinstance(made, OnCPU)
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_self_check_finds_nothing(backend: OnCPU, dtype: torch.dtype) -> None:
    ops = (
        "rms_norm",
        "silu_and_mul",
        "rotary",
        "store_kv",
        "rotary_store_kv",
        "attention",
        "decode_attention",
    )
    assert all(map(backend.overrides, set(ops) - {"rotary_store_kv"}))
    assert selfcheck.check(backend, dtype, (4, 2, 64), []) == {}


def test_the_conformance_table_finds_nothing(backend: OnCPU) -> None:
    """A part of it; `make npu-check` has all."""

    def few(todo: Iterator[tuple[Case, list[Subject]]]) -> list[tuple[Case, list[Subject]]]:
        return [one for one in todo if one[0].dtype != torch.float32][::9]

    todo = few(
        chosen(
            [Subject("npu", backend)],
            ops=("attention", "decode_attention", "rotary_store_kv", "norm_moe_add"),
        )
    )
    assert len(todo) > 10
    assert [outcome.why for outcome in run(todo) if not outcome.finding.ok] == []


@pytest.mark.parametrize("model", ["plain", "gptq_int4_act_order", "gptq_int8", "ntk_logn", "qwen3_5_moe"])
def test_recorded_models_give_the_tokens_of_the_cpu(
    model: str, backend: OnCPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is the CPU's, or as likely there to within what float16 rounds."""
    monkeypatch.setattr(assembly, "_selfcheck", lambda *given: None)  # looked at above
    options = LoadOptions(max_model_len=256, dtype="float16")
    here = LLM(assembly.assemble(str(GOLDEN / model), options, Environment.read(), backend))
    prompts = [
        [5 + i % 101 for i in range(140)],
        list(range(40, 52)),
        [7],
    ]  # one longer than a block of the cache
    params = qwenrt.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with here, qwenrt.load(str(GOLDEN / model), max_model_len=256, device="cpu") as cpu:
        for prompt, answer in zip(
            prompts, here.generate(prompt_token_ids=prompts, sampling_params=params), strict=True
        ):
            logits = cpu.logits([*prompt, *answer.token_ids[:-1]])[len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            assert float((logits.amax(1) - chosen).max()) < 0.02
        served = {(binding.op, binding.native) for binding in backend.bindings}
    assert ("attention", True) in served and ("linear", False) not in served


def test_lengths_are_asked_of_the_device_only_where_nothing_is_captured() -> None:
    lengths, plan = fused.HostLengths(), DecodePlan(torch.tensor([3, 8]), torch.zeros(2, 1), torch.zeros(2))
    assert lengths.of(plan, 128) == [4, 9]
    lengths.capturing = True
    assert lengths.of(plan, 128) == [128, 128] and lengths.rows == 2
