"""FP8 weights and their scales on disk, made dense or int8."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.config import QuantConfig
from qwenrt.errors import CheckpointError
from qwenrt.ops import fp8, quantization
from qwenrt.ops.weights import dequantize, merge
from tests.ops.quantised_checkpoints import Allocations, fp8_config, fp8_state

NAME = "layers.0.mlp.down_proj.weight"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CODES = [code for code in range(256) if code & 0x7F != 0x7F]


def as_fp8(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


def random_fp8(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Every code but the two of NaN is equally likely."""
    picks = torch.randint(0, len(CODES), (rows, columns), generator=torch.Generator().manual_seed(seed))
    return as_fp8(torch.tensor(CODES)[picks])


def value(code: int) -> float:
    """What eight bits s eeee mmm mean: (-1)^s 2^(e - 7) 1.mmm, and (-1)^s 2^-6 0.mmm where e is 0."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def by_definition(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """One number at a time: a float32 product, rounded once."""
    codes, factors = weight.view(torch.uint8).tolist(), scale.float().numpy()
    out = np.empty(weight.shape, dtype=np.float32)
    for n, row in enumerate(codes):
        for k, code in enumerate(row):
            out[n, k] = np.float32(value(code)) * factors[n // block[0], k // block[1]]
    return torch.from_numpy(out).to(dtype)


def random_scales(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=source) * 0.02 + 1e-4).to(dtype)


# ---- right files


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.sampled_from([(1, 1), (3, 5), (16, 16), (8, 64), (128, 128), (1, 16)]),
    stored=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_blocks_follow_the_definition_bit_for_bit(
    rows: int, columns: int, block: tuple[int, int], stored: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    weight = random_fp8(rows, columns, seed)
    scale = random_scales((-(-rows // block[0]), -(-columns // block[1])), stored, seed)
    dense = fp8.dequantize_fp8(weight, scale, block, dtype, name=NAME)
    assert dense.dtype == dtype
    assert torch.equal(dense, by_definition(weight, scale, block, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3.3e-7, 1e-30, 1e-40, 2.0**-149, 140.0])
def test_every_code_is_exact_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    weight, scales = as_fp8(torch.tensor([CODES])), torch.tensor([[scale]])
    wanted = by_definition(weight, scales, (128, 254), dtype)
    dense = fp8.dequantize_fp8(weight, scales, (128, 254), dtype)
    assert torch.equal(dense, wanted)
    assert torch.equal(dense.signbit(), wanted.signbit())


def test_the_largest_scales_that_fit() -> None:
    weight = as_fp8(torch.tensor([[0x7E, 0xFE, 1]]))
    for dtype in FLOATS:
        largest = torch.tensor([[min(torch.finfo(dtype).max / 448 * (1 - 1e-6), 7.59e35)]])
        dense = fp8.dequantize_fp8(weight, largest, dtype=dtype)
        assert bool(torch.isfinite(dense).all())
        assert torch.equal(dense, by_definition(weight, largest, (128, 128), dtype))


def test_row_blocks_that_cut_scale_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = random_fp8(50, 20), random_scales((8, 3), torch.float32, 1)
    whole = fp8.dequantize_fp8(weight, scale, (7, 8))
    monkeypatch.setattr(quantization, "_BLOCK_ELEMENTS", 100)
    assert torch.equal(fp8.dequantize_fp8(weight, scale, (7, 8)), whole)
    assert torch.equal(whole, by_definition(weight, scale, (7, 8), torch.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_scale_a_row_or_a_matrix(dtype: torch.dtype) -> None:
    weight = random_fp8(12, 20)
    rows = random_scales((12, 1), torch.bfloat16, 2)
    wanted = by_definition(weight, rows, (1, 20), dtype)
    for scale in (rows, rows[:, 0]):
        assert torch.equal(fp8.dequantize_fp8(weight, scale, None, dtype, name=NAME), wanted)
    one = torch.tensor(0.0123)
    wanted = by_definition(weight, one.view(1, 1), (12, 20), dtype)
    for scale in (one, one.view(1), one.view(1, 1)):
        assert torch.equal(fp8.dequantize_fp8(weight, scale, None, dtype), wanted)


def test_views_and_files_that_may_not_be_written_to() -> None:
    weight, scale = random_fp8(20, 12), random_scales((20, 1), torch.float32, 3)
    kept = weight.view(torch.uint8).clone()
    wanted = fp8.dequantize_fp8(weight, scale, None)
    turned = weight.view(torch.uint8).t().contiguous().t().view(torch.float8_e4m3fn)
    assert torch.equal(fp8.dequantize_fp8(turned, scale, None), wanted)
    fp8.fp8_to_int8(weight, scale, None)
    assert torch.equal(weight.view(torch.uint8), kept)


# ---- int8


def rounded(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what FP8 made of ``weight``, what int8 made of that, the relative norm of the difference)"""
    state, dense = fp8_state({"w.weight": weight}, ["w"], block)
    int8 = fp8.fp8_to_int8(state["w.weight"], state["w.weight_scale_inv"], block)
    assert (int8.bits, int8.group_size, int8.perm) == (8, block[1], None)
    values, back = dense["w.weight"], dequantize(int8, torch.float32)
    return values, back, (back - values).norm() / values.norm()


def test_the_error_that_int8_adds_is_what_the_docstring_says() -> None:
    w = torch.randn(256, 512) * 0.02
    values, _, added = rounded(w, (128, 128))
    assert 0.025 < float((values - w).norm() / w.norm()) < 0.028
    assert 0.005 < float(added) < 0.0065
    w = torch.distributions.StudentT(4.0).sample((256, 512)) * 0.02
    assert 0.007 < float(rounded(w, (128, 128))[2]) < 0.01


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 60),
    block=st.sampled_from([(4, 4), (16, 8), (128, 32), (128, 128)]),
    seed=st.integers(0, 1000),
)
def test_int8_is_within_a_step_of_the_fp8_values(
    rows: int, columns: int, block: tuple[int, int], seed: int
) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3
    values, back, _ = rounded(w, (block[0], min(block[1], columns)))
    for start in range(0, columns, block[1]):
        part = values[:, start : start + block[1]]
        step = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / 255
        error = (back[:, start : start + block[1]] - part).abs().amax(1)
        assert bool((error <= step * 1.1 + 1e-6).all())


def test_int8_without_blocks_keeps_its_bias_and_merges() -> None:
    parts = []
    for n in (8, 24):
        weight, scale = random_fp8(n, 300, n), random_scales((n, 1), torch.float32, n)
        parts.append(fp8.fp8_to_int8(weight, scale, None, torch.full((n,), float(n)), name=NAME))
        dense = fp8.dequantize_fp8(weight, scale, None, torch.float32)
        assert float((dequantize(parts[-1], torch.float32) - dense).norm() / dense.norm()) < 0.01
    merged = merge(parts)
    assert merged is not None and merged.bias is not None and merged.group_size == 128
    assert torch.equal(dequantize(merged), torch.cat([dequantize(part) for part in parts]))
    assert merged.bias.tolist() == [8.0] * 8 + [24.0] * 24


def test_int8_is_the_rounding_of_the_dense_matrix() -> None:
    weight, scale = random_fp8(16, 40), random_scales((2, 3), torch.float32, 4)
    here = fp8.fp8_to_int8(weight, scale, (8, 16))
    there = quantization.quantize_dense(fp8.dequantize_fp8(weight, scale, (8, 16), torch.float32), 8, 16)
    for kind in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(here, kind), getattr(there, kind))


def test_conversion_makes_nothing_larger_than_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_BLOCK_ELEMENTS", 1 << 12)
    weight, scale = random_fp8(512, 256), random_scales((4, 2), torch.float32, 5)
    with Allocations() as made:
        dense = fp8.dequantize_fp8(weight, scale)
    assert max(made.largest.values()) == dense.nbytes
    assert made.largest[torch.float32] == 4 << 12
    with Allocations() as made:
        codes = fp8.fp8_to_int8(weight, scale).codes
    assert codes is not None
    assert max(made.largest.values()) == codes.nbytes


def test_a_checkpoint_of_fp8_modules() -> None:
    dense = {"a.weight": torch.randn(24, 40), "a.bias": torch.randn(24), "norm.weight": torch.ones(40)}
    for block, kind, grid in (((16, 16), "weight_scale_inv", (2, 3)), (None, "weight_scale", (24, 1))):
        state, dequantised = fp8_state(dense, ["a"], block)
        assert state.keys() == dense.keys() | {f"a.{kind}"}
        weight, scale = state["a.weight"], state[f"a.{kind}"]
        assert scale.shape == grid and weight.dtype == torch.float8_e4m3fn
        assert torch.equal(
            by_definition(weight, scale, block or (1, 40), torch.float32), dequantised["a.weight"]
        )
        error = (dequantised["a.weight"] - dense["a.weight"]).norm() / dense["a.weight"].norm()
        assert float(error) < 0.04
        quant = QuantConfig.from_dict(fp8_config(block), "config.json")
        assert (quant.method, quant.block) == ("fp8", block)


# ---- files that are wrong


def with_codes(*codes: int) -> torch.Tensor:
    weight = random_fp8(20, 30).view(torch.uint8)
    weight.view(-1)[100 : 100 + len(codes)] = torch.tensor(codes, dtype=torch.uint8)
    return weight.view(torch.float8_e4m3fn)


def scales_with(*values: float) -> torch.Tensor:
    scale = torch.full((2, 2), 0.01)
    scale.view(-1)[: len(values)] = torch.tensor(values)
    return scale


DAMAGED = [
    ({"weight": with_codes(0x7F)}, "1 of 600 values are NaN"),
    ({"weight": with_codes(0xFF)}, "1 of 600 values are NaN"),
    ({"weight": with_codes(0xFF, 0x7F, 0xFF)}, "3 of 600 values are NaN"),
    ({"weight": random_fp8(20, 30).float()}, "weight has dtype float32, expected float8_e4m3fn"),
    ({"weight": random_fp8(20, 30).view(torch.uint8)}, "weight has dtype uint8"),
    ({"weight": torch.ones(20, 30).to(torch.float8_e5m2)}, "weight has dtype float8_e5m2"),
    ({"weight": random_fp8(20, 30).view(-1)}, "no matrix"),
    ({"weight": random_fp8(20, 30)[:0]}, r"\[0, 30\].*no matrix"),
    ({"scale": scales_with(0.0)}, "of 4 scales 1 are zero and 0 negative"),
    ({"scale": scales_with(0.0, -1.0, -0.5)}, "of 4 scales 1 are zero and 2 negative"),
    ({"scale": scales_with(float("nan"), float("inf"))}, "2 of 4 values of scale are not finite"),
    ({"scale": torch.ones(2, 2, dtype=torch.int32)}, "scale has dtype int32, expected float16 or"),
    ({"scale": scales_with(1e36)}, r"scales up to 1.0e\+36 make values that do not fit"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGED)
def test_damaged_tensors_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    given_tensors = {"weight": with_codes(), "scale": scales_with()} | changes
    for read in (fp8.dequantize_fp8, fp8.fp8_to_int8):
        with pytest.raises(CheckpointError, match=message) as error:
            read(given_tensors["weight"], given_tensors["scale"], (16, 16), name=NAME)
        assert NAME in str(error.value) and error.value.remedy


@pytest.mark.parametrize(
    ("scale", "block", "message"),
    [
        (torch.ones(2, 3), (16, 16), r"\[16, 16\]: scale has shape \[2, 3\], expected \[2, 2\].*block size"),
        (torch.ones(4), (16, 16), r"scale has shape \[4\]"),
        (torch.ones(1), (16, 16), r"scale has shape \[1\]"),
        (torch.ones(2, 2), (0, 16), r"\[0, 16\]: a block has no elements"),
        (torch.ones(2, 2), (16, -1), "a block has no elements"),
        (torch.ones(2, 2), (128, 128), r"expected \[1, 1\]"),
        (torch.ones(30), None, r"scale has shape \[30\], expected \[20, 1\]"),
        (torch.ones(1, 20), None, r"scale has shape \[1, 20\]"),
        (torch.ones(0), None, r"scale has shape \[0\]"),
        (torch.ones(1, 1, 1), None, r"expected \[1, 1\]"),
        (-torch.ones(20), None, "0 are zero and 20 negative"),
    ],
)
def test_scales_that_do_not_fit_the_matrix(
    scale: torch.Tensor, block: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        fp8.fp8_to_int8(with_codes(), scale, block)
    with pytest.raises(CheckpointError, match=message):
        fp8.dequantize_fp8(with_codes(), scale, block)


def test_scales_too_large_for_float16_only() -> None:
    scale = scales_with(147.0)
    assert bool(torch.isfinite(fp8.dequantize_fp8(with_codes(), scale, (16, 16))).all())
    with pytest.raises(CheckpointError, match=r"1\.5e\+02 make values that do not fit in float16.*bfloat16"):
        fp8.dequantize_fp8(with_codes(), scale, (16, 16), torch.float16)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_tensors_are_read_or_refused(data: st.DataObject) -> None:
    """Any bytes, shapes and scales: finite values of the right shape or CheckpointError, nothing else."""
    size = st.integers(0, 6)
    rows, columns = data.draw(size), data.draw(size)
    bytes_ = data.draw(st.lists(st.integers(0, 255), min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(bytes_, dtype=torch.uint8).view(rows, columns).view(torch.float8_e4m3fn)
    block = data.draw(st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4)))
    if data.draw(st.booleans()) and block is not None and min(block) > 0:
        shape = [-(-rows // block[0]), -(-columns // block[1])]
    else:
        shape = data.draw(st.lists(size, max_size=3))
    scale = torch.full(shape, data.draw(st.floats(width=32)))
    try:
        dense = fp8.dequantize_fp8(weight, scale, block)
    except CheckpointError:
        return
    assert dense.shape == weight.shape and bool(torch.isfinite(dense).all())
