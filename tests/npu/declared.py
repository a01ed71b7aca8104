"""The namespace npu:: without torch_npu: the schemas of one release, served by tests/npu/operators.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from qwenrt.backends.ascend import calls, soc
from qwenrt.backends.ascend.backend import AscendBackend
from tests.npu.operators import OPERATORS

RELEASE = "2.13.0"


@functools.cache
def declare() -> torch.library.Library:
    """Once a process: torch knows one schema of an operator."""
    library = torch.library.Library("npu", "FRAGMENT")
    for op, releases, schema in calls.known_schemas():
        if RELEASE in releases:
            library.define(schema)
            library.impl(op, _computed(op), "CPU")
    return library


def _computed(op: str) -> Callable[..., Any]:
    """Looked up when it is called, so that a test may put a wrong one in its place."""
    return lambda *given, **named: OPERATORS[op](*given, **named)


def backend(cls: type[AscendBackend], family: str) -> AscendBackend:
    """A family's backend whose device is the CPU."""
    declare()
    here = next(each for each in soc.FAMILIES if each.name == family)
    return cls(torch.device("cpu"), family=here, misfits=calls.misfits())
