"""Dense weights to integer codes through csrc/, with the bits of quantization.quantize_dense."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch

from qwenrt.ops import quantization
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import code_tensors, with_codes

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the numbers of csrc/qwenrt_cpu.h, in order


class Rounding(ctypes.Structure):
    """QwenrtRounding of csrc/qwenrt_cpu.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("clips", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("num_clips", ctypes.c_int32),
        ("sym", ctypes.c_int32),
    )


class Rounds(Protocol):
    def quantize(self, rounding: Rounding) -> bool: ...


def quantize(
    kernels: Rounds,
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
    name: str,
    *,
    sym: bool = False,
) -> CanonicalWeight | None:
    """``weight`` [N, K] as quantization.quantize_dense rounds it, its codes in ``words``; None where the kernel
    does not serve: other dtypes, and values that are not finite or too large, which the definition refuses in words."""
    rows, columns = weight.shape
    size, groups = quantization.groups_of((rows, columns), bits, group_size, name)
    if weight.dtype not in _DTYPES or weight.device.type != "cpu":
        return None
    weight = weight.contiguous()
    words = torch.empty(-(-columns * bits // 32), rows, dtype=torch.int32)
    scales = torch.empty(groups, rows)
    zeros = torch.empty(groups, rows, dtype=torch.int16)
    tried = quantization.CLIPS[bits]
    clips = (ctypes.c_double * len(tried))(*tried)
    pointers = (tensor.data_ptr() for tensor in (weight, words, scales, zeros))
    how = (_DTYPES.index(weight.dtype), bits, len(tried), int(sym))
    if not kernels.quantize(Rounding(*pointers, ctypes.addressof(clips), rows, columns, size, *how)):
        return None
    return CanonicalWeight(
        scales=quantization.narrow_scales(scales, zeros, bits),
        zeros=zeros,
        bits=bits,
        group_size=size,
        bias=bias,
        words=(words,),
        num_inputs=columns,
    )


def rounds_alike(kernels: Rounds, bits: int) -> bool:
    """Whether the kernel gives the definition's bits for small matrices of each dtype, two whole groups and a part of
    one a row."""
    normal = torch.randn(13, 300, generator=torch.Generator().manual_seed(0))
    for weight in map(normal.to, _DTYPES):
        got = quantize(kernels, weight, bits, 128, None, "self-check")
        if got is None or not same_bits(got, quantization.quantize_dense(weight, bits)):
            return False
    return True


def same_bits(a: CanonicalWeight, b: CanonicalWeight) -> bool:
    """Whether two quantised weights have the same codes, scales and zeros, in words or not."""
    parts = zip(*(code_tensors(with_codes(weight)) for weight in (a, b)), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in parts)
