"""The forms that files give a linear's weight, and random weights of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from qwenrt.backends.base import Backend
from qwenrt.ops import reference
from qwenrt.ops.quantization import narrow_scales
from qwenrt.ops.types import CanonicalWeight, Packed
from qwenrt.ops.weights import dequantize, with_codes


@dataclass(frozen=True)
class Form:
    """``stored``: a dense weight's dtype in the file, None: that of the activations. ``group``: inputs that share a
    scale, -1: all. ``words``: codes in the words of a GPTQ file with act-order and one zero for all, in two parts side
    by side. ``float_scales``: scales that float16 has not. ``offsets``: of groups, in place of zeros, as in GGUF files.
    ``shared``: the weight has another use, as a tied head.
    ``parts``: outputs that lie in a file in several forms, which cannot be merged."""

    name: str
    bits: int = 16
    group: int = 0
    stored: torch.dtype | None = None
    act_order: bool = False
    words: bool = False
    float_scales: bool = False
    offsets: bool = False
    shared: bool = False
    parts: tuple[Form, ...] = ()

    def __str__(self) -> str:
        return self.name


DENSE = Form("dense")
_WHOLE = (
    DENSE,
    Form("stored bfloat16", stored=torch.bfloat16),
    Form("stored float16", stored=torch.float16),
    Form("stored float32", stored=torch.float32),
    Form("stored bfloat16, shared", stored=torch.bfloat16, shared=True),
    Form("int4 group 32", 4, 32),
    Form("int4 group 64", 4, 64),
    Form("int4 group 128", 4, 128),
    Form("int4 rows", 4, -1),
    Form("int4 group 8", 4, 8),
    Form("int4 group 20", 4, 20),  # ends inside a word of 8 codes
    Form("int4 act-order", 4, 128, act_order=True),
    Form("int4 GPTQ words", 4, 128, act_order=True, words=True),
    Form("int4 float32 scales", 4, 32, float_scales=True),
    Form("int4 offsets", 4, 32, float_scales=True, offsets=True),
    Form("int4 group 16", 4, 16, float_scales=True),
    Form("int8 group 16", 8, 16, float_scales=True),
    Form("int8 offsets", 8, 32, float_scales=True, offsets=True),
    Form("int8 group 32", 8, 32),
    Form("int8 group 64", 8, 64),
    Form("int8 group 128", 8, 128),
    Form("int8 group 31", 8, 31),
    Form("int8 rows", 8, -1),
    Form("int8 GPTQ words", 8, 128, act_order=True, words=True),
)
_MAIN = ("dense", "stored bfloat16", "stored float16", "int4 group 32", "int8 group 128")
_PARTS = tuple(form for form in _WHOLE if form.name in _MAIN[1:])
FORMS = (*_WHOLE, Form("parts", parts=_PARTS))
# Of each way to multiply, for ops that only compose it, and for matrices large enough for code of their own.
MAIN_FORMS = tuple(form for form in FORMS if form.name in _MAIN)


@dataclass(frozen=True)
class Weight:
    """``canonical``, or its ``parts``, and what bounds need of it: its values float64 [N, K] in the order of x, what a
    kernel may add up for each (codes and zeros apart), and the bias [N]."""

    canonical: CanonicalWeight
    matrix: torch.Tensor
    reach: torch.Tensor
    bias: torch.Tensor | None = None
    parts: tuple[Weight, ...] = ()

    @classmethod
    def dense(cls, matrix: torch.Tensor) -> Weight:
        matrix = matrix.double()
        return cls(CanonicalWeight(dense=matrix), matrix, matrix.abs())

    def packed(self, backend: Backend, dtype: torch.dtype) -> Packed:
        """As the loader packs: words of a file only where the backend takes them."""
        if self.parts:
            parts = [part.packed(backend, dtype) for part in self.parts]
            return Packed("parts", self.matrix.shape[0], self.matrix.shape[1], {"parts": parts})
        words = self.canonical if backend.packs_words() else with_codes(self.canonical)
        return backend.pack_linear(words, dtype)

    def defined(self) -> Packed:
        """For the definition in float64: a dense weight is rounded to the activations' dtype first."""
        if self.parts:
            parts = [part.defined() for part in self.parts]
            return Packed("parts", self.matrix.shape[0], self.matrix.shape[1], {"parts": parts})
        canonical = with_codes(self.canonical)
        if canonical.dense is not None:
            canonical = CanonicalWeight(dense=self.matrix, bias=self.bias)
        return reference.pack(canonical, torch.float64, torch.device("cpu"))


def random_weight(
    form: Form,
    n: int,
    k: int,
    dtype: torch.dtype,
    source: torch.Generator,
    *,
    bias: bool,
    outliers: bool = False,
) -> Weight:
    """Values of about 1 / sqrt(k). The first input counts for next to nothing, so that a massive value there shows what
    its neighbours lose. ``outliers``: a dense weight has a few values far above the others."""
    shift = torch.linspace(-1, 1, n) if bias else None
    if form.parts:
        sizes = [len(rows) for rows in torch.arange(n).tensor_split(len(form.parts)) if len(rows)]
        weights = [
            random_weight(part, size, k, dtype, source, bias=bias) for part, size in zip(form.parts, sizes)
        ]
        biases = [part.bias for part in weights if part.bias is not None]
        return Weight(
            CanonicalWeight(),
            torch.cat([part.matrix for part in weights]),
            torch.cat([part.reach for part in weights]),
            torch.cat(biases) if biases else None,
            tuple(weights),
        )
    if form.bits == 16:
        dense = torch.randn(n, k, generator=source) * k**-0.5
        if outliers:
            dense[::7, k // 2] *= 1024
        dense[:, 0] *= 2.0**-10
        dense = dense.to(form.stored or dtype)
        canonical = CanonicalWeight(dense=dense, bias=shift, shared=form.shared)
        matrix = dense.to(dtype).double()
        return Weight(canonical, matrix, matrix.abs(), shift)
    canonical = dataclasses.replace(_codes(form, n, k, source), bias=shift)
    plain = with_codes(canonical)
    assert plain.scales is not None
    if plain.offsets is not None:
        negated = dataclasses.replace(plain, offsets=plain.offsets.abs(), scales=plain.scales.abs())
    else:
        negated = dataclasses.replace(plain, zeros=-plain.zeros, scales=plain.scales.abs())  # type: ignore
    matrix, reach = (dequantize(w, torch.float64) for w in (plain, negated))
    return Weight(canonical, matrix, reach, shift)


def _codes(form: Form, n: int, k: int, source: torch.Generator) -> CanonicalWeight:
    group = k if form.group == -1 else min(form.group, k)
    groups, middle = -(-k // group), 1 << form.bits - 1
    codes = torch.randint(0, 2**form.bits, (k, n), dtype=torch.uint8, generator=source)
    scales = (torch.rand(groups, n, generator=source) + 0.5) * 4 * k**-0.5 / 2**form.bits
    zeros = torch.randint(0, 2**form.bits + 1, (groups, n), dtype=torch.int16, generator=source)
    perm = torch.randperm(k, generator=source).int() if form.act_order else None
    if form.words:
        zeros = torch.full_like(zeros, middle)
        words = torch.randint(-(2**31), 2**31 - 1, (-(-k * form.bits // 32), n), generator=source)
        words[0] = (words[0] >> form.bits << form.bits) + middle
        part = n // 2
        return CanonicalWeight(
            words=(words[:, :part].int(), words[:, part:].int()),
            num_inputs=k,
            scales=scales.half(),
            zeros=zeros,
            bits=form.bits,
            group_size=group,
            perm=perm,
        )
    if form.bits == 4 and group <= 32 and not form.float_scales:  # as rounding at load makes them
        zeros = zeros.clamp(max=15)
        scales = narrow_scales(scales.half().float(), zeros, 4)
    elif not form.float_scales:
        scales = scales.half()
    first = 0 if perm is None else int((perm == 0).nonzero())
    codes[first] = zeros[first // group].clamp(max=2**form.bits - 1).to(torch.uint8)
    if form.offsets:
        offsets = -scales * (zeros + 0.3)
        offsets[first // group] = -scales[first // group] * codes[first]  # which leaves the first input quiet
        return CanonicalWeight(
            codes=codes, scales=scales, offsets=offsets, bits=form.bits, group_size=group, perm=perm
        )
    return CanonicalWeight(
        codes=codes, scales=scales, zeros=zeros, bits=form.bits, group_size=group, perm=perm
    )
