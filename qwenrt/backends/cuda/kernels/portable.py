"""Linears on any device that Triton compiles for: one token by sums in float32, some by tensor products, many by torch
over a matrix that was dequantised. The definition of all is ops/reference.py's linear.

Where a kernel has a flag for it, it is a seam as well: ``NORM`` multiplies the input by the norm's weight and the
result by 1 / rms (norm_linear), ``PAIR`` gives silu(gate) * up (norm_gate_up_silu), ``ADD`` a residual (linear_add).
``RANKS`` is for experts: program j of the grid's second axis multiplies token j // RANKS by expert ``which[j]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qwenrt.backends.cuda.kernels.launch import cdiv, launch, power
from qwenrt.backends.cuda.tables import Tile
from qwenrt.ops.types import Packed

CONSTANT, ZEROS, OFFSETS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def outputs_of(N, BN: tl.constexpr, PAIR: tl.constexpr):
    """The rows of the weight that this program multiplies; of a pair gate and up in turn. Rows behind the last one are
    that one again: nothing is masked, and nothing of them is stored."""
    if PAIR:
        at = tl.arange(0, 2 * BN)
        rows = tl.minimum(tl.program_id(0) * BN + at // 2, N // 2 - 1) + (at % 2) * (N // 2)
    else:
        rows = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), N - 1)
    return rows


@triton.jit
def finish(
    sums,
    rows,
    bias_ptr,
    residual_ptr,
    y_ptr,
    N,
    BN: tl.constexpr,
    PAIR: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """What follows the sums of one token, and the store."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    if BIAS:
        sums += tl.load(bias_ptr + rows).to(tl.float32)
    if PAIR:
        gate, up = tl.split(tl.reshape(sums, (BN, 2)))
        gate = gate.to(dtype).to(tl.float32)
        silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(dtype).to(tl.float32)
        tl.store(y_ptr + at, (silu * up.to(dtype).to(tl.float32)).to(dtype), mask=at < N // 2)
    else:
        if ADD:
            sums += tl.load(residual_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, sums.to(dtype), mask=at < N)


@triton.jit
def dense_token(
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    which_ptr,
    y_ptr,
    N,
    K,
    eps,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    RANKS: tl.constexpr,
):
    """x [K] times W [N, K], row-major as files have it."""
    rows = outputs_of(N, BN, PAIR)
    if RANKS:
        j = tl.program_id(1)
        expert = tl.load(which_ptr + j).to(tl.int64)
        x_ptr += (j // RANKS) * K
        w_ptr += expert * N * K
        bias_ptr += expert * N
        y_ptr += j * (N // 2 if PAIR else N)
    sums = tl.zeros((rows.shape[0], BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + rows[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
        sums += w.to(tl.float32) * x[None, :]
    y = tl.sum(sums, 1)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    finish(y, rows, bias_ptr, residual_ptr, y_ptr, N, BN, PAIR, BIAS, ADD)


@triton.jit
def zeros_of(zeros_ptr, at, inside, zero: tl.constexpr, MODE: tl.constexpr):
    """What is taken from codes before they are scaled, a group's [rows, BG] -> float32."""
    if MODE == ZEROS:
        result = tl.load(zeros_ptr + at, mask=inside, other=0).to(tl.float32)
    elif MODE == CONSTANT:
        result = tl.full(at.shape, zero, tl.float32)
    else:
        result = tl.zeros(at.shape, tl.float32)
    return result


@triton.jit
def values_of(words, zeros, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Words [rows, BG, GROUP * BITS / 32] -> their codes less zeros [rows, BG], exact float32 [rows, BG, GROUP], in the
    order of inputs."""
    eights = tl.join(words, words >> 8)
    if BITS == 4:
        fours = tl.join(eights, eights >> 4)
        codes = tl.join(fours, fours >> 16) & 15
    else:
        codes = tl.join(eights, eights >> 16) & 255
    # 2^23 + code is a float32 whose last bits are the code
    floats = tl.reshape(
        (codes | 0x4B000000).to(tl.float32, bitcast=True), (words.shape[0], words.shape[1], GROUP)
    )
    return floats - (zeros + 8388608.0)[:, :, None]


@triton.jit
def codes_token(
    x_ptr,
    norm_ptr,
    perm_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    residual_ptr,
    which_ptr,
    y_ptr,
    N,
    K,
    groups,
    eps,
    zero: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    PERM: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    RANKS: tl.constexpr,
):
    """x [K] times codes as packing.py lays them out. A scale is a group's: it meets
    its sum."""
    WORDS: tl.constexpr = GROUP * BITS // 32
    rows = outputs_of(N, BN, PAIR)
    if RANKS:
        j = tl.program_id(1)
        expert = tl.load(which_ptr + j).to(tl.int64)
        x_ptr += (j // RANKS) * K
        w_ptr += expert * N * groups * WORDS
        scales_ptr += expert * N * groups
        zeros_ptr += expert * N * groups
        bias_ptr += expert * N
        perm_ptr += expert * K
        y_ptr += j * (N // 2 if PAIR else N)
    sums = tl.zeros((rows.shape[0], BG), tl.float32)
    squares = tl.zeros((BG, GROUP), tl.float32)
    for start in range(0, groups, BG):
        g = start + tl.arange(0, BG)
        k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        if PERM:
            place = tl.load(perm_ptr + k, mask=k < K, other=0)
        else:
            place = k
        x = tl.load(x_ptr + place, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + place, mask=k < K, other=0.0).to(tl.float32)
        word = rows[:, None, None] * (groups * WORDS) + (
            g[None, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
        )
        words = tl.load(w_ptr + word, mask=g[None, :, None] < groups, other=0)
        at, inside = rows[:, None] * groups + g[None, :], g[None, :] < groups
        values = values_of(words, zeros_of(zeros_ptr, at, inside, zero, MODE), BITS, GROUP)
        scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums += scale * tl.sum(values * x[None, :, :], 2)
        if MODE == OFFSETS:
            sums += tl.load(zeros_ptr + at, mask=inside, other=0.0) * tl.sum(x, 1)[None, :]
    y = tl.sum(sums, 1)
    if NORM:
        y *= tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps)
    finish(y, rows, bias_ptr, residual_ptr, y_ptr, N, BN, PAIR, BIAS, ADD)


@triton.jit
def weights_of(
    w_ptr,
    scales_ptr,
    zeros_ptr,
    rows,
    start,
    groups,
    zero: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    BG: tl.constexpr,
):
    """Weights of ``rows`` and BG groups from ``start`` on -> float32 [rows, BG * GROUP], each as it is defined."""
    WORDS: tl.constexpr = GROUP * BITS // 32
    g = start + tl.arange(0, BG)
    word = rows[:, None, None] * (groups * WORDS) + (
        g[None, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    )
    words = tl.load(w_ptr + word, mask=g[None, :, None] < groups, other=0)
    at, inside = rows[:, None] * groups + g[None, :], g[None, :] < groups
    values = values_of(words, zeros_of(zeros_ptr, at, inside, zero, MODE), BITS, GROUP)
    values *= tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    if MODE == OFFSETS:
        values += tl.load(zeros_ptr + at, mask=inside, other=0.0)[:, :, None]
    return tl.reshape(values, (rows.shape[0], BG * GROUP))


@triton.jit
def codes_tokens(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    T,
    N,
    K,
    groups,
    zero: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    BIAS: tl.constexpr,
):
    """x [T, K] times codes, with weights rounded to x's dtype as in the definition; T at most BT."""
    rows = outputs_of(N, BN, False)
    t = tl.arange(0, BT)
    sums = tl.zeros((BT, BN), tl.float32)
    for start in range(0, groups, BG):
        w = weights_of(w_ptr, scales_ptr, zeros_ptr, rows, start, groups, zero, BITS, GROUP, MODE, BG)
        w = w.to(x_ptr.dtype.element_ty)
        k = start * GROUP + tl.arange(0, BG * GROUP)
        x = tl.load(x_ptr + t[:, None] * K + k[None, :], mask=(t[:, None] < T) & (k[None, :] < K), other=0.0)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    y = y_ptr + t[:, None] * N + at[None, :]
    tl.store(y, sums.to(y_ptr.dtype.element_ty), mask=(t[:, None] < T) & (at[None, :] < N))


@triton.jit
def codes_matrix(
    w_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    N,
    K,
    groups,
    zero: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
):
    """Codes -> W [N, K] in y's dtype, as reference.dequantize has it; columns in the order of the codes."""
    rows, start = outputs_of(N, BN, False), tl.program_id(1) * BG
    w = weights_of(w_ptr, scales_ptr, zeros_ptr, rows, start, groups, zero, BITS, GROUP, MODE, BG)
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    k = start * GROUP + tl.arange(0, BG * GROUP)
    y = y_ptr + at[:, None].to(tl.int64) * K + k[None, :]
    tl.store(y, w.to(y_ptr.dtype.element_ty), mask=(at[:, None] < N) & (k[None, :] < K))


@dataclass(frozen=True)
class Fused:
    """What is computed beside a product; all of it may be left out. ``which`` int64 [J], ``ranks``: J / tokens."""

    norm: torch.Tensor | None = None
    eps: float = 0.0
    pair: bool = False
    residual: torch.Tensor | None = None
    which: torch.Tensor | None = None
    ranks: int = 0


def token(x: torch.Tensor, w: Packed, tile: Tile, dtype: torch.dtype, fused: Fused) -> torch.Tensor:
    """x [1, K], or with experts [T, K] -> [1 or J, N] in ``dtype`` (N / 2 of a pair), by a dense weight or codes."""
    shape = (w.out_features // 2 if fused.pair else w.out_features, w.in_features)
    outputs = min(tile.outputs // 2 if fused.pair else tile.outputs, power(shape[0]))
    count = 1 if fused.which is None else len(fused.which)
    y = torch.empty(count, shape[0], dtype=dtype, device=x.device)
    flags = {
        "NORM": fused.norm is not None,
        "PAIR": fused.pair,
        "BIAS": w.bias is not None,
        "ADD": fused.residual is not None,
        "RANKS": fused.ranks,
    }
    ends = (_or(w.bias, y), _or(fused.residual, y), _or(fused.which, y), y, w.out_features, shape[1])
    grid = (cdiv(shape[0], outputs), count)
    if w.kind == "dense":
        matrix = w.data["weight"]
        sizes = {"BN": outputs, "BK": min(tile.inputs, power(shape[1]))}
        args = (x, _or(fused.norm, y), matrix, *ends, fused.eps)
        launch(dense_token, grid, *args, warps=tile.warps, **sizes, **flags)
    else:
        codes, perm = codes_of(w, y), w.data["perm"]
        pointers = (x, _or(fused.norm, y), _or(perm, y), *codes.tensors)
        sizes = {"BN": outputs, "BG": codes.at_once(tile.inputs)}
        constants = {**codes.constants, "PERM": perm is not None}
        launch(
            codes_token,
            grid,
            *pointers,
            *ends,
            codes.groups,
            fused.eps,
            warps=tile.warps,
            **constants,
            **sizes,
            **flags,
        )
    return y


def tokens(x: torch.Tensor, w: Packed, tile: Tile) -> torch.Tensor:
    """x [T, K] (not many) -> [T, N] by codes."""
    if w.data["perm"] is not None:
        x = x.index_select(-1, w.data["perm"])
    y = torch.empty(len(x), w.out_features, dtype=x.dtype, device=x.device)
    codes = codes_of(w, y)
    args = (x, *codes.tensors, _or(w.bias, y), y, len(x), w.out_features, w.in_features, codes.groups)
    outputs = min(tile.outputs, power(w.out_features, 16))  # 16: the least that a tensor product takes
    groups = max(codes.at_once(tile.inputs), 16 // w.group_size)
    sizes = {"BT": power(len(x), 16), "BN": outputs, "BG": groups}
    grid = (cdiv(w.out_features, outputs),)
    launch(codes_tokens, grid, *args, warps=tile.warps, **codes.constants, **sizes, BIAS=w.bias is not None)
    return y


def matrix(w: Packed, dtype: torch.dtype, tile: Tile) -> torch.Tensor:
    """Codes -> [N, K] in ``dtype``, columns in the order of the codes (see perm)."""
    y = torch.empty(w.out_features, w.in_features, dtype=dtype, device=w.data["words"].device)
    codes = codes_of(w, y)
    groups, outputs = codes.at_once(tile.inputs), min(tile.outputs, power(w.out_features))
    grid = (cdiv(w.out_features, outputs), cdiv(codes.groups, groups))
    args = (*codes.tensors, y, w.out_features, w.in_features, codes.groups)
    sizes = {"BN": outputs, "BG": groups}
    launch(codes_matrix, grid, *args, warps=tile.warps, **codes.constants, **sizes)
    return y


@dataclass(frozen=True)
class Codes:
    """What the kernels are told of codes: words, scales, zeros or offsets (anything where there are none)."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    groups: int
    constants: dict[str, int]

    def at_once(self, inputs: int) -> int:
        """As many groups as have so many inputs, or all."""
        return min(max(1, inputs // self.constants["GROUP"]), power(self.groups))


def codes_of(w: Packed, anything: torch.Tensor) -> Codes:
    """A linear's codes; ``anything``: a tensor for what they do not have."""
    zeros, offsets = w.data.get("zeros"), w.data.get("offsets")
    mode = OFFSETS if offsets is not None else ZEROS if zeros is not None else CONSTANT
    tensors = (w.data["words"], w.data["scales"], _or(offsets if zeros is None else zeros, anything))
    constants = {"zero": w.data.get("zero", 0), "BITS": w.bits, "GROUP": w.group_size, "MODE": mode.value}
    return Codes(tensors, w.data["scales"].shape[-1], constants)


def _or(tensor: torch.Tensor | None, anything: torch.Tensor) -> torch.Tensor:
    """A pointer for a kernel that does not look at it."""
    return anything if tensor is None else tensor
