"""Canonical weights: their codes, several merged to one, and the matrix that one stands for."""

from __future__ import annotations

import dataclasses

import torch

from qwenrt.errors import ConfigError
from qwenrt.ops.stored import WORD_BITS
from qwenrt.ops.types import CanonicalWeight


def merge(weights: list[CanonicalWeight]) -> CanonicalWeight | None:
    """One weight whose outputs are those of ``weights`` in turn, or None where they cannot be merged.

    Dense ones merge with dense ones; quantised ones when bits, group_size and perm are equal and all have zeros or
    all have offsets. A part without a bias counts as one with zeros.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    forms = {(w.in_features, w.bits, w.group_size, w.dense is None, w.offsets is None) for w in weights}
    if len(forms) > 1:
        return None
    if not all(_same_perm(first.perm, w.perm) for w in weights):
        return None
    bias = _merged_bias(weights)
    if first.dense is not None:
        dense = [w.dense for w in weights if w.dense is not None]
        return CanonicalWeight(dense=torch.cat(dense), bias=bias)
    if all(w.words for w in weights):
        return dataclasses.replace(
            first,
            words=tuple(words for w in weights for words in w.words),
            scales=torch.cat([w.scales for w in weights if w.scales is not None], dim=1),
            zeros=torch.cat([w.zeros for w in weights if w.zeros is not None], dim=1),
            bias=bias,
        )
    weights = [with_codes(w) for w in weights]

    def side_by_side(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        given = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(given, dim=1) if given else None

    return dataclasses.replace(
        weights[0],
        codes=side_by_side([w.codes for w in weights]),
        scales=side_by_side([w.scales for w in weights]),
        zeros=side_by_side([w.zeros for w in weights]),
        offsets=side_by_side([w.offsets for w in weights]),
        bias=bias,
    )


def take_rows(weight: CanonicalWeight, rows: list[int]) -> CanonicalWeight:
    """The same linear with its outputs in another order: output i is the former output rows[i]. Exact in every form, as
    an output's codes, scales and zeros are its own."""
    index = torch.tensor(rows)

    def taken(tensor: torch.Tensor | None, dim: int) -> torch.Tensor | None:
        return None if tensor is None else tensor.index_select(dim, index)

    words = (torch.cat(weight.words, dim=1).index_select(1, index),) if weight.words else ()
    return dataclasses.replace(
        weight,
        dense=taken(weight.dense, 0),
        codes=taken(weight.codes, 1),
        scales=taken(weight.scales, 1),
        zeros=taken(weight.zeros, 1),
        offsets=taken(weight.offsets, 1),
        bias=taken(weight.bias, 0),
        words=words,
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
    """[N, K] in ``dtype`` (default: that of the scales, or of the dense weight), columns in the order of x.

    scale * (code - zero) is exact in float32 for float16 and bfloat16 scales and is rounded once to
    ``dtype``, so float16 equals AutoGPTQ's half-precision product bit for bit. scale * code + offset is rounded twice
    to float32 before that.
    """
    if weight.dense is not None:
        return weight.dense if dtype is None else weight.dense.to(dtype)
    codes, scales, zeros = code_tensors(weight)
    dtype = scales.dtype if dtype is None else dtype
    out = torch.empty(codes.shape[1], codes.shape[0], dtype=dtype, device=codes.device)
    for g in range(scales.shape[0]):
        rows = slice(g * weight.group_size, (g + 1) * weight.group_size)
        part = codes[rows].to(torch.float32).sub_(zeros[g]).mul_(scales[g])
        if weight.offsets is not None:
            part += weight.offsets[g]
        if weight.perm is None:
            out[:, rows] = part.t()
        else:
            out[:, weight.perm[rows].long()] = part.t().to(dtype)
    return out


def code_tensors(weight: CanonicalWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes, scales and zeros (all 0 beside offsets) of a quantised weight; ConfigError for a dense one."""
    zeros = weight.zeros
    if zeros is None and weight.offsets is not None:
        zeros = torch.zeros_like(weight.offsets, dtype=torch.int16)
    if weight.codes is None or weight.scales is None or zeros is None:
        raise ConfigError("reading a weight's codes", "it is dense", "Quantise it first (quantize_dense).")
    return weight.codes, weight.scales, zeros


def with_codes(weight: CanonicalWeight) -> CanonicalWeight:
    """The same weight with ``codes``, unpacked where it has ``words``."""
    if not weight.words:
        return weight
    order = None if weight.perm is None else weight.perm.long()
    parts = []
    for words in weight.words:
        codes = unpack_words(words, weight.bits)[: weight.in_features]
        parts.append(codes if order is None else codes.index_select(0, order))
    codes = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)
    return dataclasses.replace(weight, codes=codes, words=(), num_inputs=0)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C] -> uint8 [R * 32 / bits, C]: word r holds rows r*32/bits and on, lowest bits first."""
    per_word, mask = WORD_BITS // bits, 2**bits - 1
    codes = torch.empty(words.shape[0], per_word, words.shape[1], dtype=torch.uint8)
    for j in range(per_word):
        # masked: the shift of a negative word drags its sign
        codes[:, j] = (words >> (j * bits)).bitwise_and_(mask)
    return codes.view(words.shape[0] * per_word, words.shape[1])


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of unpack_words: integers in [0, 2**bits) -> int32."""
    per_word = WORD_BITS // bits
    rows = codes.view(codes.shape[0] // per_word, per_word, codes.shape[1])
    words = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.int32)
    for j in range(per_word):
        words |= rows[:, j].to(torch.int32) << (j * bits)
    return words
