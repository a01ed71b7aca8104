"""The weight formats of checkpoints: dense, GPTQ, AWQ, FP8 and GGUF's, told linear by linear by what lies in the file.

A config says what was meant for all of them: tools leave linears dense, quantise routers, or give some other bits and
groups. The names, shapes and dtypes in the headers decide; the config answers what they leave open. Every format has
one interface: ``expected``, what its tensors must be, and ``read``, those tensors as a CanonicalWeight. A new one is a
class here, a branch in `format_of`, and the meaning of its bits in ops/. Needs no torch until something is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from qwenrt.config import QuantConfig
from qwenrt.config.quant import FP8_BLOCK
from qwenrt.loader.checkpoint.header import TensorEntry
from qwenrt.ops.ggml_types import CODED, GgmlType
from qwenrt.ops.stored import WORD_BITS, Shape, awq_shapes, fp8_scale_shapes, gptq_shapes, num_groups

if TYPE_CHECKING:
    import torch

    from qwenrt.ops.types import CanonicalWeight

FLOATS = ("F16", "BF16", "F32", "F64")
FP8 = "F8_E4M3"
_SCALES = ("F16", "BF16", "F32")
_CODES = ("I32",)
CODE_BITS = (4, 8)
Expected = dict[str, tuple[tuple[Shape, ...], tuple[str, ...]]]  # kind -> (right shapes, right dtypes)


@dataclass(frozen=True)
class StoredLinear:
    """One linear [rows, columns], or one part of a merged one, as a file holds it. ``tensors``: by kind ("weight",
    "qweight", ...), the bias not among them. ``name``: for messages."""

    name: str
    rows: int
    columns: int
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class ReadOptions:
    """What weights are to become. ``keep_words``: GPTQ's int32 words stay as they are. ``fp8_dtype``: FP8 becomes dense
    in it; None makes int8 codes of it."""

    keep_words: bool
    fp8_dtype: torch.dtype | None


Fetch = Callable[[str], "torch.Tensor | None"]  # kind -> the tensor, None where the file has none


class WeightFormat(Protocol):
    """One way in which files hold linears."""

    @property
    def bits(self) -> int:
        """Of a code; 16 where there are none."""
        ...

    @property
    def group_size(self) -> int: ...

    @property
    def group_bytes(self) -> int:
        """As QuantConfig.group_bytes."""
        ...

    def expected(self, linear: StoredLinear) -> Expected:
        """The tensors that must be there, each with its shapes and dtypes."""
        ...

    def read(
        self, linear: StoredLinear, fetch: Fetch, bias: torch.Tensor | None, options: ReadOptions
    ) -> CanonicalWeight:
        """The weight, from the tensors that ``fetch`` gives. Raises CheckpointError for damaged values."""
        ...


@dataclass(frozen=True)
class Dense:
    """A matrix [rows, columns] in 16 or more bits."""

    bits: int = 16
    group_size: int = 0
    group_bytes: int = 0

    def expected(self, linear: StoredLinear) -> Expected:
        return {"weight": (((linear.rows, linear.columns),), FLOATS)}

    def read(
        self, linear: StoredLinear, fetch: Fetch, bias: torch.Tensor | None, options: ReadOptions
    ) -> CanonicalWeight:
        from qwenrt.ops.types import CanonicalWeight

        return CanonicalWeight(dense=fetch("weight"), bias=bias)


@dataclass(frozen=True)
class Gptq:
    """Codes of GPTQ; ``quant`` with this linear's own bits and group size."""

    quant: QuantConfig
    group_bytes: int = 0

    @property
    def bits(self) -> int:
        return self.quant.bits

    @property
    def group_size(self) -> int:
        return self.quant.group_size

    def expected(self, linear: StoredLinear) -> Expected:
        shapes = gptq_shapes(linear.rows, linear.columns, self.bits, self.group_size)
        expected = _codes_and_scales(shapes)
        if "g_idx" in linear.tensors:
            expected["g_idx"] = ((linear.columns,), (0,)), ("I32", "I64")
        return expected

    def read(
        self, linear: StoredLinear, fetch: Fetch, bias: torch.Tensor | None, options: ReadOptions
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
            in_features=linear.columns,
            out_features=linear.rows,
            name=linear.name,
            keep_words=options.keep_words,
        )


@dataclass(frozen=True)
class Awq:
    """Codes of AWQ in the gemm layout, 4 bits."""

    group_size: int
    bits: int = 4
    group_bytes: int = 0

    def expected(self, linear: StoredLinear) -> Expected:
        return _codes_and_scales(awq_shapes(linear.rows, linear.columns, self.group_size))

    def read(
        self, linear: StoredLinear, fetch: Fetch, bias: torch.Tensor | None, options: ReadOptions
    ) -> CanonicalWeight:
        from qwenrt.ops import awq

        qweight, qzeros, scales = _all(fetch, "qweight", "qzeros", "scales")
        return awq.unpack_awq(
            qweight,
            qzeros,
            scales,
            bias,
            group_size=self.group_size,
            in_features=linear.columns,
            out_features=linear.rows,
            name=linear.name,
        )


@dataclass(frozen=True)
class Fp8:
    """float8_e4m3fn values, and in ``scale`` ("weight_scale" or "weight_scale_inv") what to multiply them by: one
    number for each ``block``, or without one for each row or for all."""

    scale: str
    block: tuple[int, int] | None
    bits: int = 16
    group_size: int = 0
    group_bytes: int = 0

    def expected(self, linear: StoredLinear) -> Expected:
        scales = fp8_scale_shapes(linear.rows, linear.columns, self.block)
        return {"weight": (((linear.rows, linear.columns),), (FP8,)), self.scale: (scales, _SCALES)}

    def read(
        self, linear: StoredLinear, fetch: Fetch, bias: torch.Tensor | None, options: ReadOptions
    ) -> CanonicalWeight:
        from qwenrt.ops import fp8
        from qwenrt.ops.types import CanonicalWeight

        weight, scale = _all(fetch, "weight", self.scale)
        dtype, name = options.fp8_dtype, linear.name
        if dtype is None:
            return fp8.fp8_to_int8(weight, scale, self.block, bias, name=name)
        return CanonicalWeight(
            dense=fp8.dequantize_fp8(weight, scale, self.block, dtype, name=name), bias=bias
        )


@dataclass(frozen=True)
class GgufCodes:
    """Codes of a GGUF file, in one of its own types."""

    type: GgmlType

    @property
    def bits(self) -> int:
        return self.type.bits

    @property
    def group_size(self) -> int:
        return self.type.group_size

    @property
    def group_bytes(self) -> int:
        return self.type.group_bytes

    def expected(self, linear: StoredLinear) -> Expected:
        return {"weight": (((linear.rows, linear.columns),), (self.type.name,))}

    def read(
        self, linear: StoredLinear, fetch: Fetch, bias: torch.Tensor | None, options: ReadOptions
    ) -> CanonicalWeight:
        from qwenrt.ops import ggml

        (rows,) = _all(fetch, "weight")
        return ggml.unpack(self.type.name, rows, bias, name=linear.name)


def format_of(linear: StoredLinear, quant: QuantConfig | None) -> WeightFormat | str:
    """The format of a linear, or in words why it has none that is read here."""
    kinds = linear.tensors
    is_fp8 = "weight" in kinds and kinds["weight"].dtype == FP8
    if kinds.keys() == {"weight"} and kinds["weight"].dtype in CODED:
        return GgufCodes(CODED[kinds["weight"].dtype])
    if kinds.keys() <= {"weight"} and not is_fp8:
        return Dense()
    if quant is None:
        return "config.json has no quantization_config"
    if is_fp8:
        return _fp8(linear, quant)
    if "qweight" not in kinds:
        return Dense()  # what else is there is unexpected
    if quant.method == "awq":
        return Awq(_awq_group(linear, quant))
    if quant.method == "gptq":
        return _gptq(linear, quant)
    return f"integer codes, and the method of quantization_config is {quant.method}"


def _fp8(linear: StoredLinear, quant: QuantConfig) -> WeightFormat:
    """FP8 whose scales have a shape that tells whether they belong to blocks, to rows or to the whole matrix."""
    name = next((kind for kind in ("weight_scale_inv", "weight_scale") if kind in linear.tensors), "")
    if not name:
        return Fp8("weight_scale" if quant.block is None else "weight_scale_inv", quant.block)
    if linear.tensors[name].shape in fp8_scale_shapes(linear.rows, linear.columns, None):
        return Fp8(name, None)
    return Fp8(name, quant.block or (FP8_BLOCK if name == "weight_scale_inv" else None))


def _gptq(linear: StoredLinear, quant: QuantConfig) -> WeightFormat | str:
    """GPTQ with the bits that its words have, and the group size that its number of groups shows."""
    words = linear.tensors["qweight"].shape
    likely = [b for b in (quant.bits, *CODE_BITS) if words[:1] == (-(-linear.columns * b // WORD_BITS),)]
    zeros = linear.tensors["qzeros"].shape[1:] if "qzeros" in linear.tensors else ()
    for bits in (2, 3, 5, 6, 7):  # 32 codes of 3 bits lie in three words
        sizes = [(-(-n // WORD_BITS) * bits,) for n in (linear.columns, linear.rows)]
        if not likely and [words[:1], zeros] == sizes:
            return f"codes of {bits} bits; those of {' and '.join(map(str, CODE_BITS))} are read"
    bits = likely[0] if likely else quant.bits
    groups = linear.tensors["scales"].shape[:1] if "scales" in linear.tensors else ()
    group = _group_of(linear, quant, groups)
    if isinstance(group, str):
        return group
    return Gptq(replace(quant, bits=bits, group_size=group, other_groups=(), corrections=()))


def _group_of(linear: StoredLinear, quant: QuantConfig, groups: Shape) -> int | str:
    """The inputs that share a scale, from the number of ``groups``; as the config says where no group size fits."""
    if not groups or groups == (num_groups(linear.columns, quant.group_size),):
        return quant.group_size
    fitting = [g for g in quant.other_groups if groups == (num_groups(linear.columns, g),)]
    if len(fitting) == 1:
        return fitting[0]
    even = groups[0] > 0 and linear.columns % groups[0] == 0
    if "g_idx" in linear.tensors and even:
        return linear.columns // groups[0]  # which input is in which group stands in g_idx
    if not fitting:
        return quant.group_size
    return f"{groups[0]} groups of scales may have {' or '.join(map(str, fitting))} inputs each, and no g_idx tells"


def _awq_group(linear: StoredLinear, quant: QuantConfig) -> int:
    groups = linear.tensors["scales"].shape[:1] if "scales" in linear.tensors else ()
    full = bool(groups) and groups[0] > 0 and linear.columns % groups[0] == 0
    return linear.columns // groups[0] if full else quant.group_size  # this format has full groups only


def _all(fetch: Fetch, *kinds: str) -> list[torch.Tensor]:
    found = [fetch(kind) for kind in kinds]
    return [tensor for tensor in found if tensor is not None]


def _codes_and_scales(shapes: Mapping[str, Shape]) -> Expected:
    return {kind: ((shape,), _SCALES if kind == "scales" else _CODES) for kind, shape in shapes.items()}
