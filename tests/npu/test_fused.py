"""Ops and whole models through the fused operators, as documentation defines these, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qwenrt
from qwenrt import assembly
from qwenrt.backends import selfcheck
from qwenrt.backends.ascend import calls, fused, older
from qwenrt.backends.ascend.backend import A2Backend, AscendBackend
from qwenrt.backends.ascend.older import A910Backend, P310Backend
from qwenrt.config import Environment
from qwenrt.conformance.case import Case
from qwenrt.conformance.run import chosen, run
from qwenrt.conformance.subjects import Subject
from qwenrt.llm import LLM
from qwenrt.load_options import LoadOptions
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, LayerKV, StepPlan
from tests.npu import declared
from tests.npu.operators import OPERATORS

FIA = "npu_fused_infer_attention_score"
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def backend() -> AscendBackend:
    return declared.backend(A2Backend, "A2")


FAMILIES = {"A2": A2Backend, "310P": P310Backend, "910A": A910Backend}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_self_check_finds_nothing(backend: AscendBackend, dtype: torch.dtype) -> None:
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


def test_the_conformance_table_finds_nothing(backend: AscendBackend) -> None:
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


@pytest.mark.parametrize("family", ["310P", "910A"])
def test_the_self_check_finds_nothing_on_older_ones(family: str) -> None:
    of_family = declared.backend(FAMILIES[family], family)
    linears = [(24, 256, 4, 128), (16, 128, 8, 128)]
    assert selfcheck.check(of_family, torch.float16, (4, 2, 128), linears, torch.float16) == {}
    assert (
        of_family.overrides("attention")
        and of_family.graphs() is None
        and of_family.default_dtype("bfloat16", 0, False) == torch.float16
    )
    packed = of_family.pack_linear(selfcheck.random_weight(24, 256, 4, 128), torch.float16)
    assert packed.kind == ("npu_int8" if family == "310P" else "dense")
    assert (of_family.dense_codes, of_family.least_bits) == ((False, 8) if family == "310P" else (True, 4))


def test_older_ones_attend_for_alike_neighbours_at_once() -> None:
    """And see nothing of what else is in their blocks."""
    source, half = torch.Generator().manual_seed(0), torch.float16
    kv = LayerKV(*(torch.full((24, 16, 2, 32), torch.nan, dtype=half) for _ in range(2)))
    q_lens, kv_lens = [1, 1, 0, 1, 3, 1, 1], [10, 12, 5, 200, 5, 7, 9]
    blocks = iter(range(1, 24))
    tables = [[next(blocks) for _ in range(-(-n // 16))] for n in kv_lens]
    for table, n in zip(tables, kv_lens, strict=True):
        for side in (kv.k, kv.v):
            flat = torch.randn(len(table) * 16, 2, 32, generator=source).to(half)
            flat[n:] = torch.nan
            side[table] = flat.view(-1, 16, 2, 32)
    plan = StepPlan(q_lens, kv_lens, None, tables)
    assert older._runs(plan, kv) == [[0, 1], [3], [4], [5, 6]]
    q = torch.randn(sum(q_lens), 4, 32, generator=source).to(half)
    for window in (0, 8):
        wanted = reference.attention(q, q, q, kv, plan, 0.2, window)
        assert selfcheck.relative(older.attention(q, kv, plan, 0.2, window), wanted) < 2e-3


@pytest.mark.parametrize(
    ("model", "family"),
    [
        *(
            ("plain", "A2"),
            ("int8 cache", "A2"),
            ("gptq_int4_act_order", "A2"),
            ("gptq_int8", "A2"),
            ("ntk_logn", "A2"),
            ("qwen3_5_moe", "A2"),
        ),
        *(("gptq_int4", "310P"), ("gptq_int4", "910A")),
    ],
)
def test_recorded_models_give_the_tokens_of_the_cpu(
    model: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is the CPU's, or as likely there to within what float16 rounds."""
    backend = declared.backend(FAMILIES[family], family)
    monkeypatch.setattr(type(backend), "memory", lambda self: (1 << 30, 1 << 31))
    monkeypatch.setattr(assembly, "_selfcheck", lambda *given: None)  # looked at above
    cache = "int8" if model == "int8 cache" else "auto"
    model = "plain" if cache == "int8" else model
    options = LoadOptions(max_model_len=256, dtype="float16", kv_cache_dtype=cache)
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
            assert float((logits.amax(1) - chosen).max()) < (0.02 if cache == "auto" else 0.1)
        served = {(binding.op, binding.native) for binding in backend.bindings}
    assert ("attention", True) in served and (("linear", True) in served) == (family != "910A")


def test_an_int8_cache_is_read_by_the_operator_or_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention over codes is wrong, that alone is not used."""
    backend = declared.backend(A2Backend, "A2")
    (kv,) = backend.alloc_kv(1, 2, 128, 2, 64, torch.bfloat16, True)
    assert kv.k.dtype == torch.int8 and [binding.native for binding in backend.bindings] == [True]
    assert backend.alloc_kv(1, 2, 128, 2, 80, torch.float16, True)[0].k.dtype == torch.uint8
    assert "no multiple of 32" in backend.bindings[-1].why
    right = OPERATORS[FIA]

    def offset_forgotten(*given: Any, **named: Any) -> Any:
        if named.get("key_antiquant_offset") is not None:
            named["key_antiquant_offset"] = torch.zeros_like(named["key_antiquant_offset"])
        return right(*given, **named)

    monkeypatch.setitem(OPERATORS, FIA, offset_forgotten)
    backend = declared.backend(A2Backend, "A2")
    assert backend.alloc_kv(1, 2, 128, 2, 64, torch.float16, True)[0].k.dtype == torch.uint8
    assert "differs from its definition" in backend.bindings[-1].why
    assert selfcheck.check(backend, torch.float16, (4, 2, 64), []) == {}
    backend.misfits[calls.INT8_CACHE] = "has no argument"
    assert backend.alloc_kv(1, 2, 128, 4, 64, torch.float16, True)[0].k.dtype == torch.uint8


def test_lengths_are_asked_of_the_device_only_where_nothing_is_captured() -> None:
    lengths, plan = fused.HostLengths(), DecodePlan(torch.tensor([3, 8]), torch.zeros(2, 1), torch.zeros(2))
    assert lengths.of(plan, 128) == [4, 9]
    lengths.capturing = True
    assert lengths.of(plan, 128) == [128, 128] and lengths.rows == 2
