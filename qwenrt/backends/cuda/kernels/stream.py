"""Linears of few tokens on NVIDIA's sm_80 and later, in Gluon: weights go to tensor cores through registers alone. The
definition is ops/reference.py's linear: y [T, N] = x [T, K] times W [N, K], W row-major in 16 bits or as packing.py
lays codes out.

A tensor core takes 16 rows, 16 inputs and 8 tokens at once, and does not care in which order the inputs come as long as
rows and tokens agree. So a thread reads 16 bytes of its row and the same inputs of its token, and every conversion
between layouts is asserted to move nothing. A warp has rows g and g + N / 2 (g: its 8 lanes): gate and up of an MLP
meet in a thread. ``WR`` warps have other rows, ``WK`` warps other inputs, which are summed at the end.

A norm is parted: whoever writes a token multiplies it by the weight and leaves sums of its squares (``NEXT``, or
between.py's scale_rows); here 1 / rms is one factor of a column (``NORM``). ``PAIR`` gives silu(gate) * up, ``ADD`` a
residual; ``PLACE`` stores where an act-order consumer reads. 4 bits become a number by being put into the last bits of
1024 (of 128 in bfloat16) and taking that away, with the zero where all are the same: exactly, two at a time. Zeros and
offsets of groups meet the sum of a group's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwenrt.backends.cuda.kernels.launch import cdiv, launch, power
from qwenrt.backends.cuda.tables import Warps
from qwenrt.ops.types import Packed

HEADROOM = {torch.float16: 64.0, torch.bfloat16: 1.0}  # what a parted norm's inputs are divided by in between
# Of both halves of a word: (half & 15) | the bits of 1024 or 128, in one instruction (a compiler takes two), less that
# number and a zero; sm_80 has no difference of bfloat16, but a product with 1 that is added to.
_NUMBERS = {
    torch.float16: (0x6400, "mov.b32 z, {0}; lop3.b32 t, $1, 0x000F000F, {1}, 0xEA; sub.f16x2 $0, t, z;"),
    torch.bfloat16: (
        0x4300,
        "mov.b32 z, {2}; lop3.b32 t, $1, 0x000F000F, {1}, 0xEA; mov.b32 e, 0x3F803F80; fma.rn.bf16x2 $0, t, e, z;",
    ),
}
_NONE, _CONSTANT, _ZEROS, _OFFSETS = 0, 1, 2, 3
_MOST_COLUMNS = 32


@gluon.constexpr_function
def axis(layout, kept):
    """The layout of a range along one axis of another."""
    for other in reversed(range(layout.rank)):
        if other != kept:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def columns_of(x, B: gl.constexpr, WK: gl.constexpr, C: gl.constexpr, D: gl.constexpr, L: gl.constexpr):
    """Inputs as they lie, [WK, C, D, 4 L] -> the second operand of a product [WK, 4 D L, C]."""
    x = x.reshape(WK, C, D, 4, L // 4, 2, 2).permute(0, 2, 4, 5, 3, 6, 1).reshape(WK, 4 * D * L, C)
    return gl.convert_layout(x, B, assert_trivial=True)


@gluon.jit
def neighbours(words, dtype: gl.constexpr):
    """The halves of words -> [..., 2] numbers."""
    low, high = words.to(gl.int16), (words >> 16).to(gl.int16)
    return gl.join(low.to(dtype, bitcast=True), high.to(dtype, bitcast=True))


@gluon.jit
def numbers(words, ASM: gl.constexpr, dtype: gl.constexpr):
    """Of words the lowest 4 bits of either half, less the zero that ASM has -> [..., 2] numbers."""
    both = gl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1)
    return neighbours(both, dtype)


@gluon.jit
def first_operand(w, A: gl.constexpr, WK: gl.constexpr, WR: gl.constexpr, D: gl.constexpr, L: gl.constexpr):
    """Neighbours as a thread has them, in the order of inputs, [WK, WR, 2, 8, D, 4 L / 2, 2] -> [WK, 16 WR, 4 D L]."""
    w = w.reshape(WK, WR, 2, 8, D, 4, L // 4, 2, 2).permute(0, 1, 2, 3, 4, 6, 7, 5, 8)
    return gl.convert_layout(w.reshape(WK, 16 * WR, 4 * D * L), A, assert_trivial=True)


@gluon.jit
def of_4_bits(
    words, ASM: gl.constexpr, A: gl.constexpr, dtype: gl.constexpr,
    WK: gl.constexpr, WR: gl.constexpr, D: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Words of 8 codes [WK, WR, 2, 8, D, 4 L / 8] -> the first operand."""
    every = gl.join(gl.join(words, words >> 8), gl.join(words >> 4, words >> 12))  # [..., 8 bits, 4 bits]
    return first_operand(numbers(every, ASM, dtype), A, WK, WR, D, L)


@gluon.jit
def of_half_bytes(
    words, ASM: gl.constexpr, A: gl.constexpr, dtype: gl.constexpr,
    WK: gl.constexpr, WR: gl.constexpr, D: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Words of 4 codes [WK, WR, 2, 8, D, 4 L / 4] -> the lower 4 bits of each, as the first operand."""
    return first_operand(numbers(gl.join(words, words >> 8), ASM, dtype), A, WK, WR, D, L)


@gluon.jit
def of_group(
    words, x, scales_ptr, zeros_ptr, at, here,
    LOW: gl.constexpr, HIGH: gl.constexpr, BITS: gl.constexpr, MODE: gl.constexpr, SUM: gl.constexpr, A: gl.constexpr,
    WK: gl.constexpr, WR: gl.constexpr, C: gl.constexpr, D: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Codes of a group times inputs: exact numbers, summed, then scaled. ``at`` [WK, 16 WR]: its scales."""
    dtype: gl.constexpr = x.dtype
    nothing = gl.zeros((WK, 16 * WR, C), gl.float32, layout=SUM)
    scale = gl.load(scales_ptr + at, mask=here, other=0.0).to(gl.float32)
    if BITS == 4:
        product = mma_v2(of_4_bits(words, LOW, A, dtype, WK, WR, D, L), x, nothing)
    else:
        high = mma_v2(of_half_bytes(words >> 4, HIGH, A, dtype, WK, WR, D, L), x, nothing)
        product = mma_v2(of_half_bytes(words, LOW, A, dtype, WK, WR, D, L), x, nothing)
        product += 16.0 * high
    product *= scale[:, :, None]
    if MODE > 1:
        moved = gl.load(zeros_ptr + at, mask=here, other=0).to(gl.float32)
        if MODE == 2:
            moved = -scale * moved
        ones = gl.full((WK, 16 * WR, 4 * D * L), 1.0, dtype, layout=A)
        product += moved[:, :, None] * mma_v2(ones, x, nothing)
    return product


@gluon.jit
def norm_factor(
    squares_ptr, T, parts, row, column, width, eps,
    headroom: gl.constexpr, BLOCK: gl.constexpr, C: gl.constexpr, Y: gl.constexpr,
):  # fmt: skip
    """Sums of squares [parts, T] -> 1 / rms of each column, and what its inputs were divided by."""
    total = gl.zeros((BLOCK, C), gl.float32, layout=Y)
    for first in range(0, parts, BLOCK):
        part = first + row
        inside = (part < parts)[:, None] & (column < T)[None, :]
        total += gl.load(squares_ptr + part[:, None] * T + column[None, :], mask=inside, other=0.0)
    return gl.rsqrt(gl.sum(total, 0) / width + eps) * headroom


@gluon.jit
def finish(
    y, bias_ptr, residual_ptr, norm_ptr, place_ptr, y_ptr, scaled_ptr, squares_ptr, T, N,
    headroom: gl.constexpr, PAIR: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr, NEXT: gl.constexpr,
    PLACE: gl.constexpr, WK: gl.constexpr, WR: gl.constexpr, C: gl.constexpr, Y: gl.constexpr,
):  # fmt: skip
    """What follows the sums y [16 WR, C], and the stores."""
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    at = gl.arange(0, 16 * WR, layout=gl.SliceLayout(1, Y))
    column = gl.program_id(1) * C + gl.arange(0, C, layout=gl.SliceLayout(0, Y))
    in_half = gl.program_id(0) * (8 * WR) + at // 16 * 8 + at % 8
    row = in_half + at // 8 % 2 * (N // 2)
    inside = (in_half < N // 2)[:, None] & (column < T)[None, :]
    if BIAS:
        y += gl.load(bias_ptr + row, mask=in_half < N // 2, other=0.0).to(gl.float32)[:, None]
    if PAIR:
        PAIRS: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 8, 4], [WK * WR, 1, 1], [2, 1, 0])
        gate, up = gl.split(y.to(dtype).to(gl.float32).reshape(WR, 2, 8, C).permute(0, 2, 3, 1))
        silu = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
        inner = gl.convert_layout((silu * up).to(dtype), PAIRS, assert_trivial=True)
        w = gl.arange(0, WR, layout=gl.SliceLayout(1, gl.SliceLayout(2, PAIRS)))
        g = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, PAIRS)))
        t = gl.program_id(1) * C + gl.arange(0, C, layout=gl.SliceLayout(0, gl.SliceLayout(1, PAIRS)))
        i = gl.program_id(0) * (8 * WR) + w[:, None] * 8 + g[None, :]
        place = i
        if PLACE:
            place = gl.load(place_ptr + i, mask=i < N // 2, other=0)
        real = (i < N // 2)[:, :, None] & (t < T)[None, None, :]
        gl.store(y_ptr + t[None, None, :] * (N // 2) + place[:, :, None], inner, mask=real)
    else:
        to = column[None, :] * N + row[:, None]
        if ADD:
            y += gl.load(residual_ptr + to, mask=inside, other=0.0).to(gl.float32)
        rounded = y.to(dtype)
        gl.store(y_ptr + to, rounded, mask=inside)
        if NEXT:
            y = rounded.to(gl.float32)
            norm = gl.load(norm_ptr + row, mask=in_half < N // 2, other=0.0).to(gl.float32) / headroom
            place = row
            if PLACE:
                place = gl.load(place_ptr + row, mask=in_half < N // 2, other=0)
            scaled = (y * norm[:, None]).to(scaled_ptr.dtype.element_ty)
            gl.store(scaled_ptr + column[None, :] * N + place[:, None], scaled, mask=inside)
            y = gl.where((in_half < N // 2)[:, None], y, 0.0)
            gl.store(squares_ptr + gl.program_id(0) * T + column, gl.sum(y * y, 0), mask=column < T)


@gluon.jit
def first_words(half, width, W: gl.constexpr, WR: gl.constexpr, D: gl.constexpr, WORDS: gl.constexpr):
    """Where a program's rows begin, [1, WR, 2, 8, D, 4 WORDS], each of them ``width`` words long."""
    r = gl.arange(0, WR, layout=axis(W, 1))[None, :, None, None, None, None]
    h = gl.arange(0, 2, layout=axis(W, 2))[None, None, :, None, None, None]
    g = gl.arange(0, 8, layout=axis(W, 3))[None, None, None, :, None, None]
    d = gl.arange(0, D, layout=axis(W, 4))[None, None, None, None, :, None]
    i = gl.arange(0, 4 * WORDS, layout=axis(W, 5))[None, None, None, None, None, :]
    in_half = gl.minimum((gl.program_id(0) * WR + r) * 8 + g, half - 1)
    row = in_half + h * half
    return row.to(gl.int64) * width + (d * 4 * WORDS + i)


@gluon.jit
def first_inputs(T, K, X: gl.constexpr, C: gl.constexpr, D: gl.constexpr, L: gl.constexpr):
    """Where a program's tokens begin, [1, C, D, 4 L]."""
    c = gl.arange(0, C, layout=axis(X, 1))[None, :, None, None]
    d = gl.arange(0, D, layout=axis(X, 2))[None, None, :, None]
    i = gl.arange(0, 4 * L, layout=axis(X, 3))[None, None, None, :]
    token = gl.minimum(gl.program_id(1) * C + c, T - 1)
    return token * K + (d * 4 * L + i)


@gluon.jit
def stream(
    x_ptr, x_squares_ptr, w_ptr, scales_ptr, zeros_ptr, bias_ptr, residual_ptr, norm_ptr, place_ptr,
    y_ptr, scaled_ptr, squares_ptr, T, N, K, parts, eps,
    headroom: gl.constexpr, LOW: gl.constexpr, HIGH: gl.constexpr,
    BITS: gl.constexpr, MODE: gl.constexpr, D: gl.constexpr, L: gl.constexpr,
    NORM: gl.constexpr, PAIR: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr, NEXT: gl.constexpr,
    PLACE: gl.constexpr, RAGGED: gl.constexpr, WK: gl.constexpr, WR: gl.constexpr, C: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """8 WR rows of each half of W, and C tokens. A unit of inputs is 4 D L of them: a group of codes."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    UNIT: gl.constexpr = 4 * D * L
    WORDS: gl.constexpr = L * BITS // 32  # of a thread in one piece
    SUM: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WK, WR, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, SUM, 2)
    Y: gl.constexpr = gl.SliceLayout(0, SUM)
    W: gl.constexpr = gl.BlockedLayout(
        [1, 1, 2, 1, D, WORDS], [1, 1, 1, 8, 1, 4], [WK, WR, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    X: gl.constexpr = gl.BlockedLayout([1, 1, D, L], [1, 8, 1, 4], [WK, 1, 1, WR], [3, 2, 1, 0])

    # Rows, tokens and units behind the last one are that one again, as a mask costs more: nothing of them is stored, or
    # what they are multiplied by is 0.
    half, units = N // 2, K // UNIT
    k = gl.arange(0, WK, layout=axis(W, 0))[:, None, None, None, None, None]
    STEP: gl.constexpr = D * 4 * WORDS
    w_at = w_ptr + first_words(half, units * STEP, W, WR, D, WORDS)
    w0 = gl.load(w_at + gl.minimum(k, units - 1) * STEP)
    w1 = gl.load(w_at + gl.minimum(k + WK, units - 1) * STEP)
    if PDL:  # nothing but weights is read before, and nothing written
        gdc_launch_dependents()
        gdc_wait()

    xk = gl.arange(0, WK, layout=axis(X, 0))[:, None, None, None]
    x_at = x_ptr + first_inputs(T, K, X, C, D, L)
    at = gl.arange(0, 16 * WR, layout=gl.SliceLayout(1, Y))
    if NORM:
        column = gl.program_id(1) * C + gl.arange(0, C, layout=gl.SliceLayout(0, Y))
        factor = norm_factor(x_squares_ptr, T, parts, at, column, K, eps, headroom, 16 * WR, C, Y)

    S: gl.constexpr = gl.SliceLayout(2, SUM)
    total = gl.zeros((WK, 16 * WR, C), gl.float32, layout=SUM)
    if BITS < 16:
        sr = gl.arange(0, 16 * WR, layout=gl.SliceLayout(0, S))
        sk = gl.arange(0, WK, layout=gl.SliceLayout(1, S))[:, None]
        of_row = gl.minimum(gl.program_id(0) * (8 * WR) + sr // 16 * 8 + sr % 8, half - 1)
        s_at = (of_row + sr // 8 % 2 * half)[None, :] * units + sk
    for unit in range(0, units, WK):
        w2 = gl.load(w_at + gl.minimum(unit + 2 * WK + k, units - 1) * STEP)
        x = gl.load(x_at + gl.minimum(unit + xk, units - 1) * UNIT)
        if BITS == 16 and RAGGED:  # scales behind the last unit are 0
            x = gl.where(unit + xk < units, x, 0.0)
        x = columns_of(x, B, WK, C, D, L)
        if BITS == 16:
            total = mma_v2(first_operand(neighbours(w0, dtype), A, WK, WR, D, L), x, total)
        else:
            at_group, here = s_at + unit, unit + sk < units
            total += of_group(
                w0, x, scales_ptr, zeros_ptr, at_group, here, LOW, HIGH, BITS, MODE, SUM, A, WK, WR, C, D, L
            )
        w0, w1 = w1, w2
    y = gl.sum(total, 0)
    if NORM:
        y *= factor[None, :]
    finish(
        y, bias_ptr, residual_ptr, norm_ptr, place_ptr, y_ptr, scaled_ptr, squares_ptr, T, N,
        headroom, PAIR, BIAS, ADD, NEXT, PLACE, WK, WR, C, Y,
    )  # fmt: skip


@dataclass(frozen=True)
class Normed:
    """What a norm is parted into: tokens [T, K] times its weight (over HEADROOM), and sums of the squares they had
    before, float32 [parts, T]."""

    x: torch.Tensor
    squares: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Next:
    """What the next linear wants of a sum: times its norm's ``weight`` [N], rounded to ``dtype``; stored at ``place``
    int32 [N] where its inputs have another order."""

    weight: torch.Tensor
    eps: float
    dtype: torch.dtype
    place: torch.Tensor | None = None


def linear(
    x: torch.Tensor | Normed,
    w: Packed,
    warps: Warps,
    dtype: torch.dtype,
    *,
    pair: bool = False,
    place: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """[T, K], of codes in their order -> [T, N] in ``dtype``; of a ``pair`` silu(gate) * up [T, N / 2], stored at
    ``place`` int32 where its reader has another order."""
    flags = {"PAIR": pair, "ADD": False, "NEXT": False}
    tokens = x.x if isinstance(x, Normed) else x
    y = tokens.new_empty(len(tokens), w.out_features // 2 if pair else w.out_features, dtype=dtype)
    _launch(x, w, warps, (y, y, y), (y, y), place, flags, pdl)
    return y


def linear_add(
    x: torch.Tensor,
    w: Packed,
    warps: Warps,
    residual: torch.Tensor,
    following: Next | None = None,
    *,
    pdl: bool = False,
) -> tuple[torch.Tensor, Normed | None]:
    """residual [T, N] + linear(x), and what the next linear reads of it."""
    y = torch.empty_like(residual)
    if following is None:
        _launch(x, w, warps, (y, y, y), (residual, y), None, {"PAIR": False, "ADD": True, "NEXT": False}, pdl)
        return y, None
    scaled = torch.empty(y.shape, dtype=following.dtype, device=y.device)
    squares = torch.empty(_programs(w, warps), len(y), device=y.device)
    flags = {"PAIR": False, "ADD": True, "NEXT": True}
    out, read = (y, scaled, squares), (residual, following.weight)
    _launch(x, w, warps, out, read, following.place, flags, pdl)
    return y, Normed(scaled, squares, following.eps)


def _less(w: Packed, dtype: torch.dtype) -> tuple[str, str]:
    """What makes numbers of the lower and of the higher 4 bits of codes, less the one zero of all, if there is one."""
    zero = w.data.get("zero", 0)
    made = []
    for part in (zero, 0) if w.bits == 4 else (zero % 16, zero // 16):
        base, text = _NUMBERS[dtype]
        halves = (base + part, base, 0x8000 | (base + part))
        made.append(
            "{ .reg .b32 t, z, e; " + text.format(*(f"0x{half:04X}{half:04X}" for half in halves)) + " }"
        )
    return made[0], made[1]


def _programs(w: Packed, warps: Warps) -> int:
    return cdiv(w.out_features, 16 * warps.rows)


def _launch(
    x: torch.Tensor | Normed,
    w: Packed,
    warps: Warps,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    read: tuple[torch.Tensor, torch.Tensor],
    place: torch.Tensor | None,
    flags: dict[str, bool],
    pdl: bool,
) -> None:
    normed = x if isinstance(x, Normed) else None
    tokens, y = (x.x if isinstance(x, Normed) else x), out[0]
    tokens = tokens.contiguous()
    parts = 0 if normed is None else len(normed.squares)
    squares = y if normed is None else normed.squares
    zeros, offsets = w.data.get("zeros"), w.data.get("offsets")
    if w.kind == "dense":
        mode, weights = _NONE, (w.data["weight"].view(torch.int32), y, y)
        shape = {"BITS": 16, "D": 2, "L": 8}
    else:
        mode = _OFFSETS if offsets is not None else _ZEROS if zeros is not None else _CONSTANT
        held = offsets if offsets is not None else y if zeros is None else zeros
        weights = (w.data["words"], w.data["scales"], held)
        lane = min(128 // w.bits, w.group_size // 4)  # inputs that a thread reads in one piece
        shape = {"BITS": w.bits, "D": w.group_size // 4 // lane, "L": lane}
    count = len(tokens)
    columns = min(_MOST_COLUMNS, power(count, 8))
    low, high = _less(w, tokens.dtype)
    constants: dict[str, Any] = {"headroom": HEADROOM[tokens.dtype], "LOW": low, "HIGH": high, "MODE": mode}
    constants |= {
        "NORM": normed is not None,
        "BIAS": w.bias is not None,
        "PLACE": place is not None,
        "WK": warps.inputs,
        "WR": warps.rows,
        "C": columns,
        "PDL": pdl,
    }
    units = w.in_features // (shape["D"] * shape["L"] * 4)
    constants["RAGGED"] = units % warps.inputs != 0
    bias, at = (y if w.bias is None else w.bias), (y if place is None else place)
    args = (tokens, squares, *weights, bias, *read, at, *out, count, w.out_features, w.in_features, parts)
    eps = 0.0 if normed is None else normed.eps
    grid = (_programs(w, warps), cdiv(count, columns))
    options = {"warps": warps.rows * warps.inputs, "pdl": pdl}
    launch(stream, grid, *args, eps, **options, **constants, **shape, **flags)
