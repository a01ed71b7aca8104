"""The tensors of quantised linears as files hold them: their shapes, and the checks of what is read and written.

Needs no torch: shapes are compared with headers before anything is read.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qwenrt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

WORD_BITS = 32  # codes are packed into int32 words
WORD_DTYPES = ("int32",)
SCALE_DTYPES = ("float16", "bfloat16", "float32")

Shape = tuple[int, ...]


def gptq_shapes(rows: int, columns: int, bits: int, group_size: int) -> dict[str, Shape]:
    """Of a GPTQ linear [rows, columns]: its codes are packed along the inputs, its zeros along the outputs. Words need
    not be full, nor the last group."""
    per_word, groups = WORD_BITS // bits, num_groups(columns, group_size)
    return {
        "qweight": (math.ceil(columns / per_word), rows),
        "qzeros": (groups, math.ceil(rows / per_word)),
        "scales": (groups, rows),
    }


def awq_shapes(rows: int, columns: int, group_size: int) -> dict[str, Shape]:
    """Of an AWQ linear [rows, columns] in the gemm layout: its 4-bit codes are packed along the outputs."""
    words, groups = math.ceil(rows * 4 / WORD_BITS), num_groups(columns, group_size)
    return {"qweight": (columns, words), "qzeros": (groups, words), "scales": (groups, rows)}


def fp8_scale_shapes(rows: int, columns: int, block: tuple[int, int] | None) -> tuple[Shape, ...]:
    """The shapes that scales of an FP8 matrix may have: one for each block; without blocks, for each row or for all."""
    if block is None:
        return (rows,), (rows, 1), (), (1,), (1, 1)
    return ((math.ceil(rows / block[0]), math.ceil(columns / block[1])),)


def num_groups(columns: int, group_size: int) -> int:
    """Groups of ``group_size`` inputs (-1: all of them), the last of which may be shorter."""
    return 1 if group_size == -1 else math.ceil(columns / min(group_size, columns))


def check_stored(asked: str, tool: str, **wanted: tuple[torch.Tensor | None, Shape, tuple[str, ...]]) -> None:
    """Raise CheckpointError unless every tensor has its shape, one of its dtypes, and finite values.

    ``wanted``: label = (tensor or None where it is absent, shape, dtypes). ``tool`` names who writes such files.
    """
    for label, (tensor, shape, dtypes) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                asked,
                f"{label} has shape {list(tensor.shape)}, expected {list(shape)}",
                "bits, group_size or block size in the config do not describe these files, or they are of "
                "another model.",
            )
        if dtype_name(tensor.dtype) not in dtypes:
            raise CheckpointError(
                asked,
                f"{label} has dtype {dtype_name(tensor.dtype)}, expected {' or '.join(dtypes)}",
                f"{tool[0].upper()}{tool[1:]} writes it so: the file is of another tool, or was converted.",
            )
    for label, (tensor, _, _) in wanted.items():
        if tensor is None or dtype_name(tensor.dtype) not in SCALE_DTYPES:
            continue
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise CheckpointError(
                asked,
                f"{bad} of {tensor.numel()} values of {label} are not finite",
                "Its quantisation failed: quantise the model again, or use another release.",
            )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bias_unless_zero(bias: torch.Tensor | None) -> torch.Tensor | None:
    """``bias``, or None where it is all zeros: quantisation tools add one to linears that have none."""
    return bias if bias is not None and bool(bias.any()) else None


def half_scales(scales: torch.Tensor, asked: str) -> torch.Tensor:
    """Scales as the float16 that files hold; ConfigError where one becomes infinite or zero by that."""
    half = scales.half()
    lost = int((~half.isfinite() | ((half == 0) & (scales != 0))).sum())
    if lost:
        raise ConfigError(
            asked, f"{lost} of {scales.numel()} scales do not fit in float16", "Leave this linear dense."
        )
    return half
