"""GPTQ's solver against its algorithm written out column by column, and against rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenrt.config import QuantConfig
from qwenrt.ops.gptq import pack_gptq, unpack_gptq
from qwenrt.ops.weights import dequantize
from qwenrt.quantize.hessian import Hessian
from qwenrt.quantize.solver import ActOrder, Grid, relative_error, rounded, scales_of, solve

INPUTS, OUTPUTS = 96, 40


def problem(seed: int = 0, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, inputs of tokens that depend on each other, their Hessian)"""
    torch.manual_seed(seed)
    x = torch.randn(tokens, INPUTS) @ (torch.randn(INPUTS, INPUTS) / 10) + torch.randn(tokens, 1)
    return torch.randn(OUTPUTS, INPUTS) * 0.05, x, x.t() @ x


def naive(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, size: int) -> torch.Tensor:
    """Optimal brain quantisation in a fixed order: after each column all that follow move by the best update, each
    time from the inverse Hessian of what is left. Groups have scales of the original weights."""
    w = weight.double().clone()
    h = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(len(hessian)).double()
    scales, zeros = scales_of(weight, hessian.diagonal(), grid, size, -(-len(hessian) // size))
    made = torch.zeros_like(w)
    for k in range(len(h)):
        scale, zero = scales[k // size].double(), zeros[k // size].double()
        q = ((w[:, k] / scale).round() + zero).clamp(0, 2**grid.bits - 1)
        made[:, k] = scale * (q - zero)
        inverse = torch.linalg.inv(h[k:, k:])
        w[:, k:] -= torch.outer((w[:, k] - made[:, k]) / inverse[0, 0], inverse[0])
    return made.float()


@pytest.mark.parametrize("sym", [True, False])
def test_its_codes_are_those_of_the_algorithm(sym: bool) -> None:
    weight, _, hessian = problem()
    grid = Grid(4, 32, sym)
    order = torch.sort(hessian.diagonal(), descending=True, stable=True).indices
    weight, hessian = (
        weight[:, order].contiguous(),
        hessian[order][:, order],
    )  # so that "static" keeps the order
    found = solve(weight, hessian, grid, "static")
    assert found is not None
    made, expected = dequantize(found.weight, torch.float32), naive(weight, hessian, grid, 32)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["static", "full", "off"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 128, -1])
def test_it_is_nearer_than_rounding(order: ActOrder, bits: int, size: int) -> None:
    weight, _, hessian = problem(1)
    grid = Grid(bits, size)
    found = solve(weight, hessian, grid, order)
    assert found is not None
    by_rounding = relative_error(weight, dequantize(rounded(weight, grid), torch.float32), hessian)
    assert relative_error(weight, dequantize(found.weight, torch.float32), hessian) < 0.8 * by_rounding


@pytest.mark.parametrize("order", ["static", "full", "off"])
@pytest.mark.parametrize("sym", [True, False])
def test_a_file_holds_just_what_was_solved(order: ActOrder, sym: bool) -> None:
    weight, _, hessian = problem(2)
    found = solve(weight, hessian, Grid(4, 32, sym), order)
    assert found is not None
    packed = pack_gptq(found.weight)
    assert packed["scales"].dtype == torch.float16
    read = unpack_gptq(
        packed["qweight"], packed["qzeros"], packed["scales"], packed["g_idx"], None,
        quant=QuantConfig(4, 32, order == "full", sym), in_features=INPUTS, out_features=OUTPUTS, name="w",
    )  # fmt: skip
    assert torch.equal(dequantize(read, torch.float32), dequantize(found.weight, torch.float32))
    assert (packed["g_idx"] == torch.arange(INPUTS) // 32).all() == (order != "full")


def test_inputs_that_never_come_get_no_weights() -> None:
    weight, x, _ = problem(3)
    x[:, 5] = 0
    found = solve(weight, x.t() @ x, Grid(4, 32), "static")
    assert found is not None
    assert float(dequantize(found.weight, torch.float32)[:, 5].abs().max()) == 0


def test_a_hessian_without_a_factor_is_told() -> None:
    weight, _, hessian = problem(4)
    assert solve(weight, -hessian, Grid(4, 32), "static") is None


def test_massive_tokens_do_not_capture_the_hessian() -> None:
    """Tokens whose inputs are a thousand times all others' would have all codes; capped they have their share."""
    torch.manual_seed(5)
    weight, x = torch.randn(OUTPUTS, INPUTS) * 0.05, torch.randn(2000, INPUTS)
    massive = torch.randn(10, INPUTS)
    massive[:, :3] *= 1000
    both = torch.cat((x[:1000], massive, x[1000:]))
    usual = x.t() @ x
    grid = Grid(4, 32)

    def errors(cap: float) -> float:
        hessian = Hessian(INPUTS, cap)
        hessian.add(both)
        found = solve(weight, hessian.finished(), grid, "static")
        assert found is not None
        return relative_error(weight, dequantize(found.weight, torch.float32), usual)

    by_rounding = relative_error(weight, dequantize(rounded(weight, grid), torch.float32), usual)
    assert errors(4.0) < 1.05 * by_rounding < errors(0)


def test_tokens_are_added_in_whatever_pieces() -> None:
    torch.manual_seed(6)
    x = torch.randn(1500, INPUTS)
    whole, pieces = Hessian(INPUTS, cap=0), Hessian(INPUTS, cap=0)
    whole.add(x)
    for piece in x.split([1, 499, 700, 300]):
        pieces.add(piece)
    expected = x.t() @ x
    torch.testing.assert_close(whole.finished(), expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(pieces.finished(), expected, rtol=1e-4, atol=1e-2)
    assert whole.tokens == pieces.tokens == 1500


@pytest.mark.parametrize("order", ["static", "full", "off"])
@pytest.mark.parametrize("zeros", ["sym", "asym"])
def test_its_codes_are_autogptqs_where_nothing_is_improved(
    golden_dir: Path, zeros: str, order: ActOrder
) -> None:
    recorded = load_file(golden_dir / "gptq_solver" / "recorded.safetensors")
    grid = Grid(4, 128, zeros == "sym", clip=False, half=False)
    found = solve(recorded["weight"], recorded["hessian"], grid, order)
    assert found is not None and found.weight.codes is not None
    codes = found.weight.codes
    if found.weight.perm is not None:
        codes = torch.empty_like(codes).index_copy_(0, found.weight.perm.long(), codes)
    assert torch.equal(codes.t(), recorded[f"{zeros}.{order}.codes"])
