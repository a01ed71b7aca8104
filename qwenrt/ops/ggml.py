"""The blocks of GGUF files -> codes, scales and offsets: bit for bit the values that llama.cpp's own tools give.

A decoder takes blocks uint8 [B, bytes] and gives ``Blocks``. A value is scale * (code - zero), or scale * code +
offset, each product and sum rounded once to float32. Where a block has 16-bit factors and 6-bit ones (the K types), the
scale is their float32 product, as in the tools that write these files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from qwenrt.errors import CheckpointError
from qwenrt.ops.ggml_types import CODED, GgmlType
from qwenrt.ops.types import CanonicalWeight

_ZERO = {4: 8, 8: 128}  # the code that stands for 0 in every type without offsets, so that unlike ones merge
_LINES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL and IQ4_XS
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # of MXFP4, doubled
_AT_ONCE = 1 << 20  # elements decoded at once, which bounds the memory for the steps between


class Blocks(NamedTuple):
    """codes uint8 [B, block], one a byte; scales float32 [B, groups] and offsets likewise, None where there are
    none."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None


def unpack(
    kind: str, rows: torch.Tensor, bias: torch.Tensor | None = None, *, name: str = "weight"
) -> CanonicalWeight:
    """A linear from its rows uint8 [N, bytes of a row]. Scales are float16 where that holds them, else float32.
    Raises CheckpointError where scales or offsets are not finite."""
    type_ = CODED[kind]
    count, columns = rows.shape[0], columns_of(type_, rows)
    groups = columns // type_.group_size
    codes = torch.empty(columns, count, dtype=torch.uint8)
    scales = torch.empty(groups, count, dtype=torch.float32 if type_.wide else torch.float16)
    offsets = torch.empty(groups, count) if type_.offsets else None
    for part, blocks in _decoded(type_, rows):
        values = [blocks.scales] if blocks.offsets is None else [blocks.scales, blocks.offsets]
        bad = sum(int((~value.isfinite()).sum()) for value in values)
        if bad:
            raise _not_finite(f"reading {name} ({kind})", f"{bad} scales", part)
        length = part.stop - part.start
        codes[:, part] = blocks.codes.view(length, columns).t()
        scales[:, part] = blocks.scales.view(length, groups).t()
        if offsets is not None and blocks.offsets is not None:
            offsets[:, part] = blocks.offsets.view(length, groups).t()
    zeros = None if type_.offsets else torch.full((groups, count), _ZERO[type_.bits], dtype=torch.int16)
    return CanonicalWeight(
        codes=codes,
        scales=scales,
        zeros=zeros,
        offsets=offsets,
        bits=type_.bits,
        group_size=type_.group_size,
        bias=bias,
    )


def dequantize(
    kind: str, rows: torch.Tensor, dtype: torch.dtype = torch.float32, *, name: str | None = None
) -> torch.Tensor:
    """rows uint8 [N, bytes of a row] -> [N, K], computed in float32 and rounded once to ``dtype``. With a ``name``,
    values that are not finite then are a CheckpointError."""
    type_ = CODED[kind]
    columns = columns_of(type_, rows)
    result = torch.empty(rows.shape[0], columns, dtype=dtype)
    for part, blocks in _decoded(type_, rows):
        codes = blocks.codes.view(*blocks.scales.shape, type_.group_size).to(torch.float32)
        if blocks.offsets is None:
            values = (codes - _ZERO[type_.bits]) * blocks.scales[..., None]
        else:
            values = codes * blocks.scales[..., None] + blocks.offsets[..., None]
        result[part] = values.view(part.stop - part.start, columns)
        if name is not None and not bool(result[part].isfinite().all()):
            raise _not_finite(f"reading {name} ({kind})", "values", part)
    return result


def _not_finite(asked: str, what: str, rows: slice) -> CheckpointError:
    found = f"{what} of its rows {rows.start} to {rows.stop - 1} are NaN or infinite"
    remedy = "Its quantisation failed, or the file is damaged: compare its sha256 with the model page's."
    return CheckpointError(asked, found, remedy)


def columns_of(type_: GgmlType, rows: torch.Tensor) -> int:
    """K of rows uint8 [N, bytes of a row]."""
    return rows.shape[1] // type_.nbytes * type_.block


def _decoded(type_: GgmlType, rows: torch.Tensor) -> Iterator[tuple[slice, Blocks]]:
    """Some rows at a time, and their blocks."""
    step = max(1, _AT_ONCE // max(1, columns_of(type_, rows)))
    for start in range(0, rows.shape[0], step):
        part = slice(start, min(start + step, rows.shape[0]))
        yield part, _DECODERS[type_.name](rows[part].reshape(-1, type_.nbytes))


# ---- pieces of blocks


def _half(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 2 n] -> the float16 numbers in it, float32 [B, n]."""
    return raw.contiguous().view(torch.float16).to(torch.float32)


def _halves(qs: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., 2 n]: low nibbles, then high ones."""
    return torch.cat((qs & 15, qs >> 4), dim=-1)


def _planes(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [B, n] -> [B, 8 / bits, n]: plane k has bits k * bits and up of each byte."""
    mask = 2**bits - 1
    return torch.stack([raw >> shift & mask for shift in range(0, 8, bits)], dim=1)


def _fifth_bits(raw: torch.Tensor) -> torch.Tensor:
    """The four bytes of Q5_0 and Q5_1 -> 16 for each of 32 values whose fifth bit is set."""
    return (_planes(raw, 1).transpose(1, 2).reshape(-1, 32)) << 4


def _looked_up(qs: torch.Tensor, table: tuple[int, ...]) -> torch.Tensor:
    """4-bit codes -> 8-bit codes of the table's integers."""
    return torch.tensor([value + _ZERO[8] for value in table], dtype=torch.uint8)[qs.to(torch.int64)]


def _six_bits(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The twelve bytes of Q4_K and Q5_K -> eight scales and eight minima of 6 bits, float32."""
    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6) << 4), dim=1)
    minima = torch.cat((middle & 63, high >> 4 | (middle >> 6) << 4), dim=1)
    return scales.to(torch.float32), minima.to(torch.float32)


# ---- one decoder for each type


def _q4_0(raw: torch.Tensor) -> Blocks:
    return Blocks(_halves(raw[:, 2:]), _half(raw[:, :2]))


def _q4_1(raw: torch.Tensor) -> Blocks:
    return Blocks(_halves(raw[:, 4:]), _half(raw[:, :2]), _half(raw[:, 2:4]))


def _q5_0(raw: torch.Tensor) -> Blocks:
    codes = _halves(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])
    return Blocks(codes + (_ZERO[8] - 16), _half(raw[:, :2]))


def _q5_1(raw: torch.Tensor) -> Blocks:
    return Blocks(_halves(raw[:, 8:]) | _fifth_bits(raw[:, 4:8]), _half(raw[:, :2]), _half(raw[:, 2:4]))


def _q8_0(raw: torch.Tensor) -> Blocks:
    return Blocks(raw[:, 2:] ^ 128, _half(raw[:, :2]))  # the sign of an int8 turned over: 128 more


def _q2_k(raw: torch.Tensor) -> Blocks:
    both, factors = raw[:, :16], _half(raw[:, 80:84])
    scales = factors[:, :1] * (both & 15).to(torch.float32)
    minima = factors[:, 1:] * (both >> 4).to(torch.float32)
    codes = _planes(raw[:, 16:80].reshape(-1, 32), 2)
    return Blocks(codes.reshape(-1, 256), scales, -minima)


def _q3_k(raw: torch.Tensor) -> Blocks:
    low = _planes(raw[:, 32:96].reshape(-1, 32), 2).reshape(-1, 256)
    high = _planes(raw[:, :32], 1).reshape(-1, 256)  # set: nothing is subtracted
    packed = raw[:, 96:108]
    six = _halves(packed[:, :8]) | _planes(packed[:, 8:], 2).reshape(-1, 16) << 4
    scales = _half(raw[:, 108:]) * (six.to(torch.float32) - 32)
    return Blocks(low + (high << 2) + (_ZERO[4] - 4), scales)


def _q4_k(raw: torch.Tensor) -> Blocks:
    factors, (scales, minima) = _half(raw[:, :4]), _six_bits(raw[:, 4:16])
    codes = _halves(raw[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return Blocks(codes, factors[:, :1] * scales, -(factors[:, 1:] * minima))


def _q5_k(raw: torch.Tensor) -> Blocks:
    low = _q4_k(torch.cat((raw[:, :16], raw[:, 48:]), dim=1))
    return low._replace(codes=low.codes | _planes(raw[:, 16:48], 1).reshape(-1, 256) << 4)


def _q6_k(raw: torch.Tensor) -> Blocks:
    low = _halves(raw[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = _planes(raw[:, 128:192].reshape(-1, 32), 2).reshape(-1, 256)
    scales = _half(raw[:, 208:]) * raw[:, 192:208].contiguous().view(torch.int8).to(torch.float32)
    return Blocks((low | high << 4) + (_ZERO[8] - 32), scales)


def _iq4_nl(raw: torch.Tensor) -> Blocks:
    return Blocks(_looked_up(_halves(raw[:, 2:]), _LINES), _half(raw[:, :2]))


def _iq4_xs(raw: torch.Tensor) -> Blocks:
    nibbles = raw[:, 4:8]
    low = torch.stack((nibbles & 15, nibbles >> 4), dim=2).reshape(-1, 8)
    high = _planes(raw[:, 2:4], 2).transpose(1, 2).reshape(-1, 8)
    scales = _half(raw[:, :2]) * ((low | high << 4).to(torch.float32) - 32)
    return Blocks(_looked_up(_halves(raw[:, 8:].reshape(-1, 8, 16)).reshape(-1, 256), _LINES), scales)


def _mxfp4(raw: torch.Tensor) -> Blocks:
    """The scale is 2**(e - 128), made bit by bit: the two smallest are no normal numbers."""
    e = raw[:, :1].to(torch.int32)
    bits = torch.where(e < 2, torch.full_like(e, 0x00200000) << e, (e - 1).clamp(min=0) << 23)
    return Blocks(_looked_up(_halves(raw[:, 1:]), _E2M1), bits.view(torch.float32))


_DECODERS: dict[str, Callable[[torch.Tensor], Blocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
