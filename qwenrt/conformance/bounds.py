"""How far a right backend may be from a definition, element by element, and why.

A definition is computed in float64 from the same numbers, so that what is left is the backend's own rounding. `Near` is
a value with the error that is allowed for it; the functions below follow an op step by step, as ops/reference.py
defines it, and add what each step may cost:

- float32 sums of n terms in any order: every addition rounds by 2^-24 of a partial sum at most. Rounding goes up as
  often as down, so errors grow with the square root of n: (8 + 2 sqrt n) 2^-24 of the sum of sizes, `sums`.
- codes: a kernel may add up codes and zeros apart, so "sizes" are |x| (code + zero) |scale| and not |x| |weight|.
- a result in a narrow dtype is rounded by `unit` of its size, once for each step that rounds in the definition.
- a weight rounded to a narrow dtype is off by `unit` of its size, each by itself: 4 standard deviations of their sum.
- activations rounded on purpose, by a setting: what the backend says of itself (``rounding``), beside the row's largest
  result, or beside 4 standard deviations of its terms where results cancel.
- next to nothing: numbers below the normal ones of the dtype may be flushed to zero (`floor`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qwenrt.conformance.weights import Weight
from qwenrt.ops import reference

FLOAT32 = 2.0**-24
_SIGMAS = 4  # of a sum of independent errors: beyond is one in 16,000, and errors are uniform, not normal


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def floor(dtype: torch.dtype) -> float:
    """What is lost where a number is below the normal ones: float16 has steps there, others may flush."""
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)


def sums(terms: int) -> float:
    """Of float32 sums in any order, relative to the sum of sizes."""
    return (8 + 2 * math.sqrt(terms)) * FLOAT32


@dataclass(frozen=True)
class Near:
    """A value, float64, and how far from it a right backend may be."""

    value: torch.Tensor
    error: torch.Tensor

    @classmethod
    def exactly(cls, value: torch.Tensor) -> Near:
        value = value.double()
        return cls(value, torch.zeros_like(value))

    def rounded(self, by: float) -> Near:
        """After steps that round by ``by`` of the value."""
        return Near(self.value, self.error + by * (self.value.abs() + self.error))

    def rows(self, index: torch.Tensor) -> Near:
        return Near(self.value[index], self.error[index])


def rms_norm(x: Near, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> Near:
    """Rounded to the dtype, and multiplied in it."""
    value = reference.rms_norm(x.value, weight.double(), eps)
    if not x.value.numel():
        return Near.exactly(value)
    gain = weight.double().abs() * torch.rsqrt(x.value.square().mean(-1, keepdim=True) + eps)
    moved = 2 * x.error * gain + floor(dtype) * weight.double().abs()
    return Near(value, moved).rounded(3 * unit(dtype) + sums(x.value.shape[-1]))


def silu_and_mul(gate_up: Near, dtype: torch.dtype) -> Near:
    """silu is rounded, and its product; an exponential is off by what its argument was rounded by. The slope of silu is
    1.1 at most. Where exp(-gate) is too large for float32, silu may be 0."""
    (gate, up), (gate_error, up_error) = gate_up.value.chunk(2, -1), gate_up.error.chunk(2, -1)
    value, silu = reference.silu_and_mul(gate_up.value), torch.nn.functional.silu(gate)
    moved = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error
    moved = moved + floor(dtype) * (1 + gate.abs()) * up.abs()
    return Near(value, moved + (32 + 2 * gate.abs()) * FLOAT32 * value.abs()).rounded(3 * unit(dtype))


def gate_output(attended: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> Near:
    """Of exact numbers: the sigmoid is rounded, and its product."""
    value = reference.gate_output(attended, gate)
    moved = floor(dtype) * (1 + attended.abs()) + (32 + 2 * gate.abs()) * FLOAT32 * value.abs()
    return Near(value, moved).rounded(3 * unit(dtype))


def linear(x: Near, w: Weight, dtype: torch.dtype, rounding: float) -> Near:
    y = x.value @ w.matrix.t()
    bias = torch.zeros(1, dtype=torch.float64) if w.bias is None else w.bias.double()
    squares = w.matrix.square().t()
    spread = _SIGMAS * (x.value.square() @ squares).sqrt()
    y = y + bias
    error = sums(w.matrix.shape[1]) * (x.value.abs() @ w.reach.t() + bias.abs())
    error = error + 2 * unit(dtype) * (y.abs() + bias.abs())
    if dtype != torch.float32:
        error = error + unit(dtype) * spread
    if bool(x.error.any()):
        error = error + 2 * (x.error.square() @ squares).sqrt()
    if rounding and y.numel():
        error = error + rounding * torch.maximum(spread, y.abs().amax(-1, keepdim=True))
    return Near(y, error)


def add(a: Near, b: Near, dtype: torch.dtype) -> Near:
    """A sum in ``dtype``, whose terms may be rounded to it first."""
    total = Near(a.value + b.value, a.error + b.error + unit(dtype) * b.value.abs())
    return total.rounded(2 * unit(dtype))


def rotary(x: Near, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> Near:
    """Two float32 products and their sum, rounded once."""
    value = reference.rotary(x.value, cos, sin)
    cos, sin = cos.double().abs(), sin.double().abs()
    half = cos.shape[-1] // 2

    def turned(sizes: torch.Tensor) -> torch.Tensor:
        head, rest = sizes[..., : 2 * half], sizes[..., 2 * half :]
        other = head.roll(half, -1)
        return torch.cat((head * cos.unsqueeze(1) + other * sin.unsqueeze(1), rest), -1)

    moved = turned(x.error) + 4 * FLOAT32 * turned(x.value.abs()) + floor(dtype)
    return Near(value, moved).rounded(unit(dtype))
