"""Triton's interpreter, mended: it cuts a float32 off where devices round it to bfloat16, and takes bfloat16 for
integers in products and where integers become bfloat16. To be imported before Triton is."""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined, Triton's own among them

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_whole = interpreter._convert_float
_cast = interpreter.InterpreterBuilder.cast_impl
_dot = interpreter.InterpreterBuilder.create_dot


def _narrowed(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _widened(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if source == tl.float32 and target == tl.bfloat16:
        return _narrowed(values.view(np.float32))
    if source == tl.bfloat16 and target == tl.float32:
        return _widened(values.view(np.uint16)).view(np.uint32)
    result: np.ndarray = _whole(values, source, target, rounding)
    return result


def _number(self: Any, value: Any, target: Any) -> Any:
    if target.scalar == tl.bfloat16 and not value.dtype.scalar.is_floating():
        return interpreter.TensorHandle(_narrowed(value.data.astype(np.float32)), tl.bfloat16)
    return _cast(self, value, target)


def _product(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_widened(a.data) @ _widened(b.data) + d.data, d.dtype.scalar)
    return _dot(self, a, b, d, *args)


interpreter._convert_float = _convert
interpreter.InterpreterBuilder.cast_impl = _number
interpreter.InterpreterBuilder.create_dot = _product
