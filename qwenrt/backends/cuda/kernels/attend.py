"""All of attention between two linears of a step that decodes, in one launch: head norms, rotation, the cache's stores,
attention over pages in splits, and their merging. Defined by Backend.rotary_store_kv and ops/reference.py's
decode_attention.

Each program turns its queries itself. The last split alone makes the newest key and value: it stores them, and takes
them from its registers, as no other program reads that slot. Whoever is the last of a row's splits to arrive merges all
of them; it knows by a counter, which it leaves at 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenrt.backends.cuda.kernels.attention import over_keys, splits_of
from qwenrt.backends.cuda.kernels.between import coded, turned
from qwenrt.backends.cuda.kernels.launch import launch, power
from qwenrt.backends.cuda.tables import Tiles
from qwenrt.ops.steps import DecodePlan, LayerKV, RotaryRows

_MERGED = 64  # rows of parts that are looked at together


@triton.jit
def queries(
    qkv_ptr, q_norm_ptr, cos_ptr, sin_ptr, q_scale_ptr, factor_ptr, row, head, inside, kv_head, stride, eps,
    D: tl.constexpr, ROTATED: tl.constexpr, NORMS: tl.constexpr, SCALED: tl.constexpr, FITTED: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Heads [BQ, 1] of a row as they meet keys [BQ, BD], in qkv's dtype; 0 where there is none."""
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    d = tl.arange(0, BD)[None, :]
    start, token = row * stride + head * D, row + 0 * head
    q = turned(
        qkv_ptr, q_norm_ptr, q_norm_ptr, cos_ptr, sin_ptr, start, token, d, inside, head >= 0, head < 0, eps,
        D, ROTATED, NORMS,
    )  # fmt: skip
    if SCALED:
        q = (q * tl.load(q_scale_ptr + row).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    if FITTED:
        factor = tl.load(factor_ptr + kv_head * D + d, mask=d < D, other=1.0)
        q = q * factor.to(dtype).to(tl.float32)
    return tl.where(inside, q, 0.0).to(dtype)


@triton.jit
def newest(
    qkv_ptr, k_norm_ptr, cos_ptr, sin_ptr, offset_ptr, factor_ptr, k_ptr, v_ptr,
    k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, row, kv_head, place, stride, eps, stores,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, NORMS: tl.constexpr,
    FITTED: tl.constexpr, CODES: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The key and the value of a row's token [1, BD] as a reader of the cache would see them, float32; put at ``place``
    where this program ``stores``, 1 or 0."""
    d = tl.arange(0, BD)[None, :]
    real, yes = d < D, d >= 0
    start = row * stride + (H + kv_head) * D
    key = turned(
        qkv_ptr,
        k_norm_ptr,
        k_norm_ptr,
        cos_ptr,
        sin_ptr,
        start,
        row,
        d,
        real,
        yes,
        d < 0,
        eps,
        D,
        ROTATED,
        NORMS,
    )
    value = tl.load(qkv_ptr + start + KVH * D + d, mask=real, other=0.0).to(tl.float32)
    if FITTED:
        offset = tl.load(offset_ptr + kv_head * D + d, mask=real, other=0.0)
        key = tl.div_rn(key - offset, tl.load(factor_ptr + kv_head * D + d, mask=real, other=1.0))
    at, put = place * D + d, real & (stores + 0 * d > 0)
    if CODES:
        key_codes, key_scale, key_zero = coded(key, real)
        value_codes, value_scale, value_zero = coded(value, real)
        tl.store(k_ptr + at, key_codes, mask=put)
        tl.store(v_ptr + at, value_codes, mask=put)
        one, own = place + tl.arange(0, 1), stores + tl.arange(0, 1) > 0
        tl.store(k_scale_ptr + one, key_scale, mask=own)
        tl.store(k_zero_ptr + one, key_zero, mask=own)
        tl.store(v_scale_ptr + one, value_scale, mask=own)
        tl.store(v_zero_ptr + one, value_zero, mask=own)
        key = tl.where(real, key_codes.to(tl.float32) * key_scale[:, None] + key_zero[:, None], 0.0)
        value = value_codes.to(tl.float32) * value_scale[:, None] + value_zero[:, None]
    else:
        tl.store(k_ptr + at, key.to(k_ptr.dtype.element_ty), mask=put)
        tl.store(v_ptr + at, value.to(v_ptr.dtype.element_ty), mask=put)
    return key, value


@triton.jit
def merged(
    parts_ptr, ends_ptr, y_ptr, part, head, has_query, first_y,
    D: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All splits of BQ heads [BQ, 1], from the first's number ``part`` on -> their result, stored."""
    share, d = tl.arange(0, SPLITS)[None, :], tl.arange(0, BD)
    most = tl.load(ends_ptr + 2 * (part + share), mask=has_query, other=0.0)
    total = tl.load(ends_ptr + 2 * (part + share) + 1, mask=has_query, other=1.0)
    largest = tl.max(most, 1)[:, None]
    whole = tl.sum(total * tl.exp(most - largest), 1)
    y = tl.zeros((BQ, BD), tl.float32)
    for first in range(0, SPLITS, AT_ONCE):
        some = part + first + tl.arange(0, AT_ONCE)[None, :]
        weight = tl.exp(tl.load(ends_ptr + 2 * some, mask=has_query, other=0.0) - largest)
        here = has_query[:, :, None] & (d < D)[None, None, :]
        out = tl.load(parts_ptr + some[:, :, None] * D + d[None, None, :], mask=here, other=0.0)
        y += tl.sum(out * weight[:, :, None], 1)
    y = (y / whole[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + first_y + head * D + d[None, :], y, mask=has_query & (d < D)[None, :])


@triton.jit
def attend_split(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, q_scale_ptr, offset_ptr, factor_ptr, k_ptr, v_ptr,
    k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, table_ptr, position_ptr, parts_ptr, ends_ptr, counts_ptr, y_ptr,
    scale, eps, stride, blocks, window,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, SLOTS: tl.constexpr,
    SPLITS: tl.constexpr, NORMS: tl.constexpr, SCALED: tl.constexpr, FITTED: tl.constexpr, WINDOW: tl.constexpr,
    CODES: tl.constexpr, QUERIES: tl.constexpr, DOT: tl.constexpr, AT_ONCE: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One share of the keys of a row, for QUERIES heads that share a key head."""
    row, first_head, share = tl.program_id(0).to(tl.int64), tl.program_id(1) * QUERIES, tl.program_id(2)
    kv_head = first_head // (H // KVH)
    of_group, d = tl.arange(0, BQ)[:, None], tl.arange(0, BD)[None, :]
    head, has_query, real = first_head + of_group, of_group < QUERIES, d < D
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    q = queries(
        qkv_ptr, q_norm_ptr, cos_ptr, sin_ptr, q_scale_ptr, factor_ptr, row, head, has_query & real, kv_head, stride,
        eps, D, ROTATED, NORMS, SCALED, FITTED, BD,
    )  # fmt: skip
    position = tl.load(position_ptr + row).to(tl.int32)
    own = tl.load(table_ptr + row * blocks + position // SLOTS)
    place = (own * SLOTS + position % SLOTS) * KVH + kv_head
    last = share == SPLITS - 1
    stores = tl.where(last & (first_head % (H // KVH) == 0), 1, 0)
    key, value = newest(
        qkv_ptr, k_norm_ptr, cos_ptr, sin_ptr, offset_ptr, factor_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr,
        v_scale_ptr, v_zero_ptr, row, kv_head, place, stride, eps, stores, H, KVH, D, ROTATED, NORMS, FITTED, CODES, BD,
    )  # fmt: skip
    score = tl.sum(q.to(tl.float32) * key, 1) * scale
    most = tl.where(last, score, -float("inf"))
    total = tl.where(last, 1.0, 0.0) + tl.zeros((BQ,), tl.float32)
    out = tl.where(last, value, 0.0) + tl.zeros((BQ, BD), tl.float32)

    first = tl.maximum(position + 1 - window, 0) if WINDOW else 0
    per_split = tl.cdiv(tl.cdiv(position - first, SPLITS), BK) * BK
    low = first + share * per_split
    high = tl.minimum(low + per_split, position)
    most, total, out = over_keys(
        q, most, total, out, low, high, row, kv_head, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr,
        table_ptr, scale, blocks, KVH, D, SLOTS, CODES, DOT, BK, BD,
    )  # fmt: skip
    if SPLITS == 1:
        y = (out / total[:, None]).to(dtype)
        tl.store(y_ptr + (row * H + head) * D + d, y, mask=has_query & real)
    else:
        part = (row * H + head) * SPLITS
        tl.store(parts_ptr + (part + share) * D + d, out, mask=has_query & real)
        tl.store(ends_ptr + 2 * (part + share), most[:, None], mask=has_query)
        tl.store(ends_ptr + 2 * (part + share) + 1, total[:, None], mask=has_query)
        tl.debug_barrier()  # every thread's part is there before one of them says so
        count = counts_ptr + row * (H // QUERIES) + tl.program_id(1)
        if tl.atomic_add(count, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            merged(parts_ptr, ends_ptr, y_ptr, part, head, has_query, row * H * D, D, SPLITS, AT_ONCE, BQ, BD)
            tl.store(count, 0)


def attend(
    qkv: torch.Tensor,
    heads: tuple[int, int, int],
    qk_norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    rotary: RotaryRows,
    kv: LayerKV,
    plan: DecodePlan,
    scale: float,
    window: int,
    counts: torch.Tensor,
    tiles: Tiles,
) -> torch.Tensor:
    """qkv [B, (H + 2 KVH) hd] -> what each query has seen [B, H, hd]; keys and values are stored. ``counts`` int32, at
    least B * H of zeros, and zeros again behind the launch."""
    (num_heads, kv_heads, head_dim), rows = heads, len(qkv)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    y = qkv.new_empty(rows, num_heads, head_dim)
    table = plan.table if plan.table.stride(-1) == 1 else plan.table.contiguous()
    group, splits = num_heads // kv_heads, splits_of(table.shape[1] * kv.block_size, window, tiles)
    by_product = group > 1 and tiles.matrix_units
    queries = group if by_product else 1
    block = power(queries, 16 if by_product else 1)
    parts, ends = y, y
    if splits > 1:
        parts = torch.empty(rows * num_heads * splits, head_dim, device=qkv.device)
        ends = torch.empty(rows * num_heads * splits, 2, device=qkv.device)
    norms = (y, y, 0.0) if qk_norms is None else qk_norms
    maybe = (rotary.q_scale, kv.k_offset, kv.k_factor)
    cache = (kv.k, kv.v, kv.k_scale, kv.k_zero, kv.v_scale, kv.v_zero)
    turns = (rotary.cos.contiguous(), rotary.sin.contiguous())
    pointers = [y if x is None else x for x in (*maybe, *cache)]
    ends_of = (
        table,
        plan.position,
        parts,
        ends,
        counts,
        y,
        scale,
        norms[2],
        qkv.stride(0),
        table.stride(0),
        window,
    )
    shape = {"H": num_heads, "KVH": kv_heads, "D": head_dim, "ROTATED": rotary.cos.shape[-1]}
    flags = {
        "NORMS": qk_norms is not None,
        "SCALED": rotary.q_scale is not None,
        "FITTED": kv.k_factor is not None,
        "WINDOW": window > 0,
        "CODES": kv.quantized,
        "DOT": by_product,
    }
    sizes = {"SLOTS": kv.block_size, "SPLITS": splits, "QUERIES": queries, "BQ": block, "BK": tiles.keys}
    sizes |= {"BD": power(head_dim, 16), "AT_ONCE": min(splits, max(1, _MERGED // block))}
    grid = (rows, num_heads // queries, splits)
    launch(
        attend_split, grid, qkv, norms[0], norms[1], *turns, *pointers, *ends_of, **shape, **flags, **sizes
    )
    return y
