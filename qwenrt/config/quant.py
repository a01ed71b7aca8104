"""How a checkpoint's linears are quantised on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from qwenrt.config.fields import bad, boolean, first_given, integer
from qwenrt.errors import ConfigError

Method = Literal["gptq", "awq", "fp8", "gguf"]
GROUP_SIZE = 128  # inputs that share a scale, by default
# (rows, columns) that share a scale, where the config of a file with blocks names no size
FP8_BLOCK = (128, 128)
_SUPPORTED = (
    "gptq (4 and 8 bits), awq (4 bits, gemm), auto-round (in the layout of either), fp8 (e4m3), compressed-tensors "
    "(float-quantized)"
)
_DENSE = "Load the dense release of the model, with quantize= if it is too large."


class Correction(NamedTuple):
    """``number`` more (or, below zero, fewer) matrices [rows, columns] of ``bits`` (16: dense) in groups of
    ``group_size``, with ``group_bytes`` as in QuantConfig, than a config says."""

    rows: int
    columns: int
    bits: int
    group_size: int
    number: int
    group_bytes: int = 0


@dataclass(frozen=True)
class QuantConfig:
    """``method`` "gptq" and "awq" store codes of ``bits`` in groups of ``group_size`` inputs (-1: one group for all);
    ``zero_offset`` is added to stored zeros (1 in the v1 format of AutoGPTQ, 0 in v2 and in AWQ). "fp8" stores
    float8_e4m3fn values and what to multiply them by: one number for each ``block`` (rows, columns), or, without
    ``block``, for each row or for the whole matrix. ``zeros_in_scales``: the zeros of 4-bit codes lie in their scales'
    last bits and take no memory of their own beside our kernels. "gguf": the types of a GGUF file, ``bits`` and
    ``group_size`` those of most weights; ``group_bytes``: of a group's scale and offset, 0 where the other fields tell.

    This is what a config says of all linears; the format of each one is told by the file
    (loader/checkpoint/formats.py). ``other_groups``: group sizes that a config names for some of them (GPTQ's
    ``dynamic``, AutoRound's ``extra_config``). ``corrections``: what the file's headers, once they were read, show to
    have another format.
    """

    bits: int
    group_size: int
    desc_act: bool = False
    sym: bool = True
    zero_offset: int = 1
    method: Method = "gptq"
    block: tuple[int, int] | None = None
    other_groups: tuple[int, ...] = ()
    corrections: tuple[Correction, ...] = ()
    zeros_in_scales: bool = False
    group_bytes: int = 0

    @property
    def name(self) -> str:
        """As people say it: "gptq int4", "fp8"."""
        return f"{self.method} int{self.bits}" if self.has_codes else self.method

    @property
    def has_codes(self) -> bool:
        """Whether the weights on disk are integer codes, which are served as they are; fp8 is converted at load."""
        return self.method != "fp8"

    @classmethod
    def from_dict(cls, quant: Mapping[str, Any], where: str) -> QuantConfig:
        """From quantization_config of config.json or from quantize_config.json. ConfigError for other methods."""
        method = quant.get("quant_method") or "gptq"
        method = method.lower() if isinstance(method, str) else method
        readers = {
            "gptq": _gptq,
            "awq": _awq,
            "fp8": _fp8,
            "fbgemm_fp8": _fp8,
            "compressed-tensors": _compressed_tensors,
            **dict.fromkeys(("auto-round", "auto_round", "intel/auto-round"), _auto_round),
            "gguf": _gguf,
        }
        if not isinstance(method, str) or method not in readers:
            found = f"quant_method is {method!r:.80}"
            raise ConfigError(f"reading {where}", found, f"Supported are: {_SUPPORTED}. {_DENSE}")
        return readers[method](quant, where)


# What `quantize=` and `quantize_head=` round dense weights to. Of 4-bit codes, 32 inputs share a scale that has their
# zero in its last bits: 4.5 bits a weight, as llama.cpp's Q4_0. docs/performance.md says what that is worth.
ROUNDED = {
    "int8": QuantConfig(8, GROUP_SIZE, sym=False),
    "int4": QuantConfig(4, 32, sym=False, zeros_in_scales=True),
}


def rounding_description(quantize: str | None) -> str | None:
    """``quantize`` in full: "int4 in groups of 32"."""
    return None if quantize is None else f"{quantize} in groups of {ROUNDED[quantize].group_size}"


def rounded_group(bits: int) -> int:
    """Inputs that share a scale where dense weights are rounded to ``bits`` at load; where there are no codes, any."""
    return next((form.group_size for form in ROUNDED.values() if form.bits == bits), GROUP_SIZE)


def _group_size(quant: Mapping[str, Any], where: str, default: int = GROUP_SIZE) -> int:
    group = first_given(quant, ("group_size", "q_group_size"), where, default)
    if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and not 1 <= group <= 2**20):
        raise bad(where, "group_size", group, "-1 or a positive integer")
    return group


def _other_groups(
    quant: Mapping[str, Any], group_size: int, where: str, name: str = "dynamic"
) -> tuple[int, ...]:
    """The group sizes that ``dynamic``, or the field of another ``name``, gives to some modules.

    Its patterns are not read: which linear is dense, and the bits of the others, are told by the file itself, and an
    untrusted pattern could take for ever to match.
    """
    rules = quant.get(name)
    if rules is None or rules is False:
        return ()
    if not isinstance(rules, Mapping):
        raise bad(where, name, rules, "an object: pattern -> settings of the modules it matches")
    settings = [rule for rule in rules.values() if isinstance(rule, Mapping)]
    named = {_group_size(rule, where, group_size) for rule in settings}
    return tuple(sorted(named - {group_size}))


def _gptq(quant: Mapping[str, Any], where: str) -> QuantConfig:
    bits = integer(quant, "bits", where, 1, 64)
    if bits not in (4, 8):
        raise ConfigError(f"reading {where}", f"{bits}-bit GPTQ weights", "Supported are 4 and 8 bits.")
    form = first_given(quant, ("checkpoint_format", "format"), where, "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise ConfigError(
            f"reading {where}", f"checkpoint_format is {form!r:.80}", "Supported are: gptq, gptq_v2."
        )
    group_size = _group_size(quant, where)
    return QuantConfig(
        bits=bits,
        group_size=group_size,
        other_groups=_other_groups(quant, group_size, where),
        desc_act=boolean(quant, "desc_act", where, False),
        sym=boolean(quant, "sym", where, True),
        zero_offset=0 if form == "gptq_v2" else 1,
    )


def _awq(quant: Mapping[str, Any], where: str) -> QuantConfig:
    bits = integer({"bits": first_given(quant, ("bits", "w_bit"), where, 4)}, "bits", where, 1, 64)
    if bits != 4:
        raise ConfigError(f"reading {where}", f"{bits}-bit AWQ weights", f"Supported are 4 bits. {_DENSE}")
    version = quant.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        found = f"the AWQ layout is {version!r:.80}"
        raise ConfigError(f"reading {where}", found, f"Supported is 'gemm'. {_DENSE}")
    if not boolean(quant, "zero_point", where, True):
        raise ConfigError(
            f"reading {where}", "zero_point is false", f"AWQ weights are read with their zeros. {_DENSE}"
        )
    return QuantConfig(4, _group_size(quant, where), sym=False, zero_offset=0, method="awq")


def _auto_round(quant: Mapping[str, Any], where: str) -> QuantConfig:
    """AutoRound's own config. Its tensors lie as those of GPTQ (zeros as in v1) or of AWQ, as ``packing_format`` says;
    ``extra_config`` gives some modules other bits and groups, or leaves them dense, and like GPTQ's ``dynamic`` it is
    not matched: the file tells. ``block_name_to_quantize`` says no more than that."""
    kind, rounded = quant.get("data_type") or "int", quant.get("act_bits") or 16
    if kind != "int" or rounded != 16:
        found = f"AutoRound weights of data_type {kind!r:.40}, with activations of {rounded!r:.20} bits"
        raise ConfigError(f"reading {where}", found, f"Read are integers beside 16-bit activations. {_DENSE}")
    packing = quant.get("packing_format")
    layouts = {"auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_round:auto_awq": "awq"}
    if not isinstance(packing, str) or packing not in layouts:
        found = f"packing_format is {packing!r:.80}"
        raise ConfigError(f"reading {where}", found, f"Supported are: {', '.join(layouts)}. {_DENSE}")
    if layouts[packing] == "awq":
        return _awq({**quant, "version": "gemm", "zero_point": True}, where)
    form = _gptq({**quant, "checkpoint_format": "gptq", "dynamic": None}, where)
    return replace(form, other_groups=_other_groups(quant, form.group_size, where, "extra_config"))


def _gguf(quant: Mapping[str, Any], where: str) -> QuantConfig:
    """As loader/checkpoint/gguf/config.py writes it."""
    bits = integer(quant, "bits", where, 4, 8)
    group_bytes = integer(quant, "group_bytes", where, 2, 8)
    return QuantConfig(bits, _group_size(quant, where), zero_offset=0, method="gguf", group_bytes=group_bytes)


def _fp8(quant: Mapping[str, Any], where: str) -> QuantConfig:
    form = quant.get("fmt") or "e4m3"
    if form not in ("e4m3", "float8_e4m3fn"):
        raise ConfigError(
            f"reading {where}", f"FP8 of the form {form!r:.40}", f"Supported is 'e4m3'. {_DENSE}"
        )
    block = _block(quant, "weight_block_size", where)
    return QuantConfig(8, -1, zero_offset=0, method="fp8", block=block)


def _block(quant: Mapping[str, Any], name: str, where: str) -> tuple[int, int] | None:
    block = quant.get(name)
    if block is None:
        return None
    sizes = isinstance(block, list) and len(block) == 2
    if not sizes or not all(type(n) is int and 1 <= n <= 2**16 for n in block):
        raise bad(where, name, block, "two positive integers, [rows, columns]")
    return block[0], block[1]


def _compressed_tensors(quant: Mapping[str, Any], where: str) -> QuantConfig:
    """Of this container only FP8 weights with one scale a block, a row or a matrix are read."""
    groups = quant.get("config_groups")
    weights = [
        group.get("weights")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    ]
    block = None
    for kind in weights:
        kind = kind if isinstance(kind, Mapping) else {}
        block = _block(kind, "block_structure", where) or block
        is_fp8 = (kind.get("type"), kind.get("num_bits")) == ("float", 8)
        if not is_fp8 or kind.get("strategy") not in ("channel", "tensor", "block"):
            found = (
                f"compressed-tensors weights of {kind.get('num_bits')!r:.20} bits, type {kind.get('type')!r:.20}, "
                f"strategy {kind.get('strategy')!r:.20}"
            )
            remedy = f"Of this form only 8-bit floats per block, channel or tensor are read. {_DENSE}"
            raise ConfigError(f"reading {where}", found, remedy)
    if not weights:
        raise ConfigError(f"reading {where}", "compressed-tensors without config_groups", _DENSE)
    return QuantConfig(8, -1, zero_offset=0, method="fp8", block=block)
