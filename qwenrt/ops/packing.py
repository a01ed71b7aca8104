"""GPTQ's int4 and int8 bits on disk <-> CanonicalWeight, and quantising a dense matrix to it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.ops.types import CanonicalWeight

if TYPE_CHECKING:
    from qwenrt.config import QuantConfig

_WORD = 32  # GPTQ packs codes into int32 words, lowest bits first
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Shares of a group's range tried when rounding to 4 bits: clipping the outliers often lowers the squared
# error.
_CLIPS = {4: (1.0, 0.96, 0.92, 0.88, 0.83, 0.78, 0.72), 8: (1.0,)}
_BLOCK_ELEMENTS = 1 << 17  # elements quantised at once: float32 temporaries stay in the second-level cache


def unpack_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    quant: QuantConfig,
    in_features: int,
    out_features: int,
    name: str,
) -> CanonicalWeight:
    """One GPTQ linear, as AutoGPTQ wrote it, in the canonical form.

    With K = in_features, N = out_features, b = quant.bits, G = ceil(K / group_size): ``qweight`` int32
    [K*b/32, N], ``qzeros`` int32 [G, N*b/32], ``scales`` float [G, N], ``g_idx`` int [K] (absent or empty:
    arange(K) // group_size), ``bias`` [N] or None; a bias of zeros, which AutoGPTQ adds to every linear,
    is dropped. W[n, k] = scales[g_idx[k], n] * (q[k, n] - (stored_zero[g_idx[k], n] + quant.zero_offset)),
    without masking the sum to b bits: a stored 15 is a true zero of 16, as AutoGPTQ computes it. Zeros are
    always read, whatever ``quant.sym`` says. Raises CheckpointError that names the module when a shape,
    dtype or index is wrong.
    """
    _check_bits(quant.bits, name)
    group_size = _group_size(quant.group_size, in_features, name)
    _check_tensors(qweight, qzeros, scales, bias, quant.bits, group_size, in_features, out_features, name)
    codes = _unpack_rows(qweight, quant.bits)[:in_features]
    zeros = _unpack_rows(qzeros.t(), quant.bits)[:out_features].t().to(torch.int16) + quant.zero_offset
    perm = None
    if g_idx is not None and g_idx.numel() > 0:
        g_idx = _checked_g_idx(g_idx, in_features, scales.shape[0], quant, name)
        if not torch.equal(g_idx, torch.arange(in_features) // group_size):
            perm, group_size, order = _sort_groups(g_idx, group_size)
            if perm is not None:
                codes = codes.index_select(0, perm.long())
            if order is not None:
                scales, zeros = scales.index_select(0, order), zeros.index_select(0, order)
    elif quant.desc_act:
        raise CheckpointError(
            f"{name}: reading a GPTQ linear quantised in activation order (desc_act true)",
            "the checkpoint holds no g_idx, so the group of each input is unknown",
            "Download the checkpoint again, or set desc_act to false if it was quantised without.",
        )
    if bias is not None and not bool(bias.any()):
        bias = None
    return CanonicalWeight(
        codes=codes.contiguous(),
        scales=scales.contiguous(),
        zeros=zeros.contiguous(),
        bits=quant.bits,
        group_size=group_size,
        perm=perm,
        bias=bias,
    )


def _check_bits(bits: int, name: str) -> None:
    if bits not in (4, 8):
        raise CheckpointError(
            f"{name}: reading a GPTQ linear of {bits} bits",
            "4 and 8 bits are supported",
            "Use the model's Int4 or Int8 release, or the dense one with quantize='int4'.",
        )


def _group_size(group_size: int, in_features: int, name: str) -> int:
    if group_size == -1 or group_size > in_features:
        return in_features
    if group_size < 1:
        raise CheckpointError(
            f"{name}: reading a GPTQ linear",
            f"group_size is {group_size}",
            "It must be -1 (one group for all inputs) or at least 1: correct quantize_config.json.",
        )
    return group_size


def _check_tensors(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    name: str,
) -> None:
    per_word = _WORD // bits
    groups = math.ceil(in_features / group_size)
    wanted: list[tuple[str, torch.Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("qweight", qweight, (math.ceil(in_features / per_word), out_features), (torch.int32,)),
        ("qzeros", qzeros, (groups, math.ceil(out_features / per_word)), (torch.int32,)),
        ("scales", scales, (groups, out_features), _SCALE_DTYPES),
    ]
    if bias is not None:
        wanted.append(("bias", bias, (out_features,), _SCALE_DTYPES))
    asked = (
        f"{name}: reading a GPTQ linear with {in_features} inputs, {out_features} outputs, {bits} bits, "
        f"group_size {group_size}"
    )
    for label, tensor, shape, dtypes in wanted:
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                asked,
                f"{label} has shape {list(tensor.shape)}, expected {list(shape)}",
                "bits or group_size in the config do not describe these files, or they are of another model.",
            )
        if tensor.dtype not in dtypes:
            raise CheckpointError(
                asked,
                f"{label} has dtype {_dtype_name(tensor.dtype)}, "
                f"expected {' or '.join(map(_dtype_name, dtypes))}",
                "The file was not written by a GPTQ tool, or was converted: download it again.",
            )
    bad = int((~torch.isfinite(scales)).sum())
    if bad:
        raise CheckpointError(
            asked,
            f"{bad} of {scales.numel()} scales are not finite",
            "The file is damaged or its quantisation failed: download or quantise it again.",
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked_g_idx(
    g_idx: torch.Tensor, in_features: int, groups: int, quant: QuantConfig, name: str
) -> torch.Tensor:
    """``g_idx`` as int64 on the CPU, or CheckpointError."""
    asked = f"{name}: reading g_idx, the group of each of {in_features} inputs"
    remedy = "The file is damaged or of another model: download it again."
    if g_idx.is_floating_point() or tuple(g_idx.shape) != (in_features,):
        found = f"it has shape {list(g_idx.shape)} and dtype {_dtype_name(g_idx.dtype)}"
        raise CheckpointError(asked, f"{found}, expected integers [{in_features}]", remedy)
    g_idx = g_idx.to("cpu", torch.int64)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise CheckpointError(asked, f"groups {low} to {high}, but scales hold 0 to {groups - 1}", remedy)
    if groups > 1 and high == 0 and not quant.desc_act:
        raise CheckpointError(
            asked,
            f"all zeros, which leaves {groups - 1} of {groups} groups of scales unused: a placeholder",
            "Remove g_idx from the file if the checkpoint was quantised without desc_act.",
        )
    return g_idx


def _sort_groups(
    g_idx: torch.Tensor, group_size: int
) -> tuple[torch.Tensor | None, int, torch.Tensor | None]:
    """(perm, group_size, order): rows in the order ``perm`` (None: as they are) fall into equal groups.

    ``order`` int64 picks the scales of each of these groups (None: as they are). Where the file's groups
    are of unequal sizes they are cut into the largest equal ones, and order repeats their scales.
    """
    in_features = g_idx.shape[0]
    by_group = torch.argsort(g_idx, stable=True)
    sorted_idx = g_idx[by_group]
    in_order = torch.equal(by_group, torch.arange(in_features))
    perm = None if in_order else by_group.to(torch.int32)
    if torch.equal(sorted_idx, torch.arange(in_features) // group_size):
        return perm, group_size, None
    starts = torch.nonzero(sorted_idx[1:] != sorted_idx[:-1]).flatten() + 1
    step = math.gcd(*starts.tolist()) or in_features
    return perm, step, sorted_idx[::step]


def _unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C] -> uint8 [R * 32 / bits, C]: word r holds rows r*32/bits and on, lowest bits first."""
    per_word, mask = _WORD // bits, 2**bits - 1
    codes = torch.empty(words.shape[0], per_word, words.shape[1], dtype=torch.uint8)
    for j in range(per_word):
        codes[:, j] = (words >> (j * bits)).bitwise_and_(
            mask
        )  # masked: the shift of a negative word drags its sign
    return codes.view(words.shape[0] * per_word, words.shape[1])


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of _unpack_rows: integers in [0, 2**bits) -> int32."""
    per_word = _WORD // bits
    rows = codes.view(codes.shape[0] // per_word, per_word, codes.shape[1])
    words = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.int32)
    for j in range(per_word):
        words |= rows[:, j].to(torch.int32) << (j * bits)
    return words


def pack_gptq(weight: CanonicalWeight, *, zero_offset: int = 1) -> dict[str, torch.Tensor]:
    """The tensors GPTQ keeps on disk for a quantised weight: qweight, qzeros, scales (float16), g_idx,
    bias.

    ``zero_offset`` 1 writes v1 (stored zero = true zero - 1), 0 writes v2. Inverse of unpack_gptq. The
    bias is written even when there is none (zeros), as AutoGPTQ does. Raises ConfigError when the format
    cannot hold it.
    """
    codes, scales, zeros = _quantized(weight)
    bits, per_word = weight.bits, _WORD // weight.bits
    in_features, out_features = codes.shape
    asked = f"writing a [{out_features}, {in_features}] weight as GPTQ of {bits} bits"
    if in_features % per_word or out_features % per_word:
        raise ConfigError(
            asked,
            f"both sizes must be multiples of {per_word}, the codes in one int32",
            "Leave this linear dense.",
        )
    stored = zeros.to(torch.int32) - zero_offset
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high >= 2**bits:
        raise ConfigError(
            asked,
            f"zeros from {low + zero_offset} to {high + zero_offset} do not fit in {bits} bits "
            f"with offset {zero_offset}",
            "Write the other version of the format (zero_offset 0 is v2, 1 is v1).",
        )
    g_idx = torch.arange(in_features) // weight.group_size
    if weight.perm is not None:
        order = weight.perm.long()
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
        g_idx = torch.empty_like(g_idx).index_copy_(0, order, g_idx)
    bias = torch.zeros(out_features) if weight.bias is None else weight.bias
    return {
        "qweight": _pack_rows(codes, bits),
        "qzeros": _pack_rows(stored.t().contiguous(), bits).t().contiguous(),
        "scales": scales.to(torch.float16),
        "g_idx": g_idx.to(torch.int32),
        "bias": bias.to(torch.float16),
    }


def merge(weights: list[CanonicalWeight]) -> CanonicalWeight | None:
    """One weight whose outputs are those of ``weights`` in turn, or None where they cannot share one form.

    Dense ones merge with dense ones; quantised ones when bits, group_size and perm are equal. A part
    without a bias counts as one with zeros.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if len({(w.in_features, w.bits, w.group_size, w.dense is None) for w in weights}) > 1:
        return None
    if not all(_same_perm(first.perm, w.perm) for w in weights):
        return None
    bias = _merged_bias(weights)
    if first.dense is not None:
        dense = [w.dense for w in weights if w.dense is not None]
        return CanonicalWeight(dense=torch.cat(dense), bias=bias)
    parts = [_quantized(w) for w in weights]
    return dataclasses.replace(
        first,
        codes=torch.cat([codes for codes, _, _ in parts], dim=1),
        scales=torch.cat([scales for _, scales, _ in parts], dim=1),
        zeros=torch.cat([zeros for _, _, zeros in parts], dim=1),
        bias=bias,
    )


def _same_perm(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _merged_bias(weights: list[CanonicalWeight]) -> torch.Tensor | None:
    given = [w.bias for w in weights if w.bias is not None]
    if not given:
        return None
    return torch.cat([given[0].new_zeros(w.out_features) if w.bias is None else w.bias for w in weights])


def dequantize(weight: CanonicalWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """[N, K] in ``dtype`` (default: that of the scales, or of the dense weight), columns in the order of
    x.

    scale * (code - zero) is exact in float32 for float16 and bfloat16 scales and is rounded once to
    ``dtype``, so float16 equals AutoGPTQ's half-precision product bit for bit.
    """
    if weight.dense is not None:
        return weight.dense if dtype is None else weight.dense.to(dtype)
    codes, scales, zeros = _quantized(weight)
    dtype = scales.dtype if dtype is None else dtype
    out = torch.empty(codes.shape[1], codes.shape[0], dtype=dtype, device=codes.device)
    for g in range(scales.shape[0]):
        rows = slice(g * weight.group_size, (g + 1) * weight.group_size)
        part = codes[rows].to(torch.float32).sub_(zeros[g]).mul_(scales[g])
        if weight.perm is None:
            out[:, rows] = part.t()
        else:
            out[:, weight.perm[rows].long()] = part.t().to(dtype)
    return out


def _quantized(weight: CanonicalWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if weight.codes is None or weight.scales is None or weight.zeros is None:
        raise ConfigError("reading a weight's codes", "it is dense", "Quantise it first (quantize_dense).")
    return weight.codes, weight.scales, weight.zeros


def quantize_dense(
    weight: torch.Tensor,
    bits: int,
    group_size: int = 128,
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
    if bits not in _CLIPS:
        raise ConfigError(f"quantising {name} to {bits} bits", "4 and 8 are supported", "Use int4 or int8.")
    rows, columns = weight.shape
    group_size = columns if group_size == -1 else min(group_size, columns)
    if group_size < 1:
        raise ConfigError(
            f"quantising {name}", f"group_size {group_size}, shape {[rows, columns]}", "Use 128."
        )
    groups = math.ceil(columns / group_size)
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    scales = torch.empty(groups, rows)
    zeros = torch.empty(groups, rows, dtype=torch.int16)
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        block = weight[part].to("cpu", torch.float32)
        if not bool(torch.isfinite(block).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise CheckpointError(
                f"quantising {name} of shape {[rows, columns]}",
                f"{bad} values are not finite",
                "The file is damaged: download it again.",
            )
        block = torch.nn.functional.pad(block, (0, groups * group_size - columns))
        q, scale, zero = _quantize_groups(block.view(-1, groups, group_size), bits, sym)
        codes[:, part] = q.view(q.shape[0], -1)[:, :columns].t()
        scales[:, part], zeros[:, part] = scale.t(), zero.t()
    half = scales.to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(
            f"quantising {name} of shape {[rows, columns]}",
            f"values up to {float(weight.abs().max()):.1e} are too large for float32 sums",
            "Load the model without quantize.",
        )
    if bool(((half.float() - scales).abs() <= scales * 2.0**-10).all()):
        scales = half
    return CanonicalWeight(
        codes=codes, scales=scales, zeros=zeros, bits=bits, group_size=group_size, bias=bias
    )


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
    for clip in _CLIPS[bits]:
        step = span * (clip / top)
        zero = torch.full_like(step, middle) if sym else (-low * clip / step).round_().clamp_(1, top)
        steps = (w / step[..., None]).round_()
        steps = torch.minimum(torch.maximum(steps, -zero[..., None]), (top - zero)[..., None])
        # With s = <w, q> / <q, q> the squared error is <w, w> - <w, q>^2 / <q, q>: the largest gain is best.
        wq, qq = (w * steps).sum(-1), (steps * steps).sum(-1)
        scale = torch.where(qq > 0, wq / qq.clamp(min=1), step)
        gain = wq * scale
        if best is None:
            best, best_gain = (steps, scale, zero), gain
            continue
        better = gain > best_gain
        best_gain = torch.maximum(gain, best_gain)
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
