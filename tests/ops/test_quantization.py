"""The canonical form: merging weights, and rounding a dense matrix to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.ops import quantization
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize, merge

# ---- merging


def test_merge_keeps_every_row_in_turn() -> None:
    parts = [
        quantization.quantize_dense(torch.randn(n, 48), 8, 32, bias=b)
        for n, b in ((3, None), (5, torch.ones(5)))
    ]
    merged = merge(parts)
    assert merged is not None
    assert torch.equal(dequantize(merged), torch.cat([dequantize(part) for part in parts]))
    assert merged.bias is not None and merged.bias.tolist() == [0] * 3 + [1] * 5
    dense = merge([CanonicalWeight(dense=torch.ones(2, 4)), CanonicalWeight(dense=torch.zeros(1, 4))])
    assert dense is not None and dense.dense is not None and dense.dense.sum(1).tolist() == [4, 4, 0]
    assert dense.bias is None
    assert merge(parts[:1]) is parts[0]


def test_weights_of_different_forms_are_not_merged() -> None:
    base = quantization.quantize_dense(torch.randn(4, 32), 4, 16)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    for other in (
        quantization.quantize_dense(torch.randn(4, 32), 8, 16),
        quantization.quantize_dense(torch.randn(4, 32), 4, 8),
        CanonicalWeight(dense=torch.randn(4, 32)),
        dataclasses.replace(base, perm=order),
    ):
        assert merge([base, other]) is None
    shuffled = dataclasses.replace(base, perm=order)
    assert merge([shuffled, dataclasses.replace(base, perm=order.flip(0))]) is None
    assert merge([shuffled, dataclasses.replace(base, perm=order.clone())]) is not None


# ---- rounding a dense matrix


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([-1, 1, 7, 16, 128]),
    sym=st.booleans(),
    spread=st.sampled_from([1e-6, 0.02, 1.0, 3e4]),
    seed=st.integers(0, 1000),
)
def test_rounding_errs_by_no_more_than_plain_rounding(
    rows: int, columns: int, bits: int, group_size: int, sym: bool, spread: float, seed: int
) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread
    weight = quantization.quantize_dense(w, bits, group_size, sym=sym)
    assert weight.codes is not None and weight.scales is not None and weight.zeros is not None
    assert int(weight.codes.max()) < 2**bits
    assert int(weight.zeros.min()) >= 1 and int(weight.zeros.max()) < 2**bits
    if sym:
        assert bool((weight.zeros == 2 ** (bits - 1)).all())
    size = columns if group_size == -1 else min(group_size, columns)
    assert weight.scales.shape == (-(-columns // size), rows)
    plain = torch.empty_like(w)
    for start in range(0, columns, size):
        part = w[:, start : start + size]
        high, low = part.amax(1).clamp(min=0), part.amin(1).clamp(max=0)
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        step = (high - low) / (2**bits - 1)
        step = torch.where(step > 0, step, torch.ones_like(step))[:, None]
        zero = torch.full_like(step, 2 ** (bits - 1)) if sym else (-low[:, None] / step).round().clamp(min=1)
        plain[:, start : start + size] = step * ((part / step + zero).round().clamp(0, 2**bits - 1) - zero)
    error = (dequantize(weight, torch.float64) - w).square().sum().sqrt()
    inside = 0 if sym or bits == 8 else 2.0**-7  # a scale's last bits may be its zero
    allowed = (plain.double() - w).square().sum().sqrt() * 1.01 + (1e-3 + inside) * w.double().norm()
    assert error <= allowed


def test_zeros_lie_in_the_last_bits_of_scales_where_that_costs_nothing() -> None:
    w = torch.randn(64, 320, generator=torch.Generator().manual_seed(0)) * 0.02
    weight = quantization.quantize_dense(w, 4, 32)
    assert weight.scales is not None and weight.zeros is not None
    assert weight.scales.dtype == torch.float16 and len(weight.zeros.unique()) > 6
    assert torch.equal(weight.scales.view(torch.int16) & 15, weight.zeros)
    assert quantization.zeros_in_scales(weight.scales, weight.zeros)
    best = quantization.quantize_rows(
        lambda part: w[part] * 1e-9, (64, 320), 4, 32, None, sym=False, name="w"
    )
    assert best.scales is not None and best.scales.dtype == torch.float32, "too small for float16"
    error, least = (
        float((dequantize(each, torch.float32) / size - w).square().sum())
        for each, size in ((weight, 1.0), (best, 1e-9))
    )
    assert error < 1.005 * least
    one_zero = quantization.quantize_dense(w, 4, 32, sym=True)
    assert one_zero.scales is not None and one_zero.zeros is not None
    assert not quantization.zeros_in_scales(one_zero.scales, one_zero.zeros), (
        "where all are 8 they take no room"
    )


@settings(deadline=None, max_examples=60)
@given(
    patterns=st.lists(st.integers(1, 0x7BFF), min_size=2, max_size=40),
    seed=st.integers(0, 1000),
)
def test_a_scale_that_takes_its_zero_moves_by_less_than_a_hundredth(patterns: list[int], seed: int) -> None:
    """Every positive float16: the smallest and the largest are left as they are, with all others of their weight."""
    scales = torch.tensor([patterns], dtype=torch.int16).view(torch.float16)
    zeros = torch.randint(
        1, 16, scales.shape, dtype=torch.int16, generator=torch.Generator().manual_seed(seed)
    )
    got = quantization.narrow_scales(scales.float(), zeros, 4)
    assert got.dtype == torch.float16 and bool(torch.isfinite(got).all())
    assert bool(((got.float() - scales.float()).abs() <= scales.float() * 2.0**-7).all())
    if min(patterns) >= 1024 and max(patterns) < 0x7BF0 and len(zeros.unique()) > 1:
        assert quantization.zeros_in_scales(got, zeros)
    assert torch.equal(quantization.narrow_scales(scales.float(), zeros, 8), scales)


def test_rounding_of_gaussian_weights_is_as_good_as_it_should_be() -> None:
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)) * 0.02

    def error(bits: int, sym: bool) -> float:
        back = dequantize(quantization.quantize_dense(w, bits, sym=sym), torch.float32)
        return float((back - w).norm() / w.norm())

    assert error(4, False) < 0.097 and error(4, True) < 0.104
    assert error(8, False) < 0.0061 and error(8, True) < 0.0068


def test_zeros_tiny_and_constant_weights_survive() -> None:
    w = torch.zeros(3, 32)
    w[1] = 0.5
    w[2, 5] = 1e-30
    for bits in (4, 8):
        for sym in (False, True):
            back = dequantize(quantization.quantize_dense(w, bits, 16, sym=sym), torch.float32)
            assert float(back[0].abs().max()) == 0
            assert torch.allclose(back[1], w[1], rtol=0.08 if bits == 4 else 0.005)
            assert bool(torch.isfinite(back).all()) and float(back[2].abs().max()) < 1.2e-30


def test_weights_that_cannot_be_rounded_are_refused() -> None:
    w = torch.ones(4, 8)
    w[1, 2] = float("inf")
    w[3, 3] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"quantising o_proj of shape \[4, 8\]: 2 values are not finite"
    ):
        quantization.quantize_dense(w, 4, name="o_proj")
    with pytest.raises(CheckpointError, match="too large for float32 sums"):
        quantization.quantize_dense(torch.full((4, 8), 3e38), 4)
    with pytest.raises(ConfigError, match="to 3 bits: 4 and 8 are supported"):
        quantization.quantize_dense(torch.ones(4, 8), 3)
    with pytest.raises(ConfigError, match="group_size 0"):
        quantization.quantize_dense(torch.ones(4, 8), 4, 0)


def test_the_result_does_not_depend_on_the_input_dtype_or_blocks() -> None:
    w = torch.randn(70, 4096).to(torch.bfloat16)  # several blocks of rows
    weight, same = quantization.quantize_dense(w, 4), quantization.quantize_dense(w.float(), 4)
    assert weight.codes is not None and same.codes is not None and torch.equal(weight.codes, same.codes)
    last = quantization.quantize_dense(w[-1:], 4)
    assert last.codes is not None and torch.equal(last.codes[:, 0], weight.codes[:, -1])
