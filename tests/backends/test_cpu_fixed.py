"""16-bit weights beside many tokens in fixed point: against its definition and against what it stands in for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenrt.backends.base import Backend
from qwenrt.backends.cpu import CPUBackend, activations, dense12, kernels
from qwenrt.config import Environment
from qwenrt.load_options import LoadOptions
from qwenrt.loading import load_with
from qwenrt.ops.types import CanonicalWeight
from tests.kernel_sets import KERNELS

pytestmark = [
    pytest.mark.skipif(
        KERNELS is None or "avx2" not in KERNELS.isas,
        reason="AVX2's kernels alone have fixed point",
    ),
]
SLAB, BLOCK, PANEL, LIMIT, FROM = 256, 32, 16, 8191.0, 32  # FROM: tokens from which on it serves
EXACT = 2e-6  # as test_cpu_dense16.py
DTYPES = (torch.bfloat16, torch.float16)


def avx2(threads: int = 2) -> kernels.Kernels:
    assert KERNELS is not None
    return KERNELS.using("avx2", threads)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, rounded: bool = True
) -> torch.Tensor:
    return avx2().dense16_linear(x, weight, bias, rounded)


def in_steps(values: torch.Tensor) -> torch.Tensor:
    """Rows rounded to steps of an 8191th of each one's largest value, in float64."""
    largest = values.abs().amax(-1, keepdim=True)
    some = largest > 0
    limit = torch.full_like(largest, LIMIT)  # a number divided by a tensor is its reciprocal, rounded twice
    q = (values * (limit / largest.masked_fill(~some, 1.0))).round()
    return torch.where(some, q.double() * (largest / LIMIT).double(), 0.0)


def few(sizes: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    """Rows of which fewer than a quarter, zeros aside, are below their ``far``."""
    return ((sizes > 0) & (sizes < far)).sum(-1) * 4 < sizes.shape[-1]


def fixed_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: slabs of 256 inputs, of which a row's weights share a scale, and 32 activations of a
    token. Left as they are: a slab that does not end with a block; one where a token has a value of more than 64 times
    its mean with a quarter of the block more than 128 times smaller; 16 rows with such a row of weights."""
    outlier, w = x.abs().mean(1) * 64, weight.float()
    y = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for k in range(0, x.shape[1], SLAB):
        xs, ws = x[:, k : k + SLAB], w[:, k : k + SLAB]
        fits = xs.shape[1] % BLOCK == 0
        if fits:
            blocks = xs.reshape(len(x), -1, BLOCK)
            largest = blocks.abs().amax(-1, keepdim=True)
            fits = bool(((largest[..., 0] <= outlier[:, None]) | few(blocks.abs(), largest / 128)).all())
        for n in range(0, len(w), PANEL):
            rows = ws[n : n + PANEL]
            if fits and bool(few(rows.abs(), rows.abs().amax(-1, keepdim=True) / 128).all()):
                y[:, n : n + PANEL] += in_steps(blocks).reshape(len(x), -1) @ in_steps(rows).t()
            else:
                y[:, n : n + PANEL] += xs.double() @ rows.double().t()
    return y


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70),
    k=st.sampled_from([1, 32, 100, 256, 288, 300, 512, 544, 1024]),
    tokens=st.sampled_from([FROM, 33, 50, 517]),
    dtype=st.sampled_from(DTYPES),
    outliers=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_any_shape_follows_the_definition(
    n: int, k: int, tokens: int, dtype: torch.dtype, outliers: tuple[bool, bool], seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(tokens, k), torch.randn(n, k).to(dtype), torch.randn(n)
    if outliers[0]:
        x[:: tokens // 3, k // 2] *= 3000
    if outliers[1]:
        weight[::20, k // 3] *= 1000
    x[tokens // 2, : k // 2] = 0
    wanted = fixed_linear(x, weight)
    size = x.double().abs() @ weight.double().abs().t() + 1e-9
    assert float(((linear(x, weight).double() - wanted).abs() / size).max()) < EXACT
    assert (
        float(((linear(x, weight, bias) - bias.double() - wanted).abs() / (size + bias.abs())).max()) < EXACT
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_nearer_than_activations_in_float16(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 2048), torch.randn(96, 2048).to(dtype)
    wanted = x.double() @ weight.double().t()
    halves = x.half().double() @ weight.double().t()
    errors = [float((y - wanted).norm() / wanted.norm()) for y in (linear(x, weight).double(), halves)]
    assert 2e-5 < errors[0] < errors[1] < 3e-4


def test_few_tokens_and_exact_ones_are_not_rounded() -> None:
    x, weight = torch.randn(64, 512), torch.randn(48, 512).bfloat16()
    exact = linear(x, weight, rounded=False)
    assert not torch.equal(linear(x, weight), exact)
    few_of_them = linear(x[: FROM - 1], weight, rounded=False)
    assert torch.equal(linear(x[: FROM - 1], weight), few_of_them)


def test_outliers_and_large_weights_cost_the_others_nothing() -> None:
    """Each is made up for on the other side: what rounding makes of those beside it would show."""
    torch.manual_seed(0)
    for side in range(2):
        x, weight = torch.randn(40, 1024), torch.randn(32, 1024).bfloat16()
        (x, weight)[side][:, 300] *= 4096
        (x, weight)[1 - side][:, 300] /= 4096
        wanted = x.double() @ weight.double().t()
        assert float((linear(x, weight).double() - wanted).norm() / wanted.norm()) < 3e-4


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30, 3e38])
def test_what_has_no_steps_is_as_without_rounding(value: float) -> None:
    x, weight = torch.rand(40, 544), torch.rand(40, 544).bfloat16()
    for side, at in ((x, (7, 300)), (weight, (20, 400))):
        kept = side[at].clone()
        side[at] = value
        got, exact = linear(x, weight), linear(x, weight, rounded=False)
        assert torch.allclose(got, exact, rtol=1e-3, equal_nan=True)
        side[at] = kept
    zeros = torch.zeros(40, 544)
    assert not linear(zeros, weight).any() and not linear(x, torch.zeros_like(weight)).any()
    for tiny in (1e-45, 1e-38, 1e-31):
        assert linear(torch.full_like(x, tiny), weight).abs().max() <= 544 * 1.01 * tiny


def test_no_sum_overflows() -> None:
    for sign in (1.0, -1.0):
        x, weight = torch.full((40, 512), 1e6 * sign), torch.full((20, 512), -2.0).bfloat16()
        assert torch.allclose(linear(x, weight), torch.full((40, 20), -1024e6 * sign), rtol=1e-6)


def test_12_bits_threads_and_cuts_change_no_bit() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(600, 1056), torch.randn(100, 1056).bfloat16(), torch.randn(100)
    y = linear(x, weight, bias)
    packed = dense12.pack(avx2(), weight, bias)
    assert packed is not None
    for threads in (1, 2, 3):
        assert torch.equal(avx2(threads).dense16_linear(x, weight, bias, True), y)
        assert torch.equal(avx2(threads).dense12_linear(x, packed, True), y)
    for tokens in (FROM, 100, 513):
        assert torch.equal(linear(x[:tokens], weight, bias), y[:tokens])


def test_large_linears_are_rounded_unless_exact_is_asked_for(cpu: CPUBackend) -> None:
    x = torch.randn(40, 1024)
    weights = {rows: CanonicalWeight(dense=torch.randn(rows, 1024).bfloat16()) for rows in (1024, 1023)}
    for choice, rounded in (("exact", set()), ("auto", {1024}), ("int16", {1024}), ("int8", {1024})):
        cpu.configure("avx2", num_threads=2, activations=choice)
        for rows, weight in weights.items():
            w = cpu.pack_linear(weight, torch.float32)
            assert weight.dense is not None
            assert torch.equal(cpu.linear(x, w), linear(x, weight.dense, rounded=rows in rounded))
            assert cpu.activations_of(w) == ("int16" if rows in rounded else "")


def test_the_one_call_rounds_as_single_linears_do(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(40, 90))

    def logits(choice: str) -> torch.Tensor:
        options = LoadOptions(device="cpu", dtype="float32", activations=choice, progress=False)
        with load_with("demo", options, Environment.read({"QWENRT_KERNELS": "avx2"})) as llm:
            return llm.logits(ids)

    exact = logits("exact")
    assert torch.equal(logits("int16"), exact)  # all its linears are small
    monkeypatch.setattr(activations, "_LARGE", 1)
    whole = logits("int16")
    assert not torch.equal(whole, exact) and torch.allclose(whole, exact, atol=2e-2)
    monkeypatch.setattr(CPUBackend, "stacks", Backend.stacks)
    assert torch.allclose(logits("int16"), whole, atol=1e-3)
