"""Kernels that measure a device and compute nothing: in Triton, whose compiler reads no other types than its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenrt.backends.cuda.kernels.read import read

__all__ = ["dependent", "empty", "has_pdl", "read"]


@triton.jit  # type: ignore[untyped-decorator]
def _empty(x, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def _dependent(x, BLOCK: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * BLOCK * STEPS
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(STEPS):
        total += tl.load(x + first + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(x + first, tl.sum(total, 0))


def empty(x: torch.Tensor, pdl: bool) -> None:
    """A kernel that does nothing."""
    _empty[(1,)](x, PDL=pdl, num_warps=1, **_launch(pdl))


def dependent(x: torch.Tensor, pdl: bool) -> None:
    """int32 ``x`` read, and changed by it: the next one has to wait. Its size is a multiple of 2048."""
    block, steps = 1024, 2
    programs = x.numel() // (block * steps)
    _dependent[(programs,)](x, BLOCK=block, STEPS=steps, PDL=pdl, num_warps=4, **_launch(pdl))


def has_pdl(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before ends: on NVIDIA's devices from sm_90 on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _launch(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}
