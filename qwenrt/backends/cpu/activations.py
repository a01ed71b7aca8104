"""What the inputs of quantised linears are rounded to, by what the user chose and by what each linear can bear."""

from __future__ import annotations

import ctypes

from qwenrt.ops.types import Packed

ACTIVATIONS = ("exact", "int16", "int8")  # the numbers of csrc/abi/qwenrt_cpu.h, in order
_LARGE = 1 << 20  # weights of a linear from which on "auto" rounds: below, exact sums cost nobody anything
_ALL_ROWS = 1 << 62
# Which blocks of 32 inputs "int8" rounds to int8 (csrc/abi/qwenrt_cpu.h), by the linear they go into: the largest value
# relative to the token's root mean square, and to the block's mean. What attention's scores are made of feels rounding
# most. The products that down_proj gets have heavy tails, so that most blocks have a value far from the others.
_NARROW = {"qkv_proj": (3.0, 5.0), "o_proj": (3.0, 5.0), "down_proj": (6.0, 9.0)}
_OTHERS = (4.0, 5.0)


class Activations(ctypes.Structure):
    """QwenrtActivations of csrc/abi/qwenrt_cpu.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("narrowest", ctypes.c_float),
        ("outlier", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        ("narrow_rows", ctypes.c_int64),
    )


EXACT = Activations()
INT16 = Activations(ACTIVATIONS.index("int16"))


def rounded_to(choice: str, w: Packed) -> str:
    """``choice`` ("auto", or one of ACTIVATIONS) -> the one of ACTIVATIONS that a quantised linear has.

    Bytes beside bytes would add more error than the weights' own, and logits feel all of it: both stay at int16.
    """
    if choice == "auto":
        return "int16" if w.out_features * w.in_features >= _LARGE else "exact"
    return "int16" if choice == "int8" and (w.bits == 8 or w.role == "lm_head") else choice


def rounds_dense(choice: str, w: Packed) -> bool:
    """Whether many tokens are multiplied with a 16-bit weight in fixed point, of 14 bits each, where that is faster."""
    return choice != "exact" and w.out_features * w.in_features >= _LARGE


def rule_of(choice: str, w: Packed) -> Activations:
    """As rounded_to, for the kernels. Values, which reach the next layer as they are, have int16."""
    narrowest, outlier = _NARROW.get(w.role, _OTHERS)
    rows = w.out_features - w.value_rows if w.value_rows else _ALL_ROWS
    return Activations(ACTIVATIONS.index(rounded_to(choice, w)), narrowest, outlier, 0, rows)
