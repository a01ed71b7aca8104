"""What stands between the linears: norms, silu, rotation with the cache's stores. Defined in ops/reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenrt.backends.cuda.kernels.launch import cdiv, launch, power
from qwenrt.ops.steps import LayerKV


@triton.jit
def norm_rows(x_ptr, weight_ptr, y_ptr, rows, width, eps, BR: tl.constexpr, BD: tl.constexpr):
    """rms_norm: rounded to the weight's dtype, multiplied in it, rounded to y's."""
    row, d = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BD)[None, :]
    at, inside = row.to(tl.int64) * width + d, (row < rows) & (d < width)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < width, other=0.0)
    normed = x * tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    product = (normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)
    tl.store(y_ptr + at, product.to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None, elements: int
) -> torch.Tensor:
    """reference.rms_norm. ``elements``: that a program looks at, at least a row of them."""
    width = x.shape[-1]
    flat = x.reshape(-1, width).contiguous()
    y = torch.empty(x.shape, dtype=dtype or weight.dtype, device=x.device)
    block = power(width)
    count = min(max(1, elements // block), power(len(flat)))
    grid = (cdiv(len(flat), count),)
    launch(norm_rows, grid, flat, weight, y, len(flat), width, eps, BR=count, BD=block)
    return y


@triton.jit
def scale_rows(
    x_ptr,
    weight_ptr,
    place_ptr,
    y_ptr,
    squares_ptr,
    rows,
    width,
    headroom,
    PLACE: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Half of a norm, for linears that have the other: x times the weight over headroom, and the sum of x's squares."""
    row, d = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BD)[None, :]
    at, inside = row.to(tl.int64) * width, (row < rows) & (d < width)
    x = tl.load(x_ptr + at + d, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < width, other=0.0).to(tl.float32)
    if PLACE:
        place = tl.load(place_ptr + d, mask=d < width, other=0)
    else:
        place = d
    tl.store(y_ptr + at + place, (x * weight / headroom).to(y_ptr.dtype.element_ty), mask=inside)
    of_row = tl.program_id(0) * BR + tl.arange(0, BR)
    tl.store(squares_ptr + of_row, tl.sum(x * x, 1), mask=of_row < rows)


def scaled(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    headroom: float,
    place: torch.Tensor | None,
    elements: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, D] -> x * weight / headroom in ``dtype``, channel i at ``place[i]``, and sums of squares float32 [1, T]."""
    (rows, width), x = x.shape, x.contiguous()
    y = torch.empty(rows, width, dtype=dtype, device=x.device)
    squares = torch.empty(1, rows, device=x.device)
    block = power(width)
    count = min(max(1, elements // block), power(rows))
    at = y if place is None else place
    args = (x, weight, at, y, squares, rows, width, headroom)
    launch(scale_rows, (cdiv(rows, count),), *args, PLACE=place is not None, BR=count, BD=block)
    return y, squares


@triton.jit
def silu_rows(gate_up_ptr, y_ptr, total, width, BLOCK: tl.constexpr):
    """silu is rounded to the dtype, and its product with up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate_at, inside = at // width * (2 * width) + at % width, at < total
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_at + width, mask=inside, other=0.0).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(dtype).to(tl.float32)
    tl.store(y_ptr + at, (silu * up).to(dtype), mask=inside)


def silu_and_mul(gate_up: torch.Tensor, elements: int) -> torch.Tensor:
    """reference.silu_and_mul. ``elements``: that a program computes."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    block = min(elements, power(y.numel()))
    launch(silu_rows, (cdiv(y.numel(), block),), gate_up, y, y.numel(), width, BLOCK=block)
    return y


@triton.jit
def coded(y, real):
    """quantize_kv of rows y [BR, BD], of which ``real`` count -> codes, scale, zero. Where one is not finite, the zero
    is not either."""
    low = tl.min(tl.where(real, y, float("inf")), 1) + tl.sum(tl.where(real, y, 0.0) * 0.0, 1)
    high = tl.max(tl.where(real, y, -float("inf")), 1)
    scale = tl.div_rn(high - low, 255.0)
    steps = tl.div_rn(y - low[:, None], tl.where(scale > 0, scale, 1.0)[:, None])
    # 1.5 * 2^23: the last bit is worth 1, ties go to the even number
    near = (steps + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(near, 0.0), 255.0).to(tl.uint8), scale, low


@triton.jit
def normed_part(x, rms, at, inside, q_norm_ptr, k_norm_ptr, is_query, dtype: tl.constexpr):
    """Channels ``at`` of head norms: x times 1 / rms and the weight of queries or keys, rounded as rms_norm does."""
    q_weight = tl.load(q_norm_ptr + at, mask=inside, other=0.0)
    k_weight = tl.load(k_norm_ptr + at, mask=inside, other=0.0)
    weight = tl.where(is_query, q_weight, k_weight)
    normed = (x * rms).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    return normed.to(weight.dtype).to(dtype).to(tl.float32)


@triton.jit
def turned(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    start,
    token,
    d,
    real,
    is_query,
    is_value,
    eps,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Heads as they lie in qkv, normed and rotated; values as they are. float32, rounded to qkv's dtype."""
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    half: tl.constexpr = ROTATED // 2
    other = tl.where(d < half, d + half, tl.where(d < ROTATED, d - half, d))
    x = tl.load(qkv_ptr + start + d, mask=real, other=0.0).to(tl.float32)
    partner = tl.load(qkv_ptr + start + other, mask=real, other=0.0).to(tl.float32)
    passed = x
    if NORMS:
        rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = normed_part(x, rms, d, real, q_norm_ptr, k_norm_ptr, is_query, dtype)
        partner = normed_part(partner, rms, other, real, q_norm_ptr, k_norm_ptr, is_query, dtype)
    angle, turns = token * ROTATED + d, real & (d < ROTATED)
    cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    y = x * cos + tl.where(d < half, -partner, partner) * sin
    return tl.where(is_value, passed, y.to(dtype).to(tl.float32))


@triton.jit
def rotate_rows(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    q_scale_ptr,
    offset_ptr,
    factor_ptr,
    slots_ptr,
    q_ptr,
    k_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    k_zero_ptr,
    v_scale_ptr,
    v_zero_ptr,
    rows,
    stride,
    eps,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMS: tl.constexpr,
    SCALED: tl.constexpr,
    FITTED: tl.constexpr,
    STORED: tl.constexpr,
    CODES: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Heads of tokens of qkv, each a row: a query goes to q, a key to k and its slot, a value to its slot."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    row, d = tl.program_id(0) * BR + tl.arange(0, BR)[:, None], tl.arange(0, BD)[None, :]
    token, head = (row // (H + 2 * KVH)).to(tl.int64), row % (H + 2 * KVH)
    inside = row < rows
    real = inside & (d < D)
    is_query, is_value = head < H, head >= H + KVH
    is_key = (head >= H) & (head < H + KVH)
    kv_head = tl.where(is_query, head // (H // KVH), (head - H) % KVH)
    start = token * stride + head * D
    y = turned(
        qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, start, token, d, real, is_query, is_value, eps,
        D, ROTATED, NORMS,
    )  # fmt: skip
    query, key = y, y
    if SCALED:
        by = tl.load(q_scale_ptr + token, mask=inside, other=0.0).to(dtype).to(tl.float32)
        query = (query * by).to(dtype).to(tl.float32)
    if FITTED:
        factor = tl.load(factor_ptr + kv_head * D + d, mask=real, other=1.0)
        query = query * factor.to(dtype).to(tl.float32)
        key = tl.div_rn(y - tl.load(offset_ptr + kv_head * D + d, mask=real, other=0.0), factor)
    tl.store(q_ptr + (token * H + head) * D + d, query.to(dtype), mask=real & is_query)
    tl.store(k_ptr + (token * KVH + kv_head) * D + d, key.to(k_ptr.dtype.element_ty), mask=real & is_key)
    if STORED:
        place = tl.load(slots_ptr + token, mask=inside, other=0) * KVH + kv_head
        at = place * D + d
        if CODES:
            codes, scale, zero = coded(tl.where(is_value, y, key), d < D)
            tl.store(k_cache_ptr + at, codes, mask=real & is_key)
            tl.store(v_cache_ptr + at, codes, mask=real & is_value)
            tl.store(k_scale_ptr + place, scale[:, None], mask=inside & is_key)
            tl.store(v_scale_ptr + place, scale[:, None], mask=inside & is_value)
            tl.store(k_zero_ptr + place, zero[:, None], mask=inside & is_key)
            tl.store(v_zero_ptr + place, zero[:, None], mask=inside & is_value)
        else:
            tl.store(k_cache_ptr + at, y.to(k_cache_ptr.dtype.element_ty), mask=real & is_key)
            tl.store(v_cache_ptr + at, y.to(v_cache_ptr.dtype.element_ty), mask=real & is_value)


def rotary_store_kv(
    qkv: torch.Tensor,
    heads: tuple[int, int, int],
    qk_norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv: LayerKV | None,
    slots: torch.Tensor | None,
    elements: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backend.rotary_store_kv. ``elements``: that a program computes, at least a head of them."""
    (num_heads, kv_heads, head_dim), count = heads, len(qkv)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    fitted = kv is not None and kv.k_factor is not None
    q = qkv.new_empty(count, num_heads, head_dim)
    k = torch.empty(
        count, kv_heads, head_dim, dtype=torch.float32 if fitted else qkv.dtype, device=qkv.device
    )
    v = qkv.view(count, num_heads + 2 * kv_heads, head_dim)[:, num_heads + kv_heads :]
    stored = kv is not None and slots is not None
    rows, block = count * (num_heads + 2 * kv_heads), power(head_dim)
    norms = (q, q, 0.0) if qk_norms is None else qk_norms
    cache = [q] * 6 if kv is None else [kv.k, kv.v, kv.k_scale, kv.k_zero, kv.v_scale, kv.v_zero]
    fit = [None, None] if kv is None else [kv.k_offset, kv.k_factor]
    pointers = [q if x is None else x for x in (q_scale, *fit, slots, q, k, *cache)]
    flags = {
        "ROTATED": cos.shape[-1],
        "NORMS": qk_norms is not None,
        "SCALED": q_scale is not None,
        "FITTED": fitted,
        "STORED": stored,
        "CODES": kv is not None and kv.quantized,
    }
    sizes = {"H": num_heads, "KVH": kv_heads, "D": head_dim, "BD": block}
    sizes["BR"] = min(max(1, elements // block), power(rows))
    args = (qkv, norms[0], norms[1], cos.contiguous(), sin.contiguous(), *pointers)
    grid = (cdiv(rows, sizes["BR"]),)
    launch(rotate_rows, grid, *args, rows, qkv.stride(0), norms[2], **sizes, **flags)
    return q, k, v
