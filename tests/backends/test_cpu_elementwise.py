"""Norm, silu, and rotary with its store in csrc/, where qwenrt.conformance does not look."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenrt.backends.cpu import CPUBackend
from qwenrt.ops import reference
from qwenrt.ops.steps import LayerKV, StepPlan
from tests.kernel_sets import SETS, needs_kernels

CPU = torch.device("cpu")
pytestmark = needs_kernels
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    rows=st.sampled_from([0, 1, 3, 50]),
    dim=st.sampled_from([1, 7, 8, 16, 31, 128, 2048]),
    size=st.sampled_from([1e-18, 1e-3, 1.0, 1e15]),
    isa=st.sampled_from(SETS),
)
def test_a_norm_is_the_same_bits_in_every_batch(
    cpu: CPUBackend, rows: int, dim: int, size: float, isa: str
) -> None:
    cpu.configure(isa)
    x, weight = torch.randn(rows, dim) * size, torch.randn(dim)
    got = cpu.rms_norm(x, weight, 1e-6)
    for i in range(rows):
        assert torch.equal(cpu.rms_norm(x[i : i + 1], weight, 1e-6), got[i : i + 1])


@quick
@given(
    tokens=st.sampled_from([0, 1, 3, 40]),
    inner=st.sampled_from([1, 7, 8, 100, 5504]),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    isa=st.sampled_from(SETS),
)
def test_silu_is_the_same_bits_in_every_batch(
    cpu: CPUBackend, tokens: int, inner: int, size: float, isa: str
) -> None:
    cpu.configure(isa)
    x = torch.randn(tokens, 2 * inner) * size
    got = cpu.silu_and_mul(x)
    for i in range(tokens):
        assert torch.equal(cpu.silu_and_mul(x[i : i + 1]), got[i : i + 1])


@quick
@given(tokens=st.sampled_from([0, 1, 30]), dim=st.sampled_from([1, 7, 8, 128]), isa=st.sampled_from(SETS))
def test_gates_between_queries_are_the_same_bits_in_every_batch(
    cpu: CPUBackend, tokens: int, dim: int, isa: str
) -> None:
    cpu.configure(isa)
    x, gates = torch.randn(tokens, 3, dim), 20 * torch.randn(tokens, 3, 2, dim)[:, :, 1]
    got = cpu.gate_output(x, gates)
    torch.testing.assert_close(got, reference.gate_output(x, gates), atol=1e-6, rtol=1e-6)
    for i in range(tokens):
        assert torch.equal(cpu.gate_output(x[i : i + 1], gates[i : i + 1].contiguous()), got[i : i + 1])


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
