"""The one place where a kernel is launched."""

from __future__ import annotations

from typing import Any

import torch
import triton


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, pdl: int = False, **constants: Any
) -> None:
    """Run ``kernel`` over a grid on the device of its first tensor. ``constants``: what it is compiled for. ``pdl``: it
    may begin while the one before ends, for which it waits by itself."""
    if not all(grid):
        return
    if pdl:
        constants["launch_pdl"] = True
    first = next(arg for arg in args if isinstance(arg, torch.Tensor))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*args, num_warps=warps, **constants)
        return
    kernel[grid](*args, num_warps=warps, **constants)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n."""
    result: int = triton.next_power_of_2(max(n, least))
    return result
