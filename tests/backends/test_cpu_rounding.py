"""Dense weights rounded by csrc/: the bits of quantization.quantize_dense, on every instruction set."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.backends.cpu.backend import CPUBackend
from qwenrt.backends.cpu.kernels import Kernels, KernelsUnavailable
from qwenrt.backends.cpu.rounding import Rounding, quantize, same_bits
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.ops import quantization

try:
    KERNELS = Kernels()
except KernelsUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)


def _weights(rows: int, columns: int, spread: float, kinds: str, seed: int) -> torch.Tensor:
    """Random weights, where a letter of ``kinds`` names what a row is instead: z zeros, c constant, o one outlier,
    s values of all sizes, n none below zero."""
    source = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=source) * spread
    for row, kind in enumerate(kinds[:rows]):
        if kind == "z":
            w[row] = -0.0
        elif kind == "c":
            w[row] = -spread
        elif kind == "o":
            w[row, seed % columns] *= 1e3
        elif kind == "s":
            w[row] *= 10.0 ** torch.randint(-30, 1, (columns,), generator=source)
        elif kind == "n":
            w[row].abs_()
    return w


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([-1, 1, 7, 16, 31, 33, 64, 128]),
    sym=st.just(True),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    spread=st.sampled_from([1e-42, 1e-37, 1e-6, 0.02, 1.0, 1e4, 1e15]),
    kinds=st.text("rzcosn", max_size=8),
    isa=st.sampled_from(KERNELS.isas),
    seed=st.integers(0, 1000),
)
def test_codes_around_a_middle_zero_are_the_definitions(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    sym: bool,
    dtype: torch.dtype,
    spread: float,
    kinds: str,
    isa: str,
    seed: int,
) -> None:
    w = _weights(rows, columns, spread, kinds, seed).to(dtype)
    got = quantize(KERNELS.using(isa, 2), w, bits, group_size, None, "w", sym=sym)
    if not bool(torch.isfinite(w).all()):
        assert got is None
        return
    assert got is not None and got.in_features == columns and got.out_features == rows
    assert same_bits(got, quantization.quantize_dense(w, bits, group_size, sym=sym))


@pytest.mark.parametrize("isa", KERNELS.isas)
def test_sums_too_large_and_values_not_finite_are_refused_as_by_the_definition(isa: str) -> None:
    backend, its = CPUBackend(torch.device("cpu")), KERNELS.using(isa)
    backend.configure(isa)
    large = torch.full((40, 64), 1e10)
    large[33] = 3e38
    assert quantize(its, large, 4, 32, None, "w") is None
    with pytest.raises(CheckpointError, match="too large for float32 sums"):
        backend.quantize_dense(large, 4, 32, None, "w")
    for value in (float("nan"), float("inf"), -float("inf")):
        w = torch.ones(40, 64)
        w[39, 63] = value
        assert quantize(its, w, 8, 128, None, "w") is None
        with pytest.raises(CheckpointError, match=r"quantising o_proj of shape \[40, 64\]: 1 values are not"):
            backend.quantize_dense(w, 8, 128, None, "o_proj")
    with pytest.raises(ConfigError, match="to 3 bits: 4 and 8 are supported"):
        backend.quantize_dense(torch.ones(4, 8), 3, 128, None, "w")


def test_rows_shared_by_threads_and_rows_of_another_layout_come_out_the_same() -> None:
    w = _weights(333, 1111, 0.02, "zcos", 5)
    bias = torch.randn(333)
    got = CPUBackend(torch.device("cpu")).quantize_dense(w.t().contiguous().t(), 4, 128, bias, "w")
    assert got.words and got.bias is bias
    assert same_bits(got, quantization.quantize_dense(w, 4))
    wide = CPUBackend(torch.device("cpu")).quantize_dense(w.double(), 4, 128, None, "w")
    assert same_bits(wide, got)  # no kernel for float64: the definition serves


def test_a_kernel_that_rounds_otherwise_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = Kernels.quantize

    def wrong(self: Kernels, rounding: Rounding) -> bool:
        done = right(self, rounding)
        ctypes.c_uint8.from_address(rounding.words).value ^= 1
        return done

    monkeypatch.setattr(Kernels, "quantize", wrong)
    backend, w = CPUBackend(torch.device("cpu")), torch.randn(4, 64)
    got = backend.quantize_dense(w, 4, 32, None, "w")
    assert "differ from their definition's" in backend.demoted["quantize_dense"]
    assert "quantize_dense kernel of cpu is not used" in caplog.text
    assert not got.words and same_bits(got, quantization.quantize_dense(w, 4, 32))
