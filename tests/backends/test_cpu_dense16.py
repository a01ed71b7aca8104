"""Linears with 16-bit weights: against float64, whatever the shape, and the same bits for any number of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernel_sets import KERNELS, SETS, needs_kernels

pytestmark = [
    needs_kernels,
    pytest.mark.parametrize("isa", SETS),
]
# Largest error, as a share of sum |x| |W|, that float32 sums in any order may have.
EXACT = 2e-6
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 25, 31, 64)  # both sides of where another kernel takes over
SHAPES = ((3, 7), (17, 9), (130, 515), (40, 2051))
DTYPES = (torch.bfloat16, torch.float16)


def linear(
    x: torch.Tensor, weight: torch.Tensor, isa: str, bias: torch.Tensor | None = None, threads: int = 2
) -> torch.Tensor:
    assert KERNELS is not None
    return KERNELS.using(isa, threads).dense16_linear(x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_near_float64_and_the_same_for_all_threads(
    shape: tuple[int, int], dtype: torch.dtype, isa: str
) -> None:
    n, k = shape
    torch.manual_seed(n)
    for tokens in TOKENS:
        x, weight, bias = torch.randn(tokens, k), torch.randn(n, k).to(dtype), torch.randn(n)
        if tokens % 2:  # nothing cancels: what was rounded away shows
            x, weight = x.abs(), weight.abs()
        y = linear(x, weight, isa, bias)
        wanted = x.double() @ weight.double().t() + bias
        size = x.double().abs() @ weight.double().abs().t() + bias.abs()
        assert ((y - wanted).abs() <= EXACT * size).all(), f"{tokens} tokens"
        for threads in (1, 3):
            same = torch.equal(linear(x, weight, isa, bias, threads), y)
            assert same, f"{tokens} tokens, {threads} threads"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (1, 3, 8, 30))
def test_what_is_not_finite_goes_where_torch_sends_it(tokens: int, dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(tokens, 77), torch.randn(45, 77).to(dtype)
    weight[3, 70], weight[20, 5], weight[44, 76] = torch.inf, torch.nan, -torch.inf
    x[tokens - 1, 11] = torch.inf
    got, wanted = linear(x, weight, isa), F.linear(x, weight.float())
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got[got.isinf()], wanted[wanted.isinf()])
    assert torch.equal(got.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("tokens", (1, 4, 30))
def test_subnormal_float16_weights_count(tokens: int, isa: str) -> None:
    bits = torch.arange(1, 1 + 24 * 40, dtype=torch.int16).reshape(24, 40)  # below 2^-14 all
    weight = bits.view(torch.float16)
    y = linear(torch.ones(tokens, 40), weight, isa)
    assert torch.equal(y, weight.double().sum(1).float().expand(tokens, -1))
