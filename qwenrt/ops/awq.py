"""AWQ's int4 bits on disk (the gemm layout) <-> CanonicalWeight."""

from __future__ import annotations

import torch

from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.ops.stored import (
    SCALE_DTYPES,
    WORD_BITS,
    WORD_DTYPES,
    awq_shapes,
    bias_unless_zero,
    check_stored,
    half_scales,
)
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import code_tensors

_BITS = 4
_PER_WORD = WORD_BITS // _BITS
# Nibble i of word c, lowest bits first, holds output 8 * c + _ORDER[i]: the even outputs, then the odd ones.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_awq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    group_size: int,
    in_features: int,
    out_features: int,
    name: str,
) -> CanonicalWeight:
    """One AWQ linear of the gemm layout in the canonical form.

    With K = in_features, N = out_features, G = K / group_size (-1: one group): ``qweight`` int32 [K, N/8],
    ``qzeros`` int32 [G, N/8], ``scales`` float [G, N], ``bias`` [N] or None (one of zeros is dropped).
    W[n, k] = scales[k // group_size, n] * (q[k, n] - zero[k // group_size, n]): the stored zero is the true one.
    The format has no place for a group that is not full or outputs that do not fill their words: such sizes are
    refused, as the tools that write it refuse them. Raises CheckpointError that names the module.
    """
    asked = f"{name}: reading an AWQ linear with {in_features} inputs, {out_features} outputs, group_size {group_size}"
    group = in_features if group_size == -1 else group_size
    reason = _unfit(in_features, out_features, group)
    if reason:
        raise CheckpointError(
            asked, reason, "The config is of another model, or the files are not AWQ's gemm layout."
        )
    shapes = awq_shapes(out_features, in_features, group)
    check_stored(
        asked,
        "an AWQ tool (gemm layout)",
        qweight=(qweight, shapes["qweight"], WORD_DTYPES),
        qzeros=(qzeros, shapes["qzeros"], WORD_DTYPES),
        scales=(scales, shapes["scales"], SCALE_DTYPES),
        bias=(bias, (out_features,), SCALE_DTYPES),
    )
    return CanonicalWeight(
        codes=_unpack_columns(qweight),
        scales=scales.contiguous(),
        zeros=_unpack_columns(qzeros).to(torch.int16),
        bits=_BITS,
        group_size=group,
        bias=bias_unless_zero(bias),
    )


def pack_awq(weight: CanonicalWeight) -> dict[str, torch.Tensor]:
    """The tensors AWQ keeps on disk for a 4-bit weight: qweight, qzeros, scales (float16) and, where it has one,
    bias (float16). Inverse of unpack_awq. Raises ConfigError when the format cannot hold the weight.
    """
    codes, scales, zeros = code_tensors(weight)
    in_features, out_features = codes.shape
    asked = f"writing a [{out_features}, {in_features}] weight as AWQ"
    low, high = int(zeros.min()), int(zeros.max())
    reason = _unfit(in_features, out_features, weight.group_size)
    if weight.bits != _BITS:
        reason = f"it has {weight.bits} bits, the format {_BITS}"
    elif weight.perm is not None:
        reason = "its inputs are in activation order, for which the format has no place"
    elif low < 0 or high >= 2**_BITS:
        reason = f"zeros from {low} to {high} do not fit in {_BITS} bits"
    if reason:
        raise ConfigError(asked, reason, "Write it as GPTQ, or leave this linear dense.")
    tensors = {
        "qweight": _pack_columns(codes),
        "qzeros": _pack_columns(zeros),
        "scales": half_scales(scales, asked),
    }
    if weight.bias is not None:
        tensors["bias"] = weight.bias.to(torch.float16)
    return tensors


def _unfit(in_features: int, out_features: int, group: int) -> str:
    """Why the format cannot hold a matrix of these sizes; empty where it can."""
    if group < 1:
        return f"a group has {group} inputs; it must be -1 (all of them) or at least 1"
    if in_features < 1 or in_features % group:
        return f"{in_features} inputs are no multiple of the group of {group}"
    if out_features < 1 or out_features % _PER_WORD:
        return f"{out_features} outputs are no multiple of {_PER_WORD}, the codes in one int32"
    return ""


def _unpack_columns(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] -> uint8 [R, 8 * C]."""
    codes = torch.empty(*words.shape, _PER_WORD, dtype=torch.uint8)
    for i, column in enumerate(_ORDER):
        # masked: the shift of a negative word drags its sign
        codes[..., column] = (words >> (i * _BITS)).bitwise_and_(2**_BITS - 1)
    return codes.flatten(1)


def _pack_columns(codes: torch.Tensor) -> torch.Tensor:
    """Inverse of _unpack_columns: integers in [0, 16) -> int32."""
    columns = codes.reshape(codes.shape[0], -1, _PER_WORD)
    words = torch.zeros(columns.shape[:2], dtype=torch.int32)
    for i, column in enumerate(_ORDER):
        words |= columns[..., column].to(torch.int32) << (i * _BITS)
    return words
