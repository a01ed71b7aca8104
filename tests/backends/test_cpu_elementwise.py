"""Norm, silu, and rotary with its store in csrc/, against their definitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenrt.backends import selfcheck
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.backends.cpu import CPUBackend, backend, kernels
from qwenrt.ops import reference
from qwenrt.ops.steps import LayerKV, StepPlan
from tests.kernel_sets import SETS

CPU = torch.device("cpu")
DEFINED = Backend(CPU)
pytestmark = pytest.mark.skipif(
    isinstance(backend._load(), kernels.KernelsUnavailable), reason="csrc was not built"
)
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    rows=st.sampled_from([0, 1, 3, 50]),
    dim=st.sampled_from([1, 7, 8, 16, 31, 128, 2048]),
    size=st.sampled_from([1e-18, 1e-3, 1.0, 1e15]),
    isa=st.sampled_from(SETS),
)
def test_rms_norm(cpu: CPUBackend, rows: int, dim: int, size: float, isa: str) -> None:
    cpu.configure(isa)
    x, weight = torch.randn(rows, dim) * size, torch.randn(dim)
    got = cpu.rms_norm(x, weight, 1e-6)
    assert got.shape == x.shape
    assert torch.allclose(got, reference.rms_norm(x, weight, 1e-6), rtol=2e-6, atol=0)
    for i in range(rows):
        assert torch.equal(cpu.rms_norm(x[i : i + 1], weight, 1e-6), got[i : i + 1])


@quick
@given(
    tokens=st.sampled_from([0, 1, 3, 40]),
    inner=st.sampled_from([1, 7, 8, 100, 5504]),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    isa=st.sampled_from(SETS),
)
def test_silu_and_mul(cpu: CPUBackend, tokens: int, inner: int, size: float, isa: str) -> None:
    cpu.configure(isa)
    x = torch.randn(tokens, 2 * inner) * size
    got = cpu.silu_and_mul(x)
    assert torch.allclose(got, reference.silu_and_mul(x), rtol=2e-6, atol=1e-30)
    for i in range(tokens):
        assert torch.equal(cpu.silu_and_mul(x[i : i + 1]), got[i : i + 1])


@pytest.mark.parametrize("isa", SETS)
def test_what_is_not_finite_stays_so(cpu: CPUBackend, isa: str) -> None:
    cpu.configure(isa)
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([inf, -inf, nan, 100.0, -100.0, -0.0, 0.0, 1.0, nan])
    x = torch.cat((gate, torch.ones(9)))[None]
    got, wanted = cpu.silu_and_mul(x), reference.silu_and_mul(x)
    assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-30, equal_nan=True)
    for bad in (inf, nan):
        x = torch.ones(2, 64)
        x[1, 5] = bad
        got, wanted = cpu.rms_norm(x, torch.ones(64), 1e-6), reference.rms_norm(x, torch.ones(64), 1e-6)
        assert torch.allclose(got, wanted, equal_nan=True)


def kv_pair(
    cpu: CPUBackend, kv_heads: int, head_dim: int, quantized: bool, slots: int
) -> tuple[LayerKV, LayerKV]:
    """Two equal caches of blocks of 4 whose slots hold 7."""
    made = [cpu.alloc_kv(1, slots, 4, kv_heads, head_dim, torch.float32, quantized)[0] for _ in range(2)]
    for kv in made:
        for side in vars(kv).values():
            if side is not None:
                side.fill_(7)
    return made[0], made[1]


@quick
@given(
    tokens=st.sampled_from([0, 1, 2, 9]),
    heads=st.sampled_from([(1, 1, 8), (4, 2, 32), (6, 3, 40), (14, 2, 64), (16, 16, 128), (2, 1, 256)]),
    normed=st.booleans(),
    partial=st.booleans(),
    scaled=st.booleans(),
    cache=st.sampled_from(["none", "float", "int8", "fitted int8"]),
    isa=st.sampled_from(SETS),
)
def test_rotary_and_its_store(
    cpu: CPUBackend,
    tokens: int,
    heads: tuple[int, int, int],
    normed: bool,
    partial: bool,
    scaled: bool,
    cache: str,
    isa: str,
) -> None:
    cpu.configure(isa)
    num_heads, kv_heads, head_dim = heads
    qkv = torch.randn(tokens, (num_heads + 2 * kv_heads) * head_dim)
    norms = (torch.randn(head_dim), torch.randn(head_dim), 1e-6) if normed else None
    angles = torch.randn(tokens, head_dim // (4 if partial else 2)).repeat(1, 2)
    q_scale = torch.rand(tokens) + 1 if scaled else None
    slots = torch.randperm(4 * (tokens + 1))[:tokens]
    plan = StepPlan([tokens], [tokens], slots if cache != "none" else None, [list(range(tokens + 1))])
    ours, defined = kv_pair(cpu, kv_heads, head_dim, "int8" in cache, tokens + 1)
    if "fitted" in cache:
        fit = {
            "k_offset": torch.randn(kv_heads, head_dim),
            "k_factor": 2.0 ** -torch.rand(kv_heads, head_dim),
        }
        ours, defined = (dataclasses.replace(kv, **fit) for kv in (ours, defined))
    args = (qkv, heads, norms, angles.cos(), angles.sin(), q_scale)
    got = cpu.rotary_store_kv(*args, ours if cache != "none" else None, plan)
    wanted = DEFINED.rotary_store_kv(*args, defined if cache != "none" else None, plan)
    for x, y in zip(got, wanted, strict=True):
        assert x.shape == y.shape and torch.allclose(x, y, rtol=3e-6, atol=3e-6)
    for side, x in vars(ours).items():
        y = getattr(defined, side)
        if y is None:
            assert x is None
        elif y.dtype == torch.uint8:
            difference = (x.int() - y.int()).abs()
            assert int(difference.max()) <= 1 and float(difference.float().mean()) < 0.01
        else:
            assert torch.allclose(x, y, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("isa", SETS)
def test_int8_rows_that_are_constant_or_not_finite(cpu: CPUBackend, isa: str) -> None:
    cpu.configure(isa)
    qkv = torch.randn(1, 6, 16)
    qkv[0, 4] = -3.25  # of the first value head
    qkv[0, 5, 3] = float("inf")
    ours, _ = kv_pair(cpu, 2, 16, True, 1)
    plan = StepPlan([1], [1], torch.tensor([2]), [[0]])
    cpu.rotary_store_kv(
        qkv.view(1, -1), (2, 2, 16), None, torch.ones(1, 16), torch.zeros(1, 16), None, ours, plan
    )
    keys, values = reference.load_kv(ours, [0], 3, torch.float32)
    assert torch.allclose(keys[2], qkv[0, 2:4], atol=0.02)
    assert bool((values[2, 0] == -3.25).all()) and bool(values[2, 1].isnan().all())


def test_training_keeps_the_definition(cpu: CPUBackend) -> None:
    weight = torch.randn(16, requires_grad=True)
    x = torch.randn(2, 16)
    assert cpu.rms_norm(x, weight, 1e-6).requires_grad
    with torch.no_grad():
        assert not cpu.rms_norm(x, weight, 1e-6).requires_grad
    qkv = torch.randn(2, 64, requires_grad=True)
    q, k, v = cpu.rotary_store_kv(
        qkv, (2, 1, 16), None, torch.ones(2, 16), torch.zeros(2, 16), None, None, StepPlan([2], [2])
    )
    (q.sum() + k.sum() + v.sum() + cpu.silu_and_mul(qkv).sum()).backward()
    assert qkv.grad is not None and bool((qkv.grad != 0).all())


def test_a_wrong_kernel_is_found_at_load(cpu: CPUBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = (4, 2, 32)
    assert selfcheck.check(cpu, torch.float32, heads, []) == {}
    honest = kernels.Kernels.rotary_store
    wrong = lambda self, rotary, cache, tokens: honest(self, rotary, None, tokens)  # noqa: E731  stores nothing
    monkeypatch.setattr(kernels.Kernels, "rotary_store", wrong)
    assert list(selfcheck.check(cpu, torch.float32, heads, [])) == ["rotary_store_kv"]
    spec = OpSpec("rotary_store_kv", "layers.0", torch.float32, 32)
    assert "self-check" in str(cpu.why_not("rotary_store_kv", spec))
