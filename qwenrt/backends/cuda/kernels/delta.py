"""A gated delta net of one token of each sequence, between its linears. Defined by Backend.decode_delta_net and
ops/delta.py: decode_conv, rates, decode_delta and gated_norm.

A sequence's state is read and written once, by the programs of its value heads: each holds all of one head's matrix, so
that the norm of what is read from it is its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenrt.backends.cuda.kernels.launch import cdiv, launch, power
from qwenrt.ops.delta import L2_EPS
from qwenrt.ops.steps import DecodePlan, LayerState
from qwenrt.ops.types import DeltaWeights

_CHANNELS = 512  # of a row that a program of the convolution computes
_L2_EPS = tl.constexpr(L2_EPS)


@triton.jit
def conv_row(
    x_ptr, weight_ptr, kept_ptr, states_ptr, position_ptr, y_ptr, channels, stride, TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some channels of one row: silu of the sum over its last TAPS inputs, of which all but the newest are kept."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    inside = c < channels
    kept = kept_ptr + tl.load(states_ptr + row) * ((TAPS - 1) * channels) + c
    begun = tl.load(position_ptr + row) + 0 * c > 0
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TAPS - 1):
        x = tl.load(kept + j * channels, mask=inside & begun, other=0.0)
        total += x.to(dtype).to(tl.float32) * tl.load(weight_ptr + j * channels + c, mask=inside).to(
            tl.float32
        )
        if j > 0:
            tl.store(kept + (j - 1) * channels, x, mask=inside)
    x = tl.load(x_ptr + row * stride + c, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + (TAPS - 1) * channels + c, mask=inside).to(tl.float32)
    total += x.to(tl.float32) * weight
    if TAPS > 1:
        tl.store(kept + (TAPS - 2) * channels, x.to(kept_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + row * channels + c, tl.div_rn(total, 1.0 + tl.exp(-total)).to(dtype), mask=inside)


@triton.jit
def unit_head(x_ptr, at, inside):
    """A query or a key over its length, float32 [BK]."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 0) + _L2_EPS)


@triton.jit
def delta_head(
    mixed_ptr, z_ptr, rates_ptr, log_decay_ptr, decay_bias_ptr, norm_ptr, kept_ptr, states_ptr, position_ptr, y_ptr,
    z_stride, rates_stride, eps, scale,
    NK: tl.constexpr, NV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, TILED: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """One value head of one row: its state moves on, and what is read of it is normed and gated."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_keys = head % NK if TILED else head // (NV // NK)
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    mixed = mixed_ptr + row * (2 * NK * DK + NV * DV)
    q = unit_head(mixed, of_keys * DK + i, i < DK) * scale
    k = unit_head(mixed, (NK + of_keys) * DK + i, i < DK)
    v = tl.load(mixed + 2 * NK * DK + head * DV + j, mask=j < DV, other=0.0).to(tl.float32)

    b = tl.load(rates_ptr + row * rates_stride + head).to(tl.float32)
    a = tl.load(rates_ptr + row * rates_stride + NV + head).to(tl.float32) + tl.load(decay_bias_ptr + head)
    beta = 1.0 / (1.0 + tl.exp(-b))
    softplus = tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))
    forget = tl.exp(-tl.exp(tl.load(log_decay_ptr + head)) * softplus)

    inside = (i < DK)[:, None] & (j < DV)[None, :]
    kept = kept_ptr + (tl.load(states_ptr + row) * NV + head) * (DK * DV) + i[:, None] * DV + j[None, :]
    begun = tl.load(position_ptr + row) + 0 * i > 0
    s = tl.load(kept, mask=inside & begun[:, None], other=0.0)
    d = beta * (v - tl.sum(k[:, None] * s, 0) * forget)
    o = tl.sum(q[:, None] * s, 0) * forget + tl.sum(k * q, 0) * d
    tl.store(kept, s * forget + k[:, None] * d[None, :], mask=inside)

    dtype: tl.constexpr = y_ptr.dtype.element_ty
    at = head * DV + j
    normed = (o * tl.rsqrt(tl.sum(o * o, 0) / DV + eps)).to(dtype).to(tl.float32)
    z = tl.load(z_ptr + row * z_stride + at, mask=j < DV, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + j, mask=j < DV, other=0.0)
    y = normed * weight * tl.div_rn(z, 1.0 + tl.exp(-z))
    tl.store(y_ptr + row * (NV * DV) + at, y.to(dtype), mask=j < DV)


def decode_delta_net(
    projected: torch.Tensor,
    rates: torch.Tensor,
    w: DeltaWeights,
    eps: float,
    state: LayerState,
    plan: DecodePlan,
    warps: int,
) -> torch.Tensor:
    """projected [B, C + nv dv], rates [B, 2 nv] -> [B, nv dv]; ``state`` moves on. ``warps``: of a program that holds a
    head's matrix."""
    (nk, nv, dk, dv), rows = w.heads, len(projected)
    taps, channels = w.conv.shape
    projected, rates = (x if x.stride(-1) == 1 else x.contiguous() for x in (projected, rates))
    mixed = projected.new_empty(rows, channels)
    y = projected.new_empty(rows, nv * dv)
    block = min(_CHANNELS, power(channels))
    kept = (state.conv, plan.states, plan.position)
    sizes = {"TAPS": taps, "BLOCK": block}
    grid = (rows, cdiv(channels, block))
    launch(conv_row, grid, projected, w.conv, *kept, mixed, channels, projected.stride(0), **sizes)
    own, kept = (w.log_decay, w.decay_bias, w.out_norm), (state.delta, plan.states, plan.position)
    strides = (projected.stride(0), rates.stride(0))
    sizes = {"NK": nk, "NV": nv, "DK": dk, "DV": dv, "BK": power(dk), "BV": power(dv)}
    args = (mixed, projected[:, channels:], rates, *own, *kept, y, *strides, eps, dk**-0.5)
    launch(delta_head, (rows, nv), *args, warps=warps, TILED=w.tiled, **sizes)
    return y
