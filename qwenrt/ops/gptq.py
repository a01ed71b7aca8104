"""GPTQ's int4 and int8 bits on disk <-> CanonicalWeight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.ops.stored import (
    SCALE_DTYPES,
    WORD_BITS,
    WORD_DTYPES,
    bias_unless_zero,
    check_stored,
    dtype_name,
    gptq_shapes,
    half_scales,
)
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import code_tensors, pack_words, unpack_words, with_codes

if TYPE_CHECKING:
    from qwenrt.config import QuantConfig


_NEARLY_ALL = 0.9  # of the zeros; groups of padding or of nothing but zeros may have others


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
    keep_words: bool = False,
) -> CanonicalWeight:
    """One GPTQ linear, as AutoGPTQ wrote it, in the canonical form.

    With K = in_features, N = out_features, b = quant.bits, G = ceil(K / group_size): ``qweight`` int32
    [K*b/32, N], ``qzeros`` int32 [G, N*b/32], ``scales`` float [G, N], ``g_idx`` int [K] (arange(K) // group_size
    where it is absent, empty or, without desc_act, a placeholder of zeros), ``bias`` [N] or None; a bias of zeros,
    which AutoGPTQ adds to every linear, is dropped.
    W[n, k] = scales[g_idx[k], n] * (q[k, n] - (stored_zero[g_idx[k], n] + quant.zero_offset)), without masking the
    sum to b bits: a stored 15 is a true zero of 16, as AutoGPTQ computes it. A ``quant.sym`` is taken at its word
    where nearly all zeros are one number (_true_zeros). ``keep_words`` leaves the codes in ``qweight``, as the
    result's ``words``. Raises CheckpointError that names the module when a shape, dtype or index is wrong.
    """
    _check_bits(quant.bits, name)
    group_size = _group_size(quant.group_size, in_features, name)
    shapes = gptq_shapes(out_features, in_features, quant.bits, group_size)
    check_stored(
        f"{name}: reading a GPTQ linear with {in_features} inputs, {out_features} outputs, {quant.bits} bits, "
        f"group_size {group_size}",
        "a GPTQ tool",
        qweight=(qweight, shapes["qweight"], WORD_DTYPES),
        qzeros=(qzeros, shapes["qzeros"], WORD_DTYPES),
        scales=(scales, shapes["scales"], SCALE_DTYPES),
        bias=(bias, (out_features,), SCALE_DTYPES),
    )
    zeros = _true_zeros(unpack_words(qzeros.t(), quant.bits)[:out_features].t().to(torch.int16), quant, name)
    perm = None
    if g_idx is not None and g_idx.numel() > 0:
        g_idx = _checked_g_idx(g_idx, in_features, group_size, scales.shape[0], quant, name)
        if not torch.equal(g_idx, torch.arange(in_features) // group_size):
            perm, group_size, order = _sort_groups(g_idx, group_size)
            if order is not None:
                scales, zeros = scales.index_select(0, order), zeros.index_select(0, order)
    elif quant.desc_act and len(scales) > 1:
        raise CheckpointError(
            f"{name}: reading a GPTQ linear quantised in activation order (desc_act true)",
            "the checkpoint holds no g_idx, so the group of each input is unknown",
            "Set desc_act to false in its config if it was quantised without; else only its author has the order.",
        )
    weight = CanonicalWeight(
        scales=scales.contiguous(),
        zeros=zeros.contiguous(),
        bits=quant.bits,
        group_size=group_size,
        perm=perm,
        bias=bias_unless_zero(bias),
        words=(qweight,),
        num_inputs=in_features,
    )
    return weight if keep_words and qweight.dtype == torch.int32 else with_codes(weight)


def _true_zeros(stored: torch.Tensor, quant: QuantConfig, name: str) -> torch.Tensor:
    """Stored zeros, int16, as what codes are measured from.

    Of a symmetric weight that is the middle code m. Version 1 of the format stores m - 1 for it and version 2 m, and
    some tools write one under the name of the other, which kernels for symmetric weights, as they look at no zeros,
    never show: what nearly all zeros are tells. Zeros of many values show that the flag is wrong, and are taken as
    they stand.
    """
    middle, stated = 2 ** (quant.bits - 1), quant.zero_offset
    if quant.sym and float((stored == middle - (1 - stated)).float().mean()) > _NEARLY_ALL:
        return stored + (1 - stated)
    low, high = int(stored.min()), int(stored.max())
    if quant.sym and low == high != middle - stated:
        raise CheckpointError(
            f"{name}: reading a symmetric GPTQ linear of {quant.bits} bits",
            f"every stored zero is {low}, and sym: true means {middle}, which is stored as {middle - 1} or {middle}",
            "Set sym to false in the quantisation config if the zeros are meant as they are stored.",
        )
    return stored + stated


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


def _checked_g_idx(
    g_idx: torch.Tensor, in_features: int, group_size: int, groups: int, quant: QuantConfig, name: str
) -> torch.Tensor:
    """``g_idx`` as int64 on the CPU, what it stands for where it is a placeholder, or CheckpointError."""
    asked = f"{name}: reading g_idx, the group of each of {in_features} inputs"
    remedy = "Scales and g_idx are not of one quantisation: its author must write the file again."
    if g_idx.is_floating_point() or tuple(g_idx.shape) != (in_features,):
        found = f"it has shape {list(g_idx.shape)} and dtype {dtype_name(g_idx.dtype)}"
        raise CheckpointError(asked, f"{found}, expected integers [{in_features}]", remedy)
    g_idx = g_idx.to("cpu", torch.int64)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise CheckpointError(asked, f"groups {low} to {high}, but scales hold 0 to {groups - 1}", remedy)
    if groups > 1 and high == 0 and not quant.desc_act:
        return torch.arange(in_features) // group_size
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


def pack_gptq(weight: CanonicalWeight, *, zero_offset: int = 1) -> dict[str, torch.Tensor]:
    """The tensors GPTQ keeps on disk for a quantised weight: qweight, qzeros, scales (float16), g_idx, bias.

    ``zero_offset`` 1 writes v1 (stored zero = true zero - 1), 0 writes v2. Inverse of unpack_gptq. The
    bias is written even when there is none (zeros), as AutoGPTQ does. Raises ConfigError when the format
    cannot hold it.
    """
    codes, scales, zeros = code_tensors(weight)
    bits, per_word = weight.bits, WORD_BITS // weight.bits
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
        "qweight": pack_words(codes, bits),
        "qzeros": pack_words(stored.t().contiguous(), bits).t().contiguous(),
        "scales": half_scales(scales, asked),
        "g_idx": g_idx.to(torch.int32),
        "bias": bias.to(torch.float16),
    }
