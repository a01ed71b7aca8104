"""The definitions against formulas written out one element at a time, and the rules every op keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from qwenrt.backends.base import Backend
from qwenrt.ops import reference
from qwenrt.ops.quantization import quantize_dense
from qwenrt.ops.steps import DecodePlan, StepPlan
from qwenrt.ops.types import CanonicalWeight

CPU = Backend(torch.device("cpu"))


def test_rms_norm_rounds_before_the_weight() -> None:
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(64).bfloat16()
    x64 = x.double()
    normed = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normed.bfloat16() * weight
    assert torch.equal(reference.rms_norm(x, weight, 1e-6), expected)


def test_rotary_turns_pairs_of_halves() -> None:
    x = torch.randn(3, 2, 8)
    angles = torch.randn(3, 3)
    full = torch.cat((angles, angles), -1)
    y = reference.rotary(x, full.cos(), full.sin())
    for t in range(3):
        for h in range(2):
            for j in range(3):
                a, b, phi = x[t, h, j], x[t, h, j + 3], angles[t, j]
                assert y[t, h, j] == pytest.approx(float(a * phi.cos() - b * phi.sin()), abs=1e-6)
                assert y[t, h, j + 3] == pytest.approx(float(b * phi.cos() + a * phi.sin()), abs=1e-6)
    assert torch.equal(y[..., 6:], x[..., 6:])  # what is past rotary_dim passes through


def test_silu_is_on_the_first_half() -> None:
    x = torch.randn(4, 6)
    gate, up = x[:, :3], x[:, 3:]
    torch.testing.assert_close(reference.silu_and_mul(x), gate / (1 + (-gate).exp()) * up)


def test_the_gate_of_a_head_follows_its_query() -> None:
    heads, rows = (2, 1, 4), torch.randn(3, 6 * 4)
    qkv, gate = reference.split_gate(rows, heads)
    parts = rows.view(3, 6, 4)
    assert torch.equal(qkv.view(3, 4, 4), parts[:, [0, 2, 4, 5]]) and torch.equal(gate, parts[:, [1, 3]])
    attended = torch.randn(3, 2, 4)
    torch.testing.assert_close(reference.gate_output(attended, gate), attended / (1 + (-gate).exp()))


@pytest.mark.parametrize("window", [0, 5])
def test_keys_fitted_to_codes_give_the_same_attention(window: int) -> None:
    """Three queries to each key: of two heads of keys each channel has its own offset and factor."""
    q, k, v = torch.randn(9, 6, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    kv = CPU.alloc_kv(1, 1, 16, 2, 8, torch.float32, True)[0]
    kv.k_offset, kv.k_factor = torch.randn(2, 8) * 3, 2.0 ** torch.randint(-4, 1, (2, 8))
    fitted_q, fitted_k = reference.fit_to_codes(q, k, kv)
    for head in range(6):
        assert torch.equal(fitted_q[:, head], q[:, head] * kv.k_factor[head // 3])
    assert torch.equal(fitted_k[4, 1], (k[4, 1] - kv.k_offset[1]) / kv.k_factor[1])
    plan = StepPlan([9], [9])
    got = reference.attention(fitted_q, fitted_k, v, None, plan, 0.35, window)
    torch.testing.assert_close(got, reference.attention(q, k, v, None, plan, 0.35, window))


def test_what_is_fitted_to_codes_keeps_its_digits_in_16_bits() -> None:
    """What an offset leaves of a key is not rounded once more."""
    q, k = torch.randn(3, 2, 8).bfloat16(), (torch.randn(3, 1, 8) + 150).bfloat16()
    kv = CPU.alloc_kv(1, 1, 16, 1, 8, torch.bfloat16, True)[0]
    kv.k_offset, kv.k_factor = torch.full((1, 8), 150.123), 2.0 ** torch.randint(-4, 1, (1, 8))
    fitted_q, fitted_k = reference.fit_to_codes(q, k, kv)
    assert fitted_q.dtype == torch.bfloat16
    torch.testing.assert_close(fitted_k * kv.k_factor + kv.k_offset, k.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("op", ["rms_norm", "rotary", "silu", "linear", "attention", "store"])
def test_zero_tokens_in_zero_tokens_out(op: str) -> None:
    x = torch.empty(0, 2, 8)
    kv = CPU.alloc_kv(1, 2, 4, 2, 8, torch.float32, False)[0]
    plan = StepPlan([], [])
    if op == "rms_norm":
        assert reference.rms_norm(x, torch.ones(8), 1e-6).shape == x.shape
    elif op == "rotary":
        assert reference.rotary(x, torch.empty(0, 8), torch.empty(0, 8)).shape == x.shape
    elif op == "silu":
        assert reference.silu_and_mul(torch.empty(0, 8)).shape == (0, 4)
    elif op == "linear":
        packed = CPU.pack_linear(CanonicalWeight(dense=torch.randn(3, 8)), torch.float32)
        assert reference.linear(torch.empty(0, 8), packed).shape == (0, 3)
    elif op == "attention":
        assert reference.attention(x, x, x, kv, plan, 1.0).shape == x.shape
    else:
        reference.store_kv(x, x, kv, torch.empty(0, dtype=torch.int64))


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [n, H, hd], k, v [m, KVH, hd]: the formula, a query and a head at a time, in float64."""
    n, m, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    out = torch.empty_like(q, dtype=torch.float64)
    for j in range(n):
        sees = m - n + j + 1
        for h in range(q.shape[1]):
            scores = (k[:sees, h // groups].double() @ q[j, h].double()) * scale
            out[j, h] = scores.softmax(0) @ v[:sees, h // groups].double()
    return out


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    q_lens = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    kv_lens = [q + draw(st.integers(0, 20)) if q else 0 for q in q_lens]
    return q_lens, kv_lens, draw(st.sampled_from([1, 3, 16])), draw(st.sampled_from([1, 2]))


@settings(max_examples=40, deadline=None)
@given(batches(), st.booleans())
def test_paged_attention_is_the_formula(
    batch: tuple[list[int], list[int], int, int], quantized: bool
) -> None:
    q_lens, kv_lens, block_size, groups = batch
    torch.manual_seed(sum(kv_lens))
    heads, kv_heads, dim, scale = 2 * groups, 2, 16, 0.3
    kv = CPU.alloc_kv(1, 128, block_size, kv_heads, dim, torch.float32, quantized)[0]
    for side in (kv.k, kv.v):  # what an unused slot holds must not matter
        side.fill_(255 if quantized else math.nan)
    for zeros in (kv.k_scale, kv.k_zero, kv.v_scale, kv.v_zero):
        if zeros is not None:
            zeros.fill_(math.nan)
    free = torch.randperm(128).tolist()
    tables = [[free.pop() for _ in range(-(-length // block_size))] for length in kv_lens]
    kv_all = [(torch.randn(m, kv_heads, dim), torch.randn(m, kv_heads, dim)) for m in kv_lens]
    slots: list[int] = []
    for (keys, values), q_len, kv_len, table in zip(kv_all, q_lens, kv_lens, tables, strict=True):
        where = [table[p // block_size] * block_size + p % block_size for p in range(kv_len)]
        reference.store_kv(
            keys[: kv_len - q_len], values[: kv_len - q_len], kv, torch.tensor(where[: kv_len - q_len]).long()
        )
        slots += where[kv_len - q_len :]
    q = torch.randn(sum(q_lens), heads, dim)
    k = torch.cat([keys[len(keys) - n :] for (keys, _), n in zip(kv_all, q_lens, strict=True)])
    v = torch.cat([values[len(values) - n :] for (_, values), n in zip(kv_all, q_lens, strict=True)])
    plan = StepPlan(q_lens, kv_lens, CPU.send(slots), tables)
    assert plan.slots is not None
    reference.store_kv(k, v, kv, plan.slots)
    before = [x.clone() for x in (q, k, v)]
    out = reference.attention(q, k, v, kv, plan, scale)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    start = 0
    for (keys, values), q_len in zip(kv_all, q_lens, strict=True):
        expected = naive_attention(q[start : start + q_len], keys, values, scale)
        tolerance = 0.05 if quantized else 1e-5
        torch.testing.assert_close(out[start : start + q_len].double(), expected, atol=tolerance, rtol=0)
        start += q_len


def seed_scheme(x: torch.Tensor) -> torch.Tensor:
    """Qwen's published cache quantisation: one range per head over all tokens of a call, truncating."""
    high, low = x.amax((0, 2), keepdim=True), x.amin((0, 2), keepdim=True)
    scale = (high - low) / 255
    zero = -low / scale
    return scale * ((x / scale + zero).clamp(0, 255).to(torch.uint8).float() - zero)


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_the_int8_cache_is_closer_than_the_published_scheme(tokens: int, outlier: float) -> None:
    x = torch.randn(tokens, 4, 64)
    x[:, :, 3] *= outlier
    codes, scale, zero = reference.quantize_kv(x)
    ours = (reference.dequantize_kv(codes, scale, zero, torch.float32) - x).square().mean()
    assert ours < (seed_scheme(x) - x).square().mean()


@given(st.integers(0, 3))
@settings(deadline=None)
def test_the_int8_cache_errs_by_half_a_step_at_most(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(9, 2, 16) * 10 ** torch.randint(-3, 3, (9, 2, 1)).float()
    codes, scale, zero = reference.quantize_kv(x)
    error = (reference.dequantize_kv(codes, scale, zero, torch.float32) - x).abs().amax(-1)
    assert (error <= scale * 0.501 + 1e-6).all()


def test_the_int8_cache_holds_constants_exactly() -> None:
    x = torch.full((2, 1, 8), -3.25)
    back = reference.dequantize_kv(*reference.quantize_kv(x), torch.float32)
    assert torch.equal(back, x)


def test_a_plan_without_cache_is_differentiable() -> None:
    q = torch.randn(6, 2, 8, requires_grad=True)
    out = reference.attention(q, q, q, None, StepPlan([3, 3], [3, 3]), 0.5)
    ragged = reference.attention(q, q, q, None, StepPlan([2, 4], [2, 4]), 0.5)
    (out.sum() + ragged.sum()).backward()
    assert q.grad is not None and torch.isfinite(q.grad).all()
    torch.testing.assert_close(out[:3].double(), naive_attention(q[:3], q[:3], q[:3], 0.5))


def test_decoding_beside_a_long_row_takes_a_share_of_memory_at_a_time() -> None:
    """Rows of the table are as long as the longest sequence's: what is read of them at once must not be."""
    config = dict(num_blocks=512, block_size=16, num_kv_heads=2, head_dim=32)
    kv = CPU.alloc_kv(1, *config.values(), torch.bfloat16, False)[0]
    table, position = torch.zeros(8, 256, dtype=torch.int64), torch.tensor([4095] + [20] * 7)
    plan = DecodePlan(position, table, position)
    q = torch.randn(8, 4, 32).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        reference.decode_attention(q, kv, plan, 0.2)
    held = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    every = 8 * 4096 * 2 * 32 * 4  # float32 keys of all rows
    assert 0 < most < every, f"{most / 2**20:.1f} MiB"


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("inputs", [130, 160])
def test_what_lies_behind_a_row_does_not_matter(bits: int, inputs: int) -> None:
    """torch's product of bfloat16 reads past rows on some CPUs."""
    torch.manual_seed(bits)
    dense = torch.randn(24, inputs)
    weight = CanonicalWeight(dense=dense) if bits == 16 else quantize_dense(dense, bits, 32)
    packed = reference.pack(weight, torch.bfloat16, torch.device("cpu"))
    apart = torch.full((40, inputs + 38), math.nan, dtype=torch.bfloat16)
    x = apart[:, :inputs]
    x.copy_(torch.randn(40, inputs))
    assert torch.equal(reference.linear(x, packed), reference.linear(x.clone(), packed))
