"""FP8 weights on disk (float8_e4m3fn values and what to multiply them by) -> a dense matrix, or int8 codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenrt.config.quant import FP8_BLOCK, GROUP_SIZE
from qwenrt.errors import CheckpointError
from qwenrt.ops.quantization import quantize_rows, row_blocks
from qwenrt.ops.stored import SCALE_DTYPES, check_stored, dtype_name, fp8_scale_shapes
from qwenrt.ops.types import CanonicalWeight

_LARGEST = 448.0  # of the finite values of e4m3fn, which has no infinities
_NAN = 0x7F  # its one magnitude that is no number; 0xff with the sign


def dequantize_fp8(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int] | None = FP8_BLOCK,
    dtype: torch.dtype = torch.bfloat16,
    *,
    name: str = "weight",
) -> torch.Tensor:
    """``weight`` float8_e4m3fn [N, K] times its ``scale`` (float32, bfloat16 or float16), [N, K] in ``dtype``.

    With ``block`` (rows, columns) there is a scale for each block, [ceil(N / rows), ceil(K / columns)], and blocks at
    the lower and right edge may be partial; without one for each row, [N] or [N, 1], or one for the matrix, [], [1] or
    [1, 1]. Whatever its name (weight_scale_inv), it is a multiplier:
    W[n, k] = weight[n, k] * scale[n // rows, k // columns], a float32 product rounded once to ``dtype``.
    Raises CheckpointError that names the tensor for wrong shapes and dtypes, NaN codes, and scales that are not
    finite and positive or whose products do not fit into ``dtype``.
    """
    return _scaled(weight, scale, block, dtype, name).dense(dtype)


def fp8_to_int8(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int] | None = FP8_BLOCK,
    bias: torch.Tensor | None = None,
    *,
    name: str = "weight",
) -> CanonicalWeight:
    """The same matrix rounded to int8: as many bytes as on disk.

    Codes are rounded per row in groups of block[1] inputs (128 without blocks), each group over its own range. They
    are off by about half a step at most, 1/510 of that range, where FP8 values lie 1/16 to 1/8 of their own size
    apart: for Gaussian weights in groups of 128 the norm of the added error is 0.6 % of the weights' norm (0.9 % for
    heavy tails, Student's t of 4 degrees), beside the 2.6 % that FP8 cost. What is small in the group of an outlier
    loses more than FP8 had taken from it.
    """
    scaled = _scaled(weight, scale, block, torch.float32, name)
    group_size = GROUP_SIZE if block is None else block[1]
    rows, columns = scaled.codes.shape
    return quantize_rows(scaled.rows, (rows, columns), 8, group_size, bias, sym=False, name=name)


@dataclass(frozen=True)
class _Scaled:
    """FP8 values as int8 bits ``codes`` [N, K], and 2**8 times their scales, float32 [ceil(N/n), ceil(K/k)] for
    ``block`` (n, k)."""

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.codes.shape
        out = torch.empty(rows, columns, dtype=dtype)
        for part in row_blocks(rows, columns):
            out[part] = self.rows(part)
        return out

    def rows(self, part: slice) -> torch.Tensor:
        """The product in float32, [n, K]."""
        # Bits seee emmm, put where float16 keeps its own (s eeee emmm mmmm mmm), read as the value / 2**8, as the
        # exponents are biased by 7 and by 15; subnormal values too. Widening copies the sign to bit 14: cleared.
        bits = self.codes[part].to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
        values = bits.view(torch.float16).to(torch.float32)
        high, wide = self.block
        scales = self.scales[torch.arange(part.start, part.stop) // high]
        whole = values.shape[1] // wide
        values[:, : whole * wide].view(len(values), whole, wide).mul_(scales[:, :whole, None])
        values[:, whole * wide :].mul_(scales[:, whole:])
        return values


def _scaled(
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int] | None,
    dtype: torch.dtype,
    name: str,
) -> _Scaled:
    """The checked tensors, or CheckpointError."""
    asked = f"{name}: reading FP8 values {list(weight.shape)} with scales {list(scale.shape)}"
    if weight.dim() != 2 or 0 in weight.shape:
        raise CheckpointError(asked, "the values are no matrix", "The file is damaged or of another model.")
    rows, columns = weight.shape
    if block is not None:
        asked += f" in blocks of {list(block)}"
        if min(block) < 1:
            raise CheckpointError(
                asked, "a block has no elements", "Correct weight_block_size in the config."
            )
    fitting = fp8_scale_shapes(rows, columns, block)
    if block is None:
        block = (rows, columns) if scale.numel() == 1 else (1, columns)
    (grid,) = fp8_scale_shapes(rows, columns, block)
    if tuple(scale.shape) in fitting:
        scale = scale.reshape(grid)
    check_stored(
        asked,
        "an FP8 tool (e4m3)",
        weight=(weight, (rows, columns), ("float8_e4m3fn",)),
        scale=(scale, grid, SCALE_DTYPES),
    )
    _check_values(weight, scale, dtype, asked)
    return _Scaled(weight.view(torch.int8), scale.to("cpu", torch.float32) * 2.0**8, block)


def _check_values(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, asked: str) -> None:
    low, high = float(scale.min()), float(scale.max())
    if low <= 0:
        zero, negative = int((scale == 0).sum()), int((scale < 0).sum())
        found = f"of {scale.numel()} scales {zero} are zero and {negative} negative"
        raise CheckpointError(
            asked, found, "Its quantisation failed, unless the file's sha256 is not its author's."
        )
    if high > min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / _LARGEST:
        raise CheckpointError(
            asked,
            f"scales up to {high:.1e} make values that do not fit in {dtype_name(dtype)}",
            "Load the model in bfloat16; if it is loaded so, the file is damaged.",
        )
    codes = weight.view(torch.int8)
    if int(codes.max()) == _NAN or int(weight.view(torch.uint8).max()) == 0xFF:
        bad = int((codes == _NAN).sum()) + int((codes == -1).sum())
        raise CheckpointError(
            asked,
            f"{bad} of {weight.numel()} values are NaN",
            "Its quantisation failed, unless the file's sha256 is not its author's.",
        )
