"""A mixture of experts beside its products of single tokens, which are portable.py's: the choice of experts, the sum
of what they give, and between the two, for many tokens, one launch that multiplies the tokens of all experts, sorted by
expert, by tensor products. The definitions are Backend.norm_moe_add and ops/reference.py's route.

How many tokens an expert has the device alone knows: there are as many programs as could be needed, each finds its
expert by the ends of their tiles, and those behind the last tile do nothing. So it serves captured steps as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from qwenrt.backends.cuda.kernels.launch import cdiv, launch, power
from qwenrt.backends.cuda.kernels.portable import codes_of, outputs_of, weights_of
from qwenrt.backends.cuda.tables import Tile
from qwenrt.ops.types import Packed


@triton.jit
def route_row(
    logits_ptr, chosen_ptr, share_ptr, experts, stride, NORM: tl.constexpr, TOP: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """The TOP likeliest experts of one token, by their numbers, rising, and their shares; of equal ones the first. The
    shares of a token whose logits are not finite are NaN."""
    row, e = tl.program_id(0), tl.arange(0, BE)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    inside = e < experts
    logits = tl.load(logits_ptr + row.to(tl.int64) * stride + e, mask=inside, other=-float("inf")).to(
        tl.float32
    )
    weights = tl.where(inside, tl.exp(logits - tl.max(logits, 0)), 0.0)
    scores = tl.div_rn(weights, tl.sum(weights, 0) + 0.0 * weights)
    spoilt = tl.sum((scores != scores).to(tl.int32), 0) > 0
    left = tl.where(inside, tl.where(scores == scores, scores, 0.0), -1.0)
    for _ in tl.static_range(TOP):
        first = tl.min(tl.where(left == tl.max(left, 0), e, BE), 0)
        left = tl.where(e == first, -1.0, left)
    taken = inside & (left < 0)
    share = tl.where(taken, scores, 0.0)
    if NORM:
        share = tl.div_rn(share, tl.sum(share, 0) + 0.0 * share)
    share = tl.where(spoilt, float("nan"), share.to(dtype).to(tl.float32))
    to = row * TOP + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(chosen_ptr + to, e.to(tl.int64), mask=taken)
    tl.store(share_ptr + to, share, mask=taken)


def route(logits: torch.Tensor, top_k: int, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> experts int64 [T, k], rising, and their shares float32 [T, k], rounded to the logits' dtype."""
    rows, experts = logits.shape
    chosen = torch.empty(rows, top_k, dtype=torch.int64, device=logits.device)
    share = torch.empty(rows, top_k, device=logits.device)
    logits = logits.contiguous()
    sizes = {"NORM": norm, "TOP": top_k, "BE": power(experts)}
    launch(route_row, (rows,), logits, chosen, share, experts, logits.stride(0), warps=1, **sizes)
    return chosen, share


@triton.jit
def combine_row(
    y_ptr, share_ptr, x_ptr, out_ptr, width, TOP: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """Some channels of one token: what its experts give by their shares, rounded, and with ADD the residual."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    inside, total = d < width, tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(TOP):
        y = tl.load(y_ptr + (row * TOP + rank) * width + d, mask=inside, other=0.0).to(tl.float32)
        total += y * tl.load(share_ptr + row * TOP + rank)
    if ADD:
        x = tl.load(x_ptr + row * width + d, mask=inside, other=0.0).to(tl.float32)
        total = x + total.to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + d, total.to(dtype), mask=inside)


def combine(y: torch.Tensor, share: torch.Tensor, dtype: torch.dtype, x: torch.Tensor | None) -> torch.Tensor:
    """y [T * k, D], in the order of tokens and of their experts, share [T, k] -> the sum of each token's [T, D] in
    ``dtype``, and x [T, D] with it where it is given."""
    rows, ranks = share.shape
    out = torch.empty(rows, y.shape[1], dtype=dtype, device=y.device)
    block = min(1024, power(y.shape[1]))
    args = (y, share, out if x is None else x.contiguous(), out, y.shape[1])
    launch(combine_row, (rows, cdiv(y.shape[1], block)), *args, TOP=ranks, ADD=x is not None, BLOCK=block)
    return out


@triton.jit
def dense_of(w_ptr, rows, start, K, BK: tl.constexpr):
    """Weights [rows, BK] of inputs from ``start`` on, as they are."""
    k = start + tl.arange(0, BK)
    return tl.load(w_ptr + rows[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)


@triton.jit
def experts_tile(
    x_ptr, order_ptr, ends_ptr, tile_ends_ptr, perm_ptr, w_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    N, K, groups, experts, zero: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr,
    PERM: tl.constexpr, RANKS: tl.constexpr, PAIR: tl.constexpr, BIAS: tl.constexpr, BE: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Some outputs of up to BT tokens of one expert. With ``RANKS`` the i-th of the sorted pairs has x's row
    order[i] // RANKS and y's row i; without, x's row i and y's row order[i]."""
    tile, every = tl.program_id(1), tl.arange(0, BE)
    tile_ends = tl.load(tile_ends_ptr + every, mask=every < experts, other=1 << 30)
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    if expert >= experts:
        return
    before = tl.maximum(expert - 1, 0)
    first_tile = tl.where(expert > 0, tl.load(tile_ends_ptr + before), 0)
    first = tl.where(expert > 0, tl.load(ends_ptr + before), 0) + (tile - first_tile) * BT
    end = tl.load(ends_ptr + expert)

    rows, which = outputs_of(N, BN, PAIR), expert.to(tl.int64)
    WORDS: tl.constexpr = GROUP * BITS // 32
    w_ptr += which * N * (groups * WORDS if BITS < 16 else K)
    if BITS < 16:
        scales_ptr += which * N * groups
        zeros_ptr += which * N * groups
    perm_ptr += which * K
    i = first + tl.arange(0, BT)
    here = i < end
    asked = tl.load(order_ptr + i, mask=here, other=0)
    token = (asked // RANKS if RANKS else i).to(tl.int64)
    sums = tl.zeros((BT, rows.shape[0]), tl.float32)
    for start in range(0, K, BK):
        if BITS < 16:
            w = weights_of(
                w_ptr,
                scales_ptr,
                zeros_ptr,
                rows,
                start // GROUP,
                groups,
                zero,
                BITS,
                GROUP,
                MODE,
                BK // GROUP,
            )
        else:
            w = dense_of(w_ptr, rows, start, K, BK)
        k = start + tl.arange(0, BK)
        place = k
        if PERM:
            place = tl.load(perm_ptr + k, mask=k < K, other=0)
        x = tl.load(
            x_ptr + token[:, None] * K + place[None, :], mask=here[:, None] & (k[None, :] < K), other=0.0
        )
        sums = tl.dot(x, tl.trans(w.to(x.dtype)), sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias_ptr + which * N + rows).to(tl.float32)[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    width = N // 2 if PAIR else N
    if PAIR:
        gate, up = tl.split(tl.reshape(sums, (BT, BN, 2)))
        gate = gate.to(dtype).to(tl.float32)
        silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(dtype).to(tl.float32)
        sums = silu * up.to(dtype).to(tl.float32)
    to = (i if RANKS else asked).to(tl.int64)
    tl.store(
        y_ptr + to[:, None] * width + at[None, :], sums.to(dtype), mask=here[:, None] & (at[None, :] < width)
    )


@dataclass(frozen=True)
class Sorted:
    """Tokens by expert. ``order`` int64 [J]: the pair (token, rank), token * ranks + rank, that comes i-th; ``ends``
    int64 [E]: of each expert's pairs in it; ``tile_ends`` int64 [E]: the same in tiles of ``tile`` pairs of one
    expert, ``tiles`` at most."""

    order: torch.Tensor
    ends: torch.Tensor
    tile_ends: torch.Tensor
    tile: int
    tiles: int
    ranks: int


def by_expert(chosen: torch.Tensor, experts: int) -> Sorted:
    """chosen int64 [T, ranks] -> its pairs, expert by expert, each in the order of tokens. Nothing waits for the
    device."""
    pairs, order = chosen.flatten().sort(stable=True)
    tile = power(min(64, cdiv(len(pairs), experts)), 16)
    ends = torch.searchsorted(pairs, torch.arange(experts, device=chosen.device), right=True)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    tile_ends = ((counts + (tile - 1)) // tile).cumsum(0)
    tiles = len(pairs) // tile + min(experts, len(pairs))
    return Sorted(order, ends, tile_ends, tile, tiles, chosen.shape[1])


def linear(
    x: torch.Tensor, w: Packed, pairs: Sorted, tile: Tile, dtype: torch.dtype, *, pair: bool = False
) -> torch.Tensor:
    """Of a ``pair`` x [T, K], by gate and up of each token's experts -> silu(gate) * up [J, N / 2], sorted by expert;
    else x [J, K], sorted so, by its expert -> [J, N] in the order of tokens and ranks. In ``dtype``. ``w``: of all
    experts, with a leading axis."""
    count, width = len(pairs.order), w.out_features // 2 if pair else w.out_features
    y = torch.empty(count, width, dtype=dtype, device=x.device)
    outputs = min(tile.outputs // 2 if pair else tile.outputs, power(width, 8 if pair else 16))
    flags: dict[str, Any] = {"PAIR": pair, "RANKS": pairs.ranks if pair else 0, "BIAS": w.bias is not None}
    flags |= {"BE": power(len(pairs.ends)), "BT": pairs.tile, "BN": outputs}
    perm, bias = w.data.get("perm"), y if w.bias is None else w.bias
    if w.kind == "dense":
        weights, groups = (w.data["weight"], y, y), 1
        flags |= {
            "zero": 0,
            "BITS": 16,
            "GROUP": 16,
            "MODE": 0,
            "BK": min(tile.inputs, power(w.in_features, 16)),
        }
    else:
        codes = codes_of(w, y)
        weights, groups = codes.tensors, codes.groups
        at_once = max(codes.at_once(tile.inputs), 16 // w.group_size)
        flags |= codes.constants | {"BK": at_once * w.group_size}
    args = (
        x.contiguous(),
        pairs.order,
        pairs.ends,
        pairs.tile_ends,
        y if perm is None else perm,
        *weights,
        bias,
        y,
    )
    sizes = (w.out_features, w.in_features, groups, len(pairs.ends))
    grid = (cdiv(width, outputs), pairs.tiles)
    launch(experts_tile, grid, *args, *sizes, PERM=perm is not None, **flags, warps=tile.warps)
    return y
