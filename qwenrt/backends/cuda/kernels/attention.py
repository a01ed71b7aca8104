"""Attention of one token of each sequence over its paged cache. Defined in ops/reference.py: decode_attention.

The keys that a sequence sees are split among programs, each of which keeps the running maximum and sum of a softmax;
a second kernel merges them. Nothing depends on a length that the host would have to know.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenrt.backends.cuda.kernels.launch import cdiv, launch, power
from qwenrt.backends.cuda.tables import Tiles
from qwenrt.ops.steps import DecodePlan, LayerKV

_MOST_SPLITS = 64


@triton.jit
def weighted(
    weights,
    v,
    v_scale_ptr,
    v_zero_ptr,
    slot,
    seen,
    dtype: tl.constexpr,
    CODES: tl.constexpr,
    DOT: tl.constexpr,
):
    """weights [BQ, BK] times values [BK, BD], which may be codes -> float32. By a tensor product both are rounded to
    q's dtype first; by sums, of one query, a token's scale and zero meet its weight."""
    if CODES:
        scale = tl.load(v_scale_ptr + slot, mask=seen, other=0.0)
        zero = tl.load(v_zero_ptr + slot, mask=seen, other=0.0)
    if DOT:
        if CODES:
            v = (v.to(tl.float32) * scale[:, None] + zero[:, None]).to(dtype)
        result = tl.dot(weights.to(dtype), v, input_precision="ieee")
    else:
        weight = tl.reshape(weights, (weights.shape[1],))
        if CODES:
            moved = tl.sum(weight * zero, 0)
            result = tl.sum((weight * scale)[:, None] * v.to(tl.float32), 0)[None, :] + moved
        else:
            result = tl.sum(weight[:, None] * v.to(tl.float32), 0)[None, :]
    return result


@triton.jit
def over_keys(
    q, most, total, out, low, high, row, kv_head,
    k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, table_ptr, scale, blocks,
    KVH: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, CODES: tl.constexpr, DOT: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The softmax of queries q [BQ, BD] goes on over a row's keys from ``low`` to ``high`` - 1: its maximum and sum
    [BQ], and the values so far [BQ, BD]."""
    d = tl.arange(0, BD)[None, :]
    real = d < D
    q_sum = tl.sum(q.to(tl.float32), 1)[:, None]
    for start in range(low, high, BK):
        at = start + tl.arange(0, BK)
        seen = at < high
        block = tl.load(table_ptr + row * blocks + at // SLOTS, mask=seen, other=0)
        slot = (block * SLOTS + at % SLOTS) * KVH + kv_head
        where, loaded = slot[:, None] * D + d, seen[:, None] & real
        k = tl.load(k_ptr + where, mask=loaded, other=0).to(q.dtype)
        v = tl.load(v_ptr + where, mask=loaded, other=0)
        if DOT:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
        if CODES:
            scores *= tl.load(k_scale_ptr + slot, mask=seen, other=0.0)[None, :]
            scores += q_sum * tl.load(k_zero_ptr + slot, mask=seen, other=0.0)[None, :]
        scores = tl.where(seen[None, :], scores * scale, -float("inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        before, weights = tl.exp(most - now), tl.exp(scores - now[:, None])
        total = total * before + tl.sum(weights, 1)
        out *= before[:, None]
        out += weighted(weights, v, v_scale_ptr, v_zero_ptr, slot, seen, q.dtype, CODES, DOT)
        most = now
    return most, total, out


@triton.jit
def split_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    k_zero_ptr,
    v_scale_ptr,
    v_zero_ptr,
    table_ptr,
    position_ptr,
    parts_ptr,
    ends_ptr,
    scale,
    blocks,
    window,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CODES: tl.constexpr,
    QUERIES: tl.constexpr,
    DOT: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """A share of the keys of one sequence and key head, for QUERIES heads that share it: their weighted values, and the
    maximum and sum of their softmax. Of one split alone the result."""
    row, first_head, share = tl.program_id(0), tl.program_id(1) * QUERIES, tl.program_id(2)
    kv_head = first_head // (H // KVH)
    length = tl.load(position_ptr + row).to(tl.int32) + 1
    first = tl.maximum(length - window, 0) if WINDOW else 0
    per_split = tl.cdiv(tl.cdiv(length - first, SPLITS), BK) * BK
    low = first + share * per_split
    high = tl.minimum(low + per_split, length)
    of_group, d = tl.arange(0, BQ)[:, None], tl.arange(0, BD)[None, :]
    head, has_query, real = first_head + of_group, of_group < QUERIES, d < D
    q = tl.load(q_ptr + (row * H + head) * D + d, mask=has_query & real, other=0.0)
    most = tl.full((BQ,), -float("inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    out = tl.zeros((BQ, BD), tl.float32)
    most, total, out = over_keys(
        q, most, total, out, low, high, row, kv_head, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr,
        table_ptr, scale, blocks, KVH, D, SLOTS, CODES, DOT, BK, BD,
    )  # fmt: skip
    if SPLITS == 1:
        result = (out / total[:, None]).to(parts_ptr.dtype.element_ty)
        tl.store(parts_ptr + (row * H + head) * D + d, result, mask=has_query & real)
    else:
        part = (row * H + head) * SPLITS + share
        tl.store(parts_ptr + part * D + d, out, mask=has_query & real)
        tl.store(ends_ptr + 2 * part, most[:, None], mask=has_query)
        tl.store(ends_ptr + 2 * part + 1, total[:, None], mask=has_query)


@triton.jit
def merge_splits(
    parts_ptr,
    ends_ptr,
    y_ptr,
    rows,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Of each query head (a row) its splits to one result."""
    row, share, d = (
        tl.program_id(0) * BR + tl.arange(0, BR),
        tl.arange(0, SPLITS)[None, :],
        tl.arange(0, BD)[None, None, :],
    )
    part, inside = row[:, None] * SPLITS + share, row[:, None] < rows
    most = tl.load(ends_ptr + 2 * part, mask=inside, other=0.0)
    total = tl.load(ends_ptr + 2 * part + 1, mask=inside, other=1.0)
    loaded = inside[:, :, None] & (d < D)
    out = tl.load(parts_ptr + part[:, :, None] * D + d, mask=loaded, other=0.0)
    weight = tl.exp(most - tl.max(most, 1)[:, None])
    y = tl.sum(out * weight[:, :, None], 1) / tl.sum(total * weight, 1)[:, None]
    at = row[:, None] * D + tl.arange(0, BD)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside & (tl.arange(0, BD)[None, :] < D))


def splits_of(keys: int, window: int, tiles: Tiles) -> int:
    """Programs that share a sequence's keys, of which a query sees up to so many."""
    seen = min(keys, window) if window else keys
    return min(_MOST_SPLITS, power(cdiv(seen, tiles.per_split)))


def decode_attention(
    q: torch.Tensor, kv: LayerKV, plan: DecodePlan, scale: float, window: int, tiles: Tiles
) -> torch.Tensor:
    """reference.decode_attention."""
    (rows, heads, head_dim), kv_heads = q.shape, kv.k.shape[2]
    q, y = q.contiguous(), q.new_empty(q.shape)
    table = plan.table if plan.table.stride(-1) == 1 else plan.table.contiguous()
    group, splits = heads // kv_heads, splits_of(table.shape[1] * kv.block_size, window, tiles)
    by_product = group > 1 and tiles.matrix_units
    queries = group if by_product else 1
    alone = splits == 1
    parts = y if alone else torch.empty(rows * heads * splits, head_dim, device=q.device)
    ends = y if alone else torch.empty(rows * heads * splits, 2, device=q.device)
    codes = [y if x is None else x for x in (kv.k_scale, kv.k_zero, kv.v_scale, kv.v_zero)]
    args = (q, kv.k, kv.v, *codes, table, plan.position, parts, ends, scale, table.stride(0), window)
    shape = {"H": heads, "KVH": kv_heads, "D": head_dim, "SLOTS": kv.block_size, "SPLITS": splits}
    flags = {"WINDOW": window > 0, "CODES": kv.quantized, "DOT": by_product, "QUERIES": queries}
    sizes = {"BQ": power(queries, 16 if by_product else 1), "BK": tiles.keys, "BD": power(head_dim, 16)}
    launch(split_keys, (rows, heads // queries, splits), *args, **shape, **flags, **sizes)
    if not alone:
        sizes = {"D": head_dim, "SPLITS": splits, "BR": tiles.heads, "BD": power(head_dim)}
        grid = (cdiv(rows * heads, tiles.heads),)
        launch(merge_splits, grid, parts, ends, y, rows * heads, **sizes)
    return y
