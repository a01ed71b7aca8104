"""Experts of many tokens at once: one launch multiplies the tokens of all experts, sorted by expert, by tensor
products. The definition is Backend.norm_moe_add, expert by expert.

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
