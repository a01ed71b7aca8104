"""Memory for packed weights and for the cache of keys and values."""

from __future__ import annotations

import ctypes
import sys

import torch

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # of linux/mman.h


def huge_buffer(nbytes: int) -> torch.Tensor:
    """Uninitialised bytes, on huge pages where the system gives them on request: weights and cache are read from end to
    end for every token, and the fewer pages they lie on, the fewer walks through the page tables that takes."""
    if sys.platform != "linux" or nbytes < 2 * _HUGE_PAGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    # what alignment leaves over is never touched
    memory = torch.empty(nbytes + _HUGE_PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % _HUGE_PAGE
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:  # advice: a kernel without huge pages says no, and nothing is lost
        whole = nbytes // _HUGE_PAGE * _HUGE_PAGE
        advise(ctypes.c_void_p(memory.data_ptr() + first), ctypes.c_size_t(whole), _MADV_HUGEPAGE)
    return memory[first : first + nbytes]
