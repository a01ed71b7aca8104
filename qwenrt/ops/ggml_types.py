"""The element types of GGUF files: how large their blocks are, and what becomes of them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgmlType:
    """One element type: ``block`` elements of a row lie together in ``nbytes`` bytes.

    What ops/ggml.py makes of it: codes of ``bits`` (16: it is dense already), of which ``group_size`` share a scale.
    ``offsets``: each group has a float offset as well, else one zero serves all. ``wide``: scales are products that
    need float32, else float16 holds them.
    """

    id: int
    name: str
    block: int
    nbytes: int
    bits: int = 16
    group_size: int = 0
    offsets: bool = False
    wide: bool = False

    @property
    def group_bytes(self) -> int:
        """Of a group's scale and, beside it, its offset, which is float32 whatever the scale is."""
        return (4 if self.wide else 2) + 4 * self.offsets


_DENSE = (GgmlType(0, "F32", 1, 4), GgmlType(1, "F16", 1, 2), GgmlType(30, "BF16", 1, 2))
_CODED = (
    GgmlType(2, "Q4_0", 32, 18, 4, 32),
    GgmlType(3, "Q4_1", 32, 20, 4, 32, offsets=True),
    GgmlType(6, "Q5_0", 32, 22, 8, 32),
    GgmlType(7, "Q5_1", 32, 24, 8, 32, offsets=True),
    GgmlType(8, "Q8_0", 32, 34, 8, 32),
    GgmlType(10, "Q2_K", 256, 84, 4, 16, offsets=True, wide=True),
    GgmlType(11, "Q3_K", 256, 110, 4, 16, wide=True),
    GgmlType(12, "Q4_K", 256, 144, 4, 32, offsets=True, wide=True),
    GgmlType(13, "Q5_K", 256, 176, 8, 32, offsets=True, wide=True),
    GgmlType(14, "Q6_K", 256, 210, 8, 16, wide=True),
    GgmlType(20, "IQ4_NL", 32, 18, 8, 32),
    GgmlType(23, "IQ4_XS", 256, 136, 8, 32, wide=True),
    GgmlType(39, "MXFP4", 32, 17, 8, 32, wide=True),
)
BY_ID = {kind.id: kind for kind in (*_DENSE, *_CODED)}
CODED = {kind.name: kind for kind in _CODED}

_TABLES = "its values are looked up in tables of hundreds of points, which are not read here"
_DEAD = "no program writes it any more"
# id -> (name, why it is not read)
NOT_READ = {
    4: ("Q4_2", _DEAD),
    5: ("Q4_3", _DEAD),
    9: ("Q8_1", "it is a type of activations"),
    15: ("Q8_K", "it is a type of activations"),
    16: ("IQ2_XXS", _TABLES),
    17: ("IQ2_XS", _TABLES),
    18: ("IQ3_XXS", _TABLES),
    19: ("IQ1_S", _TABLES),
    21: ("IQ3_S", _TABLES),
    22: ("IQ2_S", _TABLES),
    29: ("IQ1_M", _TABLES),
    **{
        i: (name, "no Qwen has weights of it")
        for i, name in ((24, "I8"), (25, "I16"), (26, "I32"), (27, "I64"))
    },
    28: ("F64", "no Qwen has weights of it"),
    **{i: (f"Q4_0_{form}", _DEAD) for i, form in ((31, "4_4"), (32, "4_8"), (33, "8_8"))},
    34: ("TQ1_0", "ternary codes are not read here"),
    35: ("TQ2_0", "ternary codes are not read here"),
    **{i: (f"IQ4_NL_{form}", _DEAD) for i, form in ((36, "4_4"), (37, "4_8"), (38, "8_8"))},
    40: ("NVFP4", "its blocks have scales of 8-bit floats, which are not read here"),
    41: ("Q1_0", "binary codes are not read here"),
}
