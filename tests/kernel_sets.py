"""The instruction sets that tests force in turn: all that this CPU and this build run, best first."""

from __future__ import annotations

from qwenrt.backends.cpu import backend, kernels

_LOADED = backend._load()
WHY_NOT = str(_LOADED) if isinstance(_LOADED, kernels.KernelsUnavailable) else ""
SETS: tuple[str, ...] = ("auto",) if isinstance(_LOADED, kernels.KernelsUnavailable) else _LOADED.isas


def report() -> str:
    """One line at the end of a run."""
    return (
        f"CPU kernels: {WHY_NOT}" if WHY_NOT else f"CPU kernels, each set forced in turn: {', '.join(SETS)}"
    )
