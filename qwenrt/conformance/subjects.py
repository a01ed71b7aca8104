"""The backends at hand, each in every way that it can be set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qwenrt.backends import registry
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.backends.cpu.activations import ACTIVATIONS
from qwenrt.backends.cpu.backend import KERNEL_CHOICES, CPUBackend
from qwenrt.config import Environment
from qwenrt.errors import BackendError

DEFINITION = "definition"
_SETS = tuple(name for name in KERNEL_CHOICES if name not in ("auto", "off"))  # best first
_ACTIVATIONS = (*ACTIVATIONS, "auto")


@dataclass(frozen=True)
class Subject:
    """One backend with its settings. ``rounding``: what they allow linears to be off by, on purpose; attention over an
    int8 cache may round as well then. ``linears_only``: another subject has the same code for what rounding does not
    change."""

    name: str
    backend: Backend
    rounding: float = 0.0
    linears_only: bool = False

    @property
    def device(self) -> torch.device:
        return self.backend.device

    def lacks(self, dtype: torch.dtype) -> str:
        """Why this device cannot compute in ``dtype`` at all, or nothing."""
        try:
            self.backend.check_dtype(dtype)
        except BackendError:
            return f"{self.device} has no {str(dtype).removeprefix('torch.')}"
        return ""

    def resolve(
        self, op: str, dtype: torch.dtype, *, head_dim: int = 0, kind: str = ""
    ) -> tuple[Callable[..., Any], list[tuple[str, bool, str]]]:
        """An op as a model would bind it, and of each part whether code of the backend's own serves, or why not."""
        backend = copy.copy(self.backend)
        backend.bindings = []
        bound = backend.resolve(OpSpec(op, "conformance", dtype, head_dim, kind))
        return bound, [(b.op, b.native, b.why) for b in backend.bindings]


def at_hand(device: str = "cpu") -> list[Subject]:
    """The definitions on the CPU, and the backend of ``device`` in each way that it can be set here.

    Raises BackendError where there is no such device.
    """
    subjects = [Subject(DEFINITION, Backend(torch.device("cpu")))]
    first = registry.create(device)
    if not isinstance(first, CPUBackend):  # no other device's settings change numbers
        return [*subjects, Subject(device, first, first.rounding("linear"))]
    chosen = Environment.read().kernels
    sets = _SETS[_SETS.index(chosen) :] if chosen in _SETS else (chosen,)
    for kernels in _SETS if chosen == "auto" else sets:
        # "auto" is one of the others in each linear: how it chooses is seen once.
        for activations in _ACTIVATIONS if len(subjects) == 1 else _ACTIVATIONS[:-1]:
            backend = registry.create(device)
            try:
                backend.configure(kernels, activations=activations)
            except BackendError:  # this machine or build has no such set
                break
            name, rounding = f"{device} {kernels} {activations}", backend.rounding("linear")
            subjects.append(Subject(name, backend, rounding, activations != _ACTIVATIONS[0]))
    return subjects if len(subjects) > 1 else [*subjects, Subject(device, first)]
