"""A cache of int8 codes as fused attention reads it, and whether it reads them rightly here.

Apart from the self-check of attention: an operator that is wrong over codes still serves numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwenrt.backends.ascend import fused
from qwenrt.backends.selfcheck import TOLERANCE, complaint, relative
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, LayerKV

_BLOCKS = 6
_LENGTHS = (1, fused.PAGE, 2 * fused.PAGE + 5)


def signed_cache(
    shape: tuple[int, int, int, int], empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
) -> LayerKV:
    """Codes int8 [num_blocks, block_size, KVH, hd]; scales and zeros float32 [num_blocks, block_size, KVH], in memory
    [num_blocks, KVH, block_size]. ``empty`` gives memory."""
    blocks, block_size, kv_heads, _ = shape
    sides = [empty((blocks, kv_heads, block_size), torch.float32).transpose(1, 2) for _ in range(4)]
    return LayerKV(empty(shape, torch.int8), empty(shape, torch.int8), *sides)


def complaint_of(mask: torch.Tensor, kv_heads: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """What is wrong with the operator over codes, for one token of each of three sequences; None where nothing is."""
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(mask.device, dtype)

    def error() -> float:
        shape = (_BLOCKS, fused.PAGE, kv_heads, head_dim)
        kv = signed_cache(shape, lambda size, of: torch.zeros(size, dtype=of, device=mask.device))
        slots = torch.arange(_BLOCKS * fused.PAGE, device=mask.device)
        keys, values = (normal(len(slots), kv_heads, head_dim) for _ in range(2))
        values[::5] += 2  # no range of theirs is around zero
        reference.store_kv(keys, values, kv, slots)
        table = torch.tensor([[4, 0, 0], [1, 5, 0], [3, 0, 2]], device=mask.device)
        position = torch.tensor([length - 1 for length in _LENGTHS], device=mask.device)
        plan = DecodePlan(position, table, reference.decode_slots(table, position, fused.PAGE))
        q, scale = normal(len(_LENGTHS), 2 * kv_heads, head_dim), head_dim**-0.5
        got = fused.decode_attention(q, kv, plan, scale, mask, fused.HostLengths())
        return relative(got, reference.decode_attention(q, kv, plan, scale))

    return complaint(error, TOLERANCE[dtype])
