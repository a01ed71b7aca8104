"""Integer codes as npu_weight_quant_batchmatmul multiplies them: exactly, or not at all; and dense weights in NZ."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from qwenrt.ops.types import CanonicalWeight, Packed

KINDS = {4: "npu_int4", 8: "npu_int8"}
NZ = "npu_nz"  # dense, in the format that the matrix unit reads
_FORMATS = {"ND": 2, "NZ": 29}  # aclFormat
_TILE = 16  # rows and columns of a tile of NZ
_MOST = 65535  # rows and columns of a matrix that the operator takes
_WIDE = 65528  # the most columns of a part: whole words of int4


def why_not(weight: CanonicalWeight, dtype: torch.dtype) -> str | None:
    """The reason the operator cannot multiply codes for activations in ``dtype`` as they are; None where it can.

    It computes (code + offset) * scale in that dtype: scales have to be exact in it.
    """
    scales, group, inputs = weight.scales, weight.group_size, weight.in_features
    assert scales is not None
    if weight.offsets is not None:
        return "offsets of float32 (GGUF) are more than the operator's have digits for"
    if not torch.equal(scales.to(dtype).float(), scales.float()):
        name = str(dtype).removeprefix("torch.")
        return f"scales that {name} does not hold" + (', which dtype="float16" may' * (name == "bfloat16"))
    if len(scales) > 1 and group % 32:
        return f"groups of {group}, which are no multiple of 32"
    if weight.bits == 4 and weight.out_features % 8:
        return f"{weight.out_features} outputs, which do not fill words of 8 codes"
    return f"{inputs} inputs, more than {_MOST}" if inputs > _MOST else None


def pack(weight: CanonicalWeight, dtype: torch.dtype, device: torch.device, bits: int) -> Packed:
    """A weight with codes that fits (`why_not`) -> Packed "npu_int4" or "npu_int8", by ``bits``: 8 for codes of either
    width. More than 65528 outputs become parts.

    data: ``weight`` int8 [K, N], or int32 [K, N / 8] with output 8 j + i in bits 4 i to 4 i + 3; ``scale`` in ``dtype``
    [G, N], or [N] where all inputs share one; ``offset`` alike, to be added to codes before they are scaled, or None
    where all are 0; ``perm`` int64 [K] or None; ``bias`` as the operator wants it.
    """
    outputs = weight.out_features
    if outputs > _MOST:
        parts = [
            pack(_columns(weight, at, at + _WIDE), dtype, device, bits) for at in range(0, outputs, _WIDE)
        ]
        return Packed("parts", outputs, weight.in_features, {"parts": parts})
    codes, scales, zeros = weight.codes, weight.scales, weight.zeros
    assert codes is not None and scales is not None and zeros is not None
    middle = 1 << weight.bits - 1
    signed = (codes.to(torch.int16) - middle).to(torch.int8)
    offset = (middle - zeros.to(torch.int16)).to(dtype)
    grouped = len(scales) > 1
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    data = {
        "weight": (_words(signed) if bits == 4 else signed.contiguous()).to(device),
        "scale": (scales if grouped else scales[0]).to(device, dtype).contiguous(),
        "offset": (offset if grouped else offset[0]).to(device).contiguous() if bool(offset.any()) else None,
        "perm": None if weight.perm is None else weight.perm.to(device, torch.int64),
        "bias": bias.float() if bias is not None and dtype == torch.bfloat16 else bias,
    }
    group = weight.group_size if grouped else 0
    return Packed(KINDS[bits], outputs, weight.in_features, data, bias, bits=bits, group_size=group)


def _columns(weight: CanonicalWeight, first: int, last: int) -> CanonicalWeight:
    """Some outputs of a weight."""
    assert weight.codes is not None and weight.scales is not None and weight.zeros is not None
    return CanonicalWeight(
        codes=weight.codes[:, first:last],
        scales=weight.scales[:, first:last],
        zeros=weight.zeros[:, first:last],
        bits=weight.bits,
        group_size=weight.group_size,
        perm=weight.perm,
        bias=None if weight.bias is None else weight.bias[first:last],
    )


def _words(signed: torch.Tensor) -> torch.Tensor:
    """int8 [K, N], -8 to 7 -> int32 [K, N / 8], eight outputs in a word, the first in the lowest bits."""
    pairs = signed.contiguous().view(torch.uint8).view(len(signed), -1, 2) & 15
    return (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32)


def dequantize(w: Packed, dtype: torch.dtype) -> torch.Tensor:
    """What ``pack`` made -> W [K, N] in ``dtype``, rows in the order of the codes; of several that are stacked
    [E, K, N]."""
    return _dequantize(w, w.data, dtype)


def linear_of_each(x: torch.Tensor, w: Packed, which: torch.Tensor) -> torch.Tensor:
    """As reference.linear_of_each of linears that ``pack`` made and types.stacked put together."""
    data = {name: None if value is None else value[which] for name, value in w.data.items()}
    if data["perm"] is not None:
        x = x.gather(1, data["perm"])
    y = torch.einsum("tk,tkn->tn", x, _dequantize(w, data, x.dtype))
    return y if data["bias"] is None else y + data["bias"].to(y.dtype)


def _dequantize(w: Packed, data: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    weight, scale, offset = data["weight"], data["scale"], data["offset"]
    if w.kind == KINDS[4]:
        pairs = weight.view(torch.uint8)
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
        signed = (codes ^ 8).to(torch.int16) - 8
    else:
        signed = weight.to(torch.int16)
    values = signed.float()

    def rows(side: torch.Tensor) -> torch.Tensor:
        if not w.group_size:
            return side.float().unsqueeze(-2)
        group = torch.arange(w.in_features, device=weight.device) // w.group_size
        return side.float().index_select(-2, group)

    if offset is not None:
        values = values + rows(offset)
    dense: torch.Tensor = (values * rows(scale)).to(dtype)
    return dense


def fits_nz(weight: CanonicalWeight, dtype: torch.dtype) -> bool:
    """Whether a dense weight may be kept in NZ: in whole tiles, and used by nothing that would look into it."""
    whole = weight.out_features % _TILE == 0 == weight.in_features % _TILE
    return whole and not weight.shared and dtype in (torch.float16, torch.bfloat16)


def in_nz(packed: Packed) -> Packed:
    """A packed dense weight in NZ. torch_npu gives that only where internal formats are allowed, else plainly the same
    again; they are allowed for this alone, as results would come in them too, which no view may touch."""
    config = getattr(getattr(torch, "npu", None), "config", None)
    if config is not None:
        config.allow_internal_format = True
    try:
        weight = torch.ops.npu.npu_format_cast(packed.data["weight"], _FORMATS["NZ"])
    finally:
        if config is not None:
            config.allow_internal_format = False
    return dataclasses.replace(packed, kind=NZ, data={"weight": weight})


def as_nd(weight: torch.Tensor) -> torch.Tensor:
    """A weight in NZ as a plain one."""
    plain: torch.Tensor = torch.ops.npu.npu_format_cast(weight, _FORMATS["ND"])
    return plain


def restore(packed: Packed) -> str | None:
    """Why a packed weight with codes that comes from a file cannot be used, or None."""
    inputs, outputs = packed.in_features, packed.out_features
    words = packed.kind == KINDS[4]
    groups = -(-inputs // packed.group_size) if packed.group_size > 0 else 0
    columns = (groups, outputs) if groups else (outputs,)
    wanted = {
        "weight": ((inputs, outputs // 8 if words else outputs), (torch.int32 if words else torch.int8,)),
        "scale": (columns, (torch.float16, torch.bfloat16)),
        "offset": (columns, (torch.float16, torch.bfloat16)),
        "perm": ((inputs,), (torch.int64,)),
        "bias": ((outputs,), (torch.float16, torch.float32)),
    }
    for name, (shape, dtypes) in wanted.items():
        tensor = packed.data.get(name)
        if tensor is None and name in ("offset", "perm", "bias"):
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape or tensor.dtype not in dtypes:
            return f"{name} of a weight of kind {packed.kind} is not {list(shape)}"
    return None
