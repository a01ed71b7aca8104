"""What the files of quantised checkpoints have in common: the checks of their tensors, and of what is written."""

from __future__ import annotations

import torch

from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.ops.types import CanonicalWeight

WORD = 32  # codes are packed into int32 words
WORD_DTYPES = (torch.int32,)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Wanted = tuple[torch.Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]


def check_stored(asked: str, tool: str, **wanted: Wanted) -> None:
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
        if tensor.dtype not in dtypes:
            raise CheckpointError(
                asked,
                f"{label} has dtype {dtype_name(tensor.dtype)}, expected {' or '.join(map(dtype_name, dtypes))}",
                f"{tool[0].upper()}{tool[1:]} writes it so: the file is of another tool, or was converted.",
            )
    for label, (tensor, _, _) in wanted.items():
        if tensor is None or tensor.dtype not in SCALE_DTYPES:
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                asked,
                f"{bad} of {tensor.numel()} values of {label} are not finite",
                "Its quantisation failed: quantise the model again, or use another release.",
            )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def real_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    """``bias``, or None where it is all zeros: quantisation tools add one to linears that have none."""
    return bias if bias is not None and bool(bias.any()) else None


def code_tensors(weight: CanonicalWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes, scales and zeros of a quantised weight; ConfigError for a dense one."""
    if weight.codes is None or weight.scales is None or weight.zeros is None:
        raise ConfigError("reading a weight's codes", "it is dense", "Quantise it first (quantize_dense).")
    return weight.codes, weight.scales, weight.zeros


def half_scales(scales: torch.Tensor, asked: str) -> torch.Tensor:
    """Scales as the float16 that files hold; ConfigError where one becomes infinite or zero by that."""
    half = scales.to(torch.float16)
    lost = int((~torch.isfinite(half) | ((half == 0) & (scales != 0))).sum())
    if lost:
        raise ConfigError(
            asked, f"{lost} of {scales.numel()} scales do not fit in float16", "Leave this linear dense."
        )
    return half
