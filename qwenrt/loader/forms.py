"""In which form a checkpoint holds each linear, told module by module by what lies in the file.

A config says what was meant for all of them: tools leave modules dense, quantise routers, or give some other bits and
groups. The names, shapes and dtypes in the headers decide; the config answers what they leave open. Every form has one
interface: ``expected``, what its tensors must be, and ``read``, those tensors as a CanonicalWeight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from qwenrt.config import QuantConfig
from qwenrt.loader.header import TensorEntry

if TYPE_CHECKING:
    import torch

    from qwenrt.ops.types import CanonicalWeight

FLOATS = ("F16", "BF16", "F32", "F64")
FP8 = "F8_E4M3"
_SCALES = ("F16", "BF16", "F32")
_WORD = 32
CODE_BITS = (4, 8)
_USUAL_BLOCK = (128, 128)  # of FP8 files whose config names none
Shape = tuple[int, ...]
Expected = dict[str, tuple[tuple[Shape, ...], tuple[str, ...]]]  # kind -> (right shapes, right dtypes)


@dataclass(frozen=True)
class Module:
    """One linear, or one part of a merged one, as a file holds it: ``kinds``, its tensors by kind ("weight",
    "qweight", ...), the bias not among them. ``name``: for messages."""

    name: str
    rows: int
    columns: int
    kinds: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class Target:
    """What is wanted of a module: GPTQ's words as they are (``keep_words``), FP8 in a dense ``fp8_dtype``, or as int8
    codes where that is None."""

    keep_words: bool
    fp8_dtype: torch.dtype | None


Fetch = Callable[[str], "torch.Tensor | None"]  # kind -> the tensor, None where the file has none


class Form(Protocol):
    """One way in which files hold linears."""

    @property
    def bits(self) -> int:
        """Of a code; 16 where there are none."""
        ...

    @property
    def group_size(self) -> int: ...

    def expected(self, module: Module) -> Expected:
        """The tensors that must be there, each with its shapes and dtypes."""
        ...

    def read(
        self, module: Module, fetch: Fetch, bias: torch.Tensor | None, target: Target
    ) -> CanonicalWeight: ...


@dataclass(frozen=True)
class Dense:
    """A matrix [rows, columns] in 16 or more bits."""

    bits: int = 16
    group_size: int = 0

    def expected(self, module: Module) -> Expected:
        return {"weight": (((module.rows, module.columns),), FLOATS)}

    def read(
        self, module: Module, fetch: Fetch, bias: torch.Tensor | None, target: Target
    ) -> CanonicalWeight:
        from qwenrt.ops.types import CanonicalWeight

        return CanonicalWeight(dense=fetch("weight"), bias=bias)


@dataclass(frozen=True)
class Gptq:
    """Codes of GPTQ; ``quant`` with this module's own bits and group size."""

    quant: QuantConfig

    @property
    def bits(self) -> int:
        return self.quant.bits

    @property
    def group_size(self) -> int:
        return self.quant.group_size

    def expected(self, module: Module) -> Expected:
        word, groups = _WORD // self.bits, _groups(module.columns, self.group_size)
        expected: Expected = {
            "qweight": (((math.ceil(module.columns / word), module.rows),), ("I32",)),
            "qzeros": (((groups, math.ceil(module.rows / word)),), ("I32",)),
            "scales": (((groups, module.rows),), _SCALES),
        }
        if "g_idx" in module.kinds:
            expected["g_idx"] = ((module.columns,), (0,)), ("I32", "I64")
        return expected

    def read(
        self, module: Module, fetch: Fetch, bias: torch.Tensor | None, target: Target
    ) -> CanonicalWeight:
        from qwenrt.ops import gptq

        qweight, qzeros, scales = _all(fetch, "qweight", "qzeros", "scales")
        return gptq.unpack_gptq(
            qweight,
            qzeros,
            scales,
            fetch("g_idx"),
            bias,
            quant=self.quant,
            in_features=module.columns,
            out_features=module.rows,
            name=module.name,
            keep_words=target.keep_words,
        )


@dataclass(frozen=True)
class Awq:
    """Codes of AWQ in the gemm layout, 4 bits."""

    group_size: int
    bits: int = 4

    def expected(self, module: Module) -> Expected:
        words, groups = math.ceil(module.rows * self.bits / _WORD), _groups(module.columns, self.group_size)
        return {
            "qweight": (((module.columns, words),), ("I32",)),  # packed along the outputs
            "qzeros": (((groups, words),), ("I32",)),
            "scales": (((groups, module.rows),), _SCALES),
        }

    def read(
        self, module: Module, fetch: Fetch, bias: torch.Tensor | None, target: Target
    ) -> CanonicalWeight:
        from qwenrt.ops import awq

        qweight, qzeros, scales = _all(fetch, "qweight", "qzeros", "scales")
        return awq.unpack_awq(
            qweight,
            qzeros,
            scales,
            bias,
            group_size=self.group_size,
            in_features=module.columns,
            out_features=module.rows,
            name=module.name,
        )


@dataclass(frozen=True)
class Fp8:
    """float8_e4m3fn values, and in ``scale`` ("weight_scale" or "weight_scale_inv") what to multiply them by: one
    number for each ``block``, or without one for each row or for all."""

    scale: str
    block: tuple[int, int] | None
    bits: int = 16
    group_size: int = 0

    def expected(self, module: Module) -> Expected:
        shape = (module.rows, module.columns)
        return {"weight": ((shape,), (FP8,)), self.scale: (_fp8_grids(module, self.block), _SCALES)}

    def read(
        self, module: Module, fetch: Fetch, bias: torch.Tensor | None, target: Target
    ) -> CanonicalWeight:
        from qwenrt.ops import fp8
        from qwenrt.ops.types import CanonicalWeight

        weight, scale = _all(fetch, "weight", self.scale)
        dtype, name = target.fp8_dtype, module.name
        if dtype is None:
            return fp8.fp8_to_int8(weight, scale, self.block, bias, name=name)
        if self.block is None:
            dense = fp8.dequantize_fp8_channel(weight, scale, dtype, name=name)
        else:
            dense = fp8.dequantize_fp8_block(weight, scale, self.block, dtype, name=name)
        return CanonicalWeight(dense=dense, bias=bias)


def form_of(module: Module, quant: QuantConfig | None) -> Form | str:
    """The form of a module, or in words why it has none that is read here."""
    kinds = module.kinds
    is_fp8 = "weight" in kinds and kinds["weight"].dtype == FP8
    if kinds.keys() <= {"weight"} and not is_fp8:
        return Dense()
    if quant is None:
        return "config.json has no quantization_config"
    if is_fp8:
        return _fp8(module, quant)
    if "qweight" not in kinds:
        return Dense()  # what else is there is unexpected
    if quant.method == "awq":
        return Awq(_awq_group(module, quant))
    if quant.method == "gptq":
        return _gptq(module, quant)
    return f"integer codes, and the method of quantization_config is {quant.method}"


def _fp8(module: Module, quant: QuantConfig) -> Form:
    """FP8 whose scales have a shape that tells whether they belong to blocks, to rows or to the whole matrix."""
    name = next((kind for kind in ("weight_scale_inv", "weight_scale") if kind in module.kinds), "")
    if not name:
        return Fp8("weight_scale" if quant.block is None else "weight_scale_inv", quant.block)
    if module.kinds[name].shape in _fp8_grids(module, None):
        return Fp8(name, None)
    return Fp8(name, quant.block or (_USUAL_BLOCK if name == "weight_scale_inv" else None))


def _fp8_grids(module: Module, block: tuple[int, int] | None) -> tuple[Shape, ...]:
    if block is None:
        return (module.rows,), (module.rows, 1), (), (1,), (1, 1)
    return ((math.ceil(module.rows / block[0]), math.ceil(module.columns / block[1])),)


def _gptq(module: Module, quant: QuantConfig) -> Form | str:
    """GPTQ with the bits that its words have, and the group size that its number of groups shows."""
    words = module.kinds["qweight"].shape
    likely = [b for b in (quant.bits, *CODE_BITS) if words[:1] == (math.ceil(module.columns * b / _WORD),)]
    zeros = module.kinds["qzeros"].shape[1:] if "qzeros" in module.kinds else ()
    for bits in (2, 3, 5, 6, 7):  # 32 codes of 3 bits lie in three words
        sizes = [(math.ceil(n / _WORD) * bits,) for n in (module.columns, module.rows)]
        if not likely and [words[:1], zeros] == sizes:
            return f"codes of {bits} bits; those of {' and '.join(map(str, CODE_BITS))} are read"
    bits = likely[0] if likely else quant.bits
    groups = module.kinds["scales"].shape[:1] if "scales" in module.kinds else ()
    group = _group_of(module, quant, groups)
    if isinstance(group, str):
        return group
    return Gptq(replace(quant, bits=bits, group_size=group, other_groups=(), corrections=()))


def _group_of(module: Module, quant: QuantConfig, groups: Shape) -> int | str:
    """The inputs that share a scale, from the number of ``groups``; as the config says where no group size fits."""
    if not groups or groups == (_groups(module.columns, quant.group_size),):
        return quant.group_size
    fitting = [g for g in quant.other_groups if groups == (_groups(module.columns, g),)]
    if len(fitting) == 1:
        return fitting[0]
    even = groups[0] > 0 and module.columns % groups[0] == 0
    if "g_idx" in module.kinds and even:
        return module.columns // groups[0]  # which input is in which group stands in g_idx
    if not fitting:
        return quant.group_size
    return f"{groups[0]} groups of scales may have {' or '.join(map(str, fitting))} inputs each, and no g_idx tells"


def _awq_group(module: Module, quant: QuantConfig) -> int:
    groups = module.kinds["scales"].shape[:1] if "scales" in module.kinds else ()
    full = bool(groups) and groups[0] > 0 and module.columns % groups[0] == 0
    return module.columns // groups[0] if full else quant.group_size  # this format has full groups only


def _groups(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else math.ceil(columns / min(group_size, columns))


def _all(fetch: Fetch, *kinds: str) -> list[torch.Tensor]:
    found = [fetch(kind) for kind in kinds]
    return [tensor for tensor in found if tensor is not None]
