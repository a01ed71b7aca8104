"""What adapters add, against the formulas; and linears of quantised weights whose inputs get gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from qwenrt.ops import reference
from qwenrt.ops.lora import add_lora
from qwenrt.ops.quantization import quantize_dense
from qwenrt.ops.types import CanonicalWeight, LoraPair, LoraSpan


def pair(seed: int, rows: int = 10, inputs: int = 24, rank: int = 4, **more: object) -> LoraPair:
    gen = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inputs, generator=gen), torch.randn(rows, rank, generator=gen)
    return dataclasses.replace(LoraPair(a, b, 0.25), **more)  # type: ignore[arg-type]


def test_a_pair_changes_its_rows_of_its_tokens_alone() -> None:
    x, y = torch.randn(7, 24), torch.randn(7, 30)
    got = add_lora(y, x, [LoraSpan((pair(0, first=10),), 2, 5)])
    assert torch.equal(got[:2], y[:2]) and torch.equal(got[5:], y[5:])
    assert torch.equal(got[:, :10], y[:, :10]) and torch.equal(got[:, 20:], y[:, 20:])
    p = pair(0)
    torch.testing.assert_close(got[2:5, 10:20], y[2:5, 10:20] + 0.25 * x[2:5] @ p.a.t() @ p.b.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dora_scales_all_but_the_bias(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    w, c, x = torch.randn(10, 24), torch.randn(10), torch.randn(3, 24)
    m, added = torch.rand(10) + 0.5, torch.randn(10)
    p = pair(2, row_scale=m, bias=added)
    wanted = x @ (m[:, None] * (w + 0.25 * p.b @ p.a)).t() + c + added
    x, y = x.to(dtype), F.linear(x, w, c).to(dtype)
    got = add_lora(y, x, [LoraSpan((p,), 0, 3)], c)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(got.float(), wanted, rtol=tolerance / 5, atol=tolerance)


def test_a_bias_alone_has_rank_0() -> None:
    p = LoraPair(torch.zeros(0, 24), torch.zeros(10, 0), bias=torch.ones(10))
    y = torch.randn(2, 10)
    assert torch.equal(add_lora(y, torch.randn(2, 24), [LoraSpan((p,), 0, 2)]), y + 1)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 40])
def test_a_tokens_bits_do_not_depend_on_how_many_are_beside_it(count: int) -> None:
    x, y, p = torch.randn(64, 200), torch.randn(64, 300), pair(3, 300, 200, 16)
    with torch.no_grad():
        whole = add_lora(y, x, [LoraSpan((p,), 0, 64)])
        some = add_lora(y[:count], x[:count], [LoraSpan((p,), 0, count)])
    assert torch.equal(some, whole[:count])


@pytest.mark.parametrize("scales", [(0.25, 0.25, 0.25), (0.25, 2.0, 0.25)])
def test_a_tokens_bits_do_not_depend_on_the_adapters_beside_it(scales: tuple[float, ...]) -> None:
    """Few rows of adapters that are alike are one product, and those with the same pairs are computed together."""
    torch.manual_seed(5)
    x, y = torch.randn(60, 200), torch.randn(60, 300)
    adapters = [
        (pair(i, 100, 200, 16, scale=scale), pair(9 + i, 90, 200, 8, first=150))
        for i, scale in enumerate(scales)
    ]
    dora = (pair(3, 300, 200, 16, row_scale=torch.rand(300) + 0.5, bias=torch.randn(300)),)
    owners = [adapters[0], adapters[1], adapters[0], dora, adapters[2], adapters[0], adapters[1]]
    cuts = [0, 1, 4, 5, 7, 18, 30, 50]
    spans = [LoraSpan(*one) for one in zip(owners, cuts, cuts[1:], strict=False)]
    with torch.no_grad():
        got = add_lora(y, x, spans)
        for span in spans:
            here = slice(span.first, span.last)
            alone = LoraSpan(span.pairs, 0, span.last - span.first)
            assert torch.equal(got[here], add_lora(y[here], x[here], [alone]))
    assert torch.equal(got[50:], y[50:])
    torch.testing.assert_close(got, add_lora(y, x, spans), rtol=1e-4, atol=1e-4)  # with gradients: one by one


def test_dropout_hides_inputs_from_the_pair_alone() -> None:
    torch.manual_seed(0)
    x, y = torch.ones(1, 2000), torch.zeros(1, 1)
    p = LoraPair(torch.ones(1, 2000), torch.ones(1, 1), dropout=0.25)
    got = float(add_lora(y, x, [LoraSpan((p,), 0, 1)]))
    assert got != 2000 and abs(got - 2000) < 150


def canonical(bits: int, act_order: bool) -> CanonicalWeight:
    torch.manual_seed(4)
    w = quantize_dense(torch.randn(20, 48), bits, 16, torch.randn(20))
    return dataclasses.replace(w, perm=torch.randperm(48).int()) if act_order else w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_linear_passes_gradients_and_keeps_no_dense_weight(
    bits: int, act_order: bool, dtype: torch.dtype
) -> None:
    packed = reference.pack(canonical(bits, act_order), dtype, torch.device("cpu"))
    x, grad = torch.randn(6, 48).to(dtype).requires_grad_(), torch.randn(6, 20).to(dtype)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = reference.linear(x, packed)
    codes = {value.data_ptr() for value in packed.data.values() if isinstance(value, torch.Tensor)}
    assert all(t.data_ptr() in codes | {x.data_ptr()} for t in kept)
    dense = reference.linear(torch.eye(48, dtype=dtype), packed) - packed.bias
    dense.detach_()
    (got,) = torch.autograd.grad(y, x, grad)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y, x @ dense + packed.bias, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(got, grad @ dense.t(), rtol=tolerance, atol=10 * tolerance)
