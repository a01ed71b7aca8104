"""bfloat16 weights in 12 bits, without loss: fewer bytes to read for every token, and to keep."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch

from qwenrt.backends.cpu.huge_pages import huge_buffer
from qwenrt.ops.types import Packed

KIND = "dense12"  # beside "dense16": data as `pack` says
CHUNK, CHUNK_BYTES = 64, 96  # of csrc/abi/qwenrt_cpu.h
_MOST_OTHERS = 1 / 256  # share of weights that may have no code: each takes 6 bytes and a product of its own
_COUNTED_ROWS = 64  # at least, where there are so many, to find the commonest upper bytes


class Dense12(ctypes.Structure):
    """QwenrtDense12 of csrc/abi/qwenrt_cpu.h."""

    _fields_ = (
        ("chunks", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("smallest", ctypes.c_int64),
    )


class Packs(Protocol):
    def pack12(self, weight: torch.Tensor, into: Dense12) -> bool: ...

    def pack12_others(self, weight: torch.Tensor, into: Dense12) -> None: ...

    def unpack12(self, w: Dense12, out: torch.Tensor, first: int) -> None: ...


def pack(kernels: Packs, weight: torch.Tensor, bias: torch.Tensor | None) -> Packed | None:
    """weight bfloat16 [N, K] contiguous, bias float32 [N] -> the same in 12 bits; None where so many weights have no
    code that nothing is gained, or where not all are finite.

    data: ``chunks`` uint8 [N, ceil(K / 64), 96], ``smallest``, and of the E weights without a code ``inputs`` int32
    [E], ``others`` bfloat16 [E] and ``first`` int32 [N + 1], where each row's begin; ``native``, the struct that
    points at them.
    """
    rows, columns = weight.shape
    some = weight[:: max(1, rows // _COUNTED_ROWS)].contiguous().view(torch.int16)
    counts = torch.bincount((some.flatten() >> 8 & 0x7F).int(), minlength=128)  # upper bytes of either sign
    with_codes = counts[:-1].unfold(0, 8, 1).sum(-1)  # the last one is that of infinities and NaN
    data: dict[str, Any] = {
        "chunks": huge_buffer(rows * -(-columns // CHUNK) * CHUNK_BYTES).view(rows, -1, CHUNK_BYTES),
        "smallest": int(with_codes.argmax()),
        "first": torch.empty(rows + 1, dtype=torch.int32),
        "inputs": torch.empty(0, dtype=torch.int32),
        "others": torch.empty(0, dtype=torch.bfloat16),
    }
    packed = Packed(KIND, rows, columns, data, bias)
    if not kernels.pack12(weight, _pointed_at(packed)):
        return None
    count = int(data["first"][-1])
    if count > weight.numel() * _MOST_OTHERS:
        return None
    data["inputs"], data["others"] = data["inputs"].new_empty(count), data["others"].new_empty(count)
    kernels.pack12_others(weight, _pointed_at(packed))
    return packed if bool(data["others"].isfinite().all()) else None


def unpack(kernels: Packs, w: Packed, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) as they were -> bfloat16 [last - first, K]."""
    out = torch.empty(last - first, w.in_features, dtype=torch.bfloat16)
    kernels.unpack12(w.data["native"], out, first)
    return out


def _pointed_at(packed: Packed) -> Dense12:
    """``native`` of ``packed``, made anew."""
    data, bias = packed.data, packed.bias
    tensors = (data[name].data_ptr() for name in ("first", "inputs", "others"))
    pointers = (data["chunks"].data_ptr(), None if bias is None else bias.data_ptr(), *tensors)
    data["native"] = Dense12(*pointers, packed.out_features, packed.in_features, data["smallest"])
    native: Dense12 = data["native"]
    return native


def restore(packed: Packed) -> str | None:
    """Point ``native`` at the tensors of a `pack` that was kept in a file -> None, or why they do not fit: the kernels
    trust what they are pointed at."""
    rows, columns, others = packed.out_features, packed.in_features, packed.data.get("others")
    smallest = packed.data.get("smallest")
    if not isinstance(smallest, int) or not 0 <= smallest <= 120:
        return f"smallest of {KIND} is {smallest!r:.40}"
    count = others.numel() if isinstance(others, torch.Tensor) else 0
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "chunks": ((rows, -(-columns // CHUNK), CHUNK_BYTES), torch.uint8),
        "first": ((rows + 1,), torch.int32),
        "inputs": ((count,), torch.int32),
        "others": ((count,), torch.bfloat16),
    }
    if packed.bias is not None:
        wanted["bias"] = ((rows,), torch.float32)
    for name, (shape, dtype) in wanted.items():
        tensor = packed.bias if name == "bias" else packed.data.get(name)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape or tensor.dtype != dtype:
            return f"{name} of {KIND} is not {dtype} {list(shape)}"
        if not tensor.is_contiguous() or tensor.data_ptr() % tensor.itemsize:
            return f"{name} of {KIND} is not laid out as it must be"
    first, inputs = packed.data["first"], packed.data["inputs"]
    if int(first[0]) != 0 or int(first[-1]) != count or bool((first.diff() < 0).any()):
        return f"first of {KIND} does not go from 0 to its {count} weights"
    if count and not (int(inputs.min()) >= 0 and int(inputs.max()) < columns):
        return f"inputs of {KIND} lead outside of its {columns}"
    _pointed_at(packed)
    return None
