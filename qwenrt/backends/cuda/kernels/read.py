"""Memory read once, and nothing else: what a bandwidth is measured with. torch's sum reads more slowly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenrt.backends.cuda.kernels.launch import launch

_BLOCK, _STEPS = 4096, 16  # numbers that a program reads at once, and how often it does


@triton.jit
def sum_of_part(x_ptr, y_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """One program's share of x. Without a mask, which would make loads narrow."""
    first = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(STEPS):
        total += tl.load(x_ptr + first + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.program_id(0), tl.sum(total, 0))


def read(x: torch.Tensor) -> torch.Tensor:
    """int32 x [N], read once -> sums int32 of its parts, which wrap. What is left behind the last whole part of 65536
    numbers torch sums."""
    part = _BLOCK * _STEPS
    programs, rest = divmod(x.numel(), part)
    sums = torch.empty(programs + 1, dtype=torch.int32, device=x.device)
    launch(sum_of_part, (programs,), x, sums, warps=8, BLOCK=_BLOCK, STEPS=_STEPS)
    sums[programs] = x[programs * part :].sum(dtype=torch.int32) if rest else 0
    return sums
