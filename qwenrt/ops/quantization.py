"""A dense matrix rounded to 8- or 4-bit codes, in groups of inputs that share a scale and a zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from qwenrt.config.quant import GROUP_SIZE
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.ops.types import CanonicalWeight

# Shares of a group's range tried when rounding to 4 bits. Less than all clips outliers, which lowers the squared error;
# more than all moves the steps against the weights. In groups of 32, 46 shares from 1.1 to 0.65 take off 0.2 % more.
CLIPS = {4: (1.1, 1.06, 1.02, 0.99, 0.96, 0.92, 0.86), 8: (1.0,)}
# Sums over a group: lane j has elements j, j + 32, ... in turn, then the lanes are added by halves.
_SUM_LANES = 32
_ZERO_BITS = 15  # of a float16 scale: the least of its 11 digits, where a zero of 4-bit codes has room
_BLOCK_ELEMENTS = 1 << 17  # elements converted at once: float32 temporaries stay in the second-level cache


def quantize_dense(
    weight: torch.Tensor,
    bits: int,
    group_size: int = GROUP_SIZE,
    bias: torch.Tensor | None = None,
    *,
    sym: bool = False,
    name: str = "weight",
) -> CanonicalWeight:
    """``weight`` [N, K] rounded to ``bits`` (4 or 8) in groups of ``group_size`` inputs (-1: all of them).

    Round to nearest. For 4 bits several clips of each group's range are tried, and each group keeps the
    one of least squared error; the scale is then the least-squares one for the codes it got. ``sym`` fixes
    the zero at the middle code. Zeros lie in [1, 2**bits - 1], so v1 and v2 of GPTQ can hold the result.
    Scales are float16 where this costs no precision, else float32. Raises ConfigError for other bits,
    CheckpointError for values that are not finite.
    """
    rows, columns = weight.shape
    return quantize_rows(
        lambda part: weight[part].to("cpu", torch.float32),
        (rows, columns),
        bits,
        group_size,
        bias,
        sym=sym,
        name=name,
    )


def quantize_rows(
    read: Callable[[slice], torch.Tensor],
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
    *,
    sym: bool,
    name: str,
) -> CanonicalWeight:
    """quantize_dense of a matrix [N, K] that is never whole: ``read(part)`` gives float32 rows [n, K] of it."""
    asked = f"quantising {name} of shape {list(shape)}"
    rows, columns = shape
    group_size, groups = groups_of(shape, bits, group_size, name)
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    scales = torch.empty(groups, rows)
    zeros = torch.empty(groups, rows, dtype=torch.int16)
    for part in row_blocks(rows, columns):
        block = read(part)
        if not bool(torch.isfinite(block).all()):
            bad = sum(int((~torch.isfinite(read(each))).sum()) for each in row_blocks(rows, columns))
            raise CheckpointError(
                asked,
                f"{bad} values are not finite",
                "Training or conversion broke it: use an earlier step of it.",
            )
        padded = torch.nn.functional.pad(block, (0, groups * group_size - columns))
        q, scale, zero = _quantize_groups(padded.view(-1, groups, group_size), bits, sym)
        if not bool(torch.isfinite(scale).all()):
            raise CheckpointError(
                asked,
                f"values up to {float(block.abs().max()):.1e} are too large for float32 sums",
                "Load the model without quantize.",
            )
        codes[:, part] = q.view(q.shape[0], -1)[:, :columns].t()
        scales[:, part], zeros[:, part] = scale.t(), zero.t()
    return CanonicalWeight(
        codes=codes,
        scales=narrow_scales(scales, zeros, bits),
        zeros=zeros,
        bits=bits,
        group_size=group_size,
        bias=bias,
    )


def groups_of(shape: tuple[int, int], bits: int, group_size: int, name: str) -> tuple[int, int]:
    """(size, number) of the groups in which a matrix [N, K] is rounded, or ConfigError."""
    if bits not in CLIPS:
        raise ConfigError(f"quantising {name} to {bits} bits", "4 and 8 are supported", "Use int4 or int8.")
    size = shape[1] if group_size == -1 else min(group_size, shape[1])
    if size < 1:
        raise ConfigError(
            f"quantising {name} of shape {list(shape)}", f"group_size {size}", f"Use {GROUP_SIZE}."
        )
    return size, math.ceil(shape[1] / size)


def narrow_scales(scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 scales of codes as float16 where this costs no precision.

    The last four bits of a scale of 4-bit codes become its zero, so that kernels need no zeros beside the scales. That
    moves a scale by 0.8 % at most, a twentieth of what rounding to 4 bits moves the weights by. Where it would move one
    further, beyond the normal numbers of float16, all are left as they are.
    """
    half = scales.to(torch.float16)
    if bool(((half.float() - scales).abs() > scales * 2.0**-10).any()):
        return scales
    if bits != 4 or bool((zeros == zeros[:1, :1]).all()):  # one zero for all takes no room
        return half
    inside = _with_zeros_inside(half, zeros)
    return inside if bool(((inside.float() - half.float()).abs() <= half.float() * 2.0**-7).all()) else half


def _with_zeros_inside(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The float16 next to each scale whose last four bits are its zero, 0 to 15."""
    patterns, zeros = scales.view(torch.int16).to(torch.int32), zeros.to(torch.int32)
    nearest = (patterns - zeros + 8 & ~_ZERO_BITS) + zeros
    return nearest.to(torch.int16).view(torch.float16)


def zeros_in_scales(scales: torch.Tensor, zeros: torch.Tensor) -> bool:
    """Whether the last four bits of each float16 scale are its zero."""
    return bool((scales.view(torch.int16) & _ZERO_BITS == zeros).all())


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix in slices small enough to convert at once."""
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _quantize_groups(
    w: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w float32 [R, G, group] -> codes uint8 [R, G, group], scales float32 [R, G], zeros [R, G]."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    high = w.amax(dim=-1).clamp_(min=0)
    low = w.amin(dim=-1).clamp_(max=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    span = high - low
    empty = span < torch.finfo(torch.float32).tiny * 2 * top  # all zeros, or too small for a normal scale
    span = torch.where(empty, torch.ones_like(span), span)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    best_gain = torch.empty(0)
    for clip in CLIPS[bits]:
        step = span * (clip / top)
        zero = torch.full_like(step, middle) if sym else (-low * clip / step).round_().clamp_(1, top)
        steps = (w / step[..., None]).round_()
        steps = torch.minimum(torch.maximum(steps, -zero[..., None]), (top - zero)[..., None])
        # With s = <w, q> / <q, q> the squared error is <w, w> - <w, q>^2 / <q, q>: the largest gain is best.
        wq, qq = _sum(w * steps), _sum(steps * steps)
        scale = torch.where(qq > 0, wq / qq.clamp(min=1), step)
        gain = wq * scale
        if best is None:
            best, best_gain = (steps, scale, zero), gain
            continue
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        mask = better[..., None]
        best = (
            torch.where(mask, steps, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, zero, best[2]),
        )
    assert best is not None
    steps, scale, zero = best
    scale = torch.where(empty, torch.ones_like(scale), scale)
    return (steps + zero[..., None]).to(torch.uint8), scale, zero


def _sum(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [...] in a stated order, so that other code can give the same bits."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % _SUM_LANES))
    lanes = padded.view(*x.shape[:-1], -1, _SUM_LANES)
    total: torch.Tensor = lanes[..., 0, :]
    for i in range(1, lanes.shape[-2]):
        total = total + lanes[..., i, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]
