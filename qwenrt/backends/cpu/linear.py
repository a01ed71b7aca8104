"""A linear as csrc/ is told of it: what its matrix is, where it lies, and what its inputs are rounded to."""

from __future__ import annotations

import ctypes

import torch

from qwenrt.backends.cpu.activations import EXACT, INT16, Activations
from qwenrt.ops.types import Packed

# The numbers of csrc/abi/qwenrt_cpu.h.
DENSE_BFLOAT16, DENSE_FLOAT16, DENSE12, QUANTIZED, PARTS, ELSEWHERE = range(6)


class Linear(ctypes.Structure):
    """QwenrtLinear of csrc/abi/qwenrt_cpu.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("matrix", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("part_count", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("activations", Activations),
    )


def quantized(w: Packed, activations: Activations) -> Linear:
    """Of a pack_quantized, which must outlive it."""
    at, shape = ctypes.addressof(w.data["native"]), (w.out_features, w.in_features)
    return Linear(QUANTIZED, 0, at, None, 0, *shape, activations)


def dense12(w: Packed, rounded: bool) -> Linear:
    """Of bfloat16 in 12 bits, which must outlive it; ``rounded``: many tokens may be rounded on the way."""
    at, shape = ctypes.addressof(w.data["native"]), (w.out_features, w.in_features)
    return Linear(DENSE12, 0, at, None, 0, *shape, INT16 if rounded else EXACT)


def dense16(weight: torch.Tensor, bias: torch.Tensor | None, rounded: bool) -> Linear:
    """Of bfloat16 or float16 [N, K], contiguous, and bias float32 [N], which must outlive it; else as dense12."""
    kind = DENSE_FLOAT16 if weight.dtype == torch.float16 else DENSE_BFLOAT16
    pointers = weight.data_ptr(), None if bias is None else bias.data_ptr()
    return Linear(kind, 0, *pointers, 0, *weight.shape, INT16 if rounded else EXACT)


def of_parts(parts: int, count: int, out_features: int, in_features: int) -> Linear:
    """Of ``count`` linears at the address ``parts``, whose outputs follow each other."""
    return Linear(PARTS, 0, parts, None, count, out_features, in_features, EXACT)


def elsewhere(name: int, out_features: int, in_features: int) -> Linear:
    """Of a matrix that the library does not read; ``name``: an address that nothing else has."""
    return Linear(ELSEWHERE, 0, name, None, 0, out_features, in_features, EXACT)
