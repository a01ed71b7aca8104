"""The CPU's compiled kernels as tests use them: whether they were built, and the instruction sets to force in turn, all
that this CPU and this build run, best first.

QWENRT_KERNELS=avx2 makes it those of a machine whose best is AVX2, where "auto" means that one.
"""

from __future__ import annotations

import os

import pytest

from qwenrt.backends.cpu import backend, kernels

_LOADED = backend._load()
_BEST = os.environ.get("QWENRT_KERNELS", "auto")
KERNELS = _LOADED if isinstance(_LOADED, kernels.Kernels) else None
needs_kernels = pytest.mark.skipif(KERNELS is None, reason="csrc was not built")
WHY_NOT = str(_LOADED) if isinstance(_LOADED, kernels.KernelsUnavailable) else ""
SETS: tuple[str, ...] = ("auto",)
if KERNELS is not None:
    SETS = KERNELS.isas
    if _BEST in SETS:
        SETS = SETS[SETS.index(_BEST) :]
        _ALL = kernels.Kernels.isas.fget
        kernels.Kernels.isas = property(lambda self: tuple(filter(SETS.__contains__, _ALL(self))))  # type: ignore


def report() -> str:
    """One line at the end of a run."""
    return (
        f"CPU kernels: {WHY_NOT}" if WHY_NOT else f"CPU kernels, each set forced in turn: {', '.join(SETS)}"
    )
