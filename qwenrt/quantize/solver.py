"""GPTQ: a matrix rounded column by column, each column's error made up for by the columns after it.

After "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar et al., 2022,
algorithm 1), with the scales rounded to what files hold before anything is rounded with them, and with the groups'
scales from the original weights where the order of the columns is not that of the groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from qwenrt.ops.quantization import CLIPS, groups_of
from qwenrt.ops.types import CanonicalWeight

ActOrder = Literal["static", "full", "off"]
_BLOCK = 128  # columns after which the rest of the matrix is brought up to date
_MAX_DAMP = 0.1
_EXACT_INPUTS = 2048  # up to so many inputs the factor is computed in float64
_LEAST_SCALE = 2.0**-14  # the least normal float16


@dataclass(frozen=True)
class Grid:
    """The numbers that weights may become: codes of ``bits`` in groups of ``group_size`` inputs (-1: all of them).

    ``sym`` fixes the zero at the middle code. ``clip`` tries several shares of a group's range (quantization.CLIPS) and
    keeps the one of least error. ``half`` rounds scales to float16, as they are stored, before codes are chosen.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    clip: bool = True
    half: bool = True


@dataclass(frozen=True)
class Solution:
    """``weight``: the codes. ``damp``: the share of the mean of the Hessian's diagonal that was added to it."""

    weight: CanonicalWeight
    damp: float


def solve(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, act_order: ActOrder, damp: float = 0.01
) -> Solution | None:
    """``weight`` float32 [N, K] and ``hessian`` float32 [K, K], the sum of x x^T over its inputs x -> codes that keep
    the outputs, or None where the Hessian has no factor even with ten times the damping.

    ``act_order`` "static": columns of large inputs first, groups as they lie; "full": groups of what comes next to each
    other in that order, as AutoGPTQ's desc_act; "off": in their own order. An input that was always 0 gets weights of
    0.
    """
    rows, columns = weight.shape
    size, groups = groups_of((rows, columns), grid.bits, grid.group_size, "weight")
    w, h = weight.clone(), hessian.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    w[:, dead] = 0
    order = torch.arange(columns)
    if act_order != "off":
        order = torch.sort(diagonal, descending=True, stable=True).indices
    fixed = None
    if act_order == "static":
        fixed = scales_of(w, diagonal, grid, size, groups)
    w, h = w[:, order], h[order][:, order]
    factor = _factor(h, damp)
    if factor is None:
        return None
    upper, used = factor
    place = torch.arange(columns) // size if act_order != "static" else order // size
    codes, scales, zeros = _round_columns(w, upper, grid, size, groups, place, fixed, h.diagonal())
    perm = order.to(torch.int32) if act_order == "full" else None
    if act_order == "static":
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    made = CanonicalWeight(
        codes=codes, scales=scales, zeros=zeros, bits=grid.bits, group_size=size, perm=perm
    )
    return Solution(made, used)


def _round_columns(
    w: torch.Tensor,
    upper: torch.Tensor,
    grid: Grid,
    size: int,
    groups: int,
    place: torch.Tensor,
    fixed: tuple[torch.Tensor, torch.Tensor] | None,
    diagonal: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns of w [N, K], which is changed, in their order -> codes uint8 [K, N], scales [G, N], zeros int16 [G, N].
    ``place``: each column's group; ``fixed``: the groups' scales and zeros, else they are those of what the weights
    have become when a group begins."""
    rows, columns = w.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    scales, zeros = fixed or (torch.empty(groups, rows), torch.empty(groups, rows))
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        block, factor = w[:, begin:end].clone(), upper[begin:end, begin:end]
        errors = torch.empty_like(block)
        for j in range(end - begin):
            k = begin + j
            if fixed is None and k % size == 0:
                ahead = torch.cat((block[:, j:], w[:, end : k + size]), dim=1)[:, :size]
                found = scales_of(ahead, diagonal[k : k + size], grid, size, 1)
                scales[k // size], zeros[k // size] = found[0][0], found[1][0]
            group = int(place[k])
            scale, zero = scales[group], zeros[group]
            column = block[:, j]
            q = ((column / scale).round_() + zero).clamp_(0, 2**grid.bits - 1)
            codes[k] = q.to(torch.uint8)
            errors[:, j] = (column - scale * (q - zero)) / factor[j, j]
            block[:, j:].addr_(errors[:, j], factor[j, j:], alpha=-1)
        w[:, end:].addmm_(errors, upper[begin:end, end:], alpha=-1)
    return codes, scales, zeros.to(torch.int16)


def _factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float] | None:
    """The upper Cholesky factor of the inverse of a Hessian [K, K], and the damping that it took."""
    wide = hessian.double() if len(hessian) <= _EXACT_INPUTS else hessian
    mean = float(wide.diagonal().mean())
    while damp <= _MAX_DAMP:
        upper = _inverse_factor(wide, damp * mean)
        if upper is None and wide.dtype == torch.float32:
            upper = _inverse_factor(wide.double(), damp * mean)
        if upper is not None:
            return upper.float(), damp
        damp += 0.01
    return None


def _inverse_factor(hessian: torch.Tensor, added: float) -> torch.Tensor | None:
    """That of ``hessian`` with ``added`` on its diagonal, None where it has none."""
    damped = hessian.clone()
    damped.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else upper


def scales_of(
    w: torch.Tensor, diagonal: torch.Tensor, grid: Grid, size: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K] -> scales and zeros float32 [groups, N] of its groups of ``size`` inputs. Of several clips each group
    takes the one of least squared error, that of each input weighed by ``diagonal`` [K]."""
    missing = groups * size - w.shape[1]
    each = torch.nn.functional.pad(w, (0, missing)).view(len(w), groups, size)
    weights = torch.nn.functional.pad(diagonal, (0, missing)).view(groups, size)
    top = 2**grid.bits - 1
    low, high = each.amin(-1).clamp_(max=0), each.amax(-1).clamp_(min=0)
    if grid.sym:
        high = torch.maximum(high, -low)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = (
        torch.where(empty, -torch.ones_like(low), low),
        torch.where(empty, torch.ones_like(high), high),
    )
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    least = torch.empty(0)
    for clip in CLIPS[grid.bits] if grid.clip else (1.0,):
        scale = (high - low) * (clip / top) if clip != 1.0 else (high - low) / top
        if grid.half:
            scale = scale.clamp_(min=_LEAST_SCALE).half().float()
        zero = (
            torch.full_like(scale, (top + 1) / 2)
            if grid.sym
            else (-low * clip / scale).round_().clamp_(1, top)
        )
        if not grid.clip:
            best = scale, zero
            break
        s, z = scale[..., None], zero[..., None]
        rounded = (((each / s).round_() + z).clamp_(0, top) - z) * s
        error = ((each - rounded).square_() * weights).sum(-1)
        if best is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
    assert best is not None
    return best[0].t().contiguous(), best[1].t().contiguous()


def rounded(weight: torch.Tensor, grid: Grid, diagonal: torch.Tensor | None = None) -> CanonicalWeight:
    """``weight`` float32 [N, K] rounded to the nearest numbers of the grid: what GPTQ is compared with. ``diagonal``
    float32 [K] weighs the inputs' errors where the clip is chosen."""
    rows, columns = weight.shape
    size, groups = groups_of((rows, columns), grid.bits, grid.group_size, "weight")
    even = torch.ones(columns) if diagonal is None else diagonal
    scales, zeros = scales_of(weight, even, grid, size, groups)
    place = torch.arange(columns) // size
    q = (weight.t() / scales[place]).round_() + zeros[place]
    codes = q.clamp_(0, 2**grid.bits - 1).to(torch.uint8)
    return CanonicalWeight(
        codes=codes, scales=scales, zeros=zeros.to(torch.int16), bits=grid.bits, group_size=size
    )


def relative_error(weight: torch.Tensor, made: torch.Tensor, hessian: torch.Tensor) -> float:
    """The squared error of the outputs of ``made`` beside those of ``weight``, both [N, K], as a share of the outputs'
    squares, over the inputs of which ``hessian`` is the sum of x x^T; its square root."""
    difference = weight - made
    error = float(((difference @ hessian) * difference).sum())
    total = float(((weight @ hessian) * weight).sum())
    return math.sqrt(max(error, 0.0) / total) if total > 0 else 0.0
