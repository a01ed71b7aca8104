"""Which warps are best for a linear of few tokens on the device that is here: each choice is timed, and the best is
kept where it is better than what is done without a table."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.cuda import packing, streaming
from qwenrt.backends.cuda import tuned as tables
from qwenrt.backends.cuda.overrides import TritonBackend
from qwenrt.backends.cuda.tables import Tiles, Warps
from qwenrt.backends.cuda.tuned import Shape
from qwenrt.conformance.gpu import timing
from qwenrt.errors import BackendError
from qwenrt.files import is_there
from qwenrt.ops.types import Packed

logger = logging.getLogger("qwenrt")
# Seconds of one launch, None where it cannot be made: (shape, warps, whether it may begin early).
Clock = Callable[[Shape, Warps, bool], float | None]

CHOICES = tuple(
    Warps(rows, inputs) for rows in (1, 2, 4, 8) for inputs in (1, 2, 4, 8, 16) if rows * inputs <= 16
)
_BETTER = 0.98  # of the time that it takes without a table, to be written into one
_BEYOND_CACHE = 256 << 20  # bytes of weights that are read in turn: more than any L2 holds


@dataclass
class Choice:
    """Of one linear: what is best, and seconds of a launch by it and by what is done without a table."""

    shape: Shape
    warps: Warps
    best_s: float
    usual_s: float


@dataclass
class Tuning:
    choices: list[Choice] = field(default_factory=list)
    pdl: bool = False
    early: float = math.nan  # with programmed dependent launches a model's linears take so much of their time

    def better(self, usual: Tiles) -> dict[Shape, Warps]:
        """What is not done without a table."""
        return {c.shape: c.warps for c in self.choices if c.warps != usual.warps(*c.shape)}


def tune(
    shapes: Iterable[Shape], tiles: Tiles, clock: Clock, choices: Sequence[Warps] = CHOICES
) -> Iterator[Choice]:
    """The best choice for each shape, one after the other; shapes of which no launch can be made are left out."""
    for shape in shapes:
        usual = tiles.warps(*shape)
        times = {warps: clock(shape, warps, False) for warps in dict.fromkeys((usual, *choices))}
        made = {warps: taken for warps, taken in times.items() if taken is not None}
        if not made:
            continue
        best = min(made, key=lambda warps: made[warps])
        before = made.get(usual, math.inf)
        if made[best] >= _BETTER * before:
            best = usual
        yield Choice(shape, best, made[best], before)


def early(found: Sequence[Choice], clock: Clock) -> float:
    """How much of their time the linears take that may begin early; NaN where one cannot."""
    times = [clock(choice.shape, choice.warps, True) for choice in found]
    whole = sum(choice.best_s for choice in found)
    return math.nan if not found or None in times else sum(filter(None, times)) / whole


def tuned(shapes: Iterable[Shape], tiles: Tiles, clock: Clock, note: Callable[[Choice], None]) -> Tuning:
    """All of a model's."""
    result = Tuning()
    for choice in tune(shapes, tiles, clock):
        note(choice)
        result.choices.append(choice)
    result.early = early(result.choices, clock)
    result.pdl = result.early < _BETTER
    return result


def clock_of(backend: Backend) -> DeviceClock:
    """Of a device whose linears may be chosen. Raises BackendError where there are none."""
    if not isinstance(backend, TritonBackend) or not backend.gluon:
        raise BackendError(
            f"tuning {backend.device}",
            f"no kernel in Gluon serves there ({backend.describe()})",
            "Tables are for NVIDIA's cards from sm_80 on, with a Triton that has Gluon.",
        )
    return DeviceClock(backend.device)


def keep(
    backend: Any,
    shapes: Iterable[Shape],
    clock: Clock,
    directory: Path,
    out: Path | None,
    note: Callable[[Choice], None],
) -> tuple[Tuning, Path]:
    """Times every shape, and writes what is better where loads look for it, beside what was found of others before; or
    to ``out``. ``backend``: what has a device_name and tiles."""
    usual = dataclasses.replace(backend.tiles, own={}, pdl=False)
    result = tuned(shapes, usual, clock, note)
    device, triton = backend.device_name(), tables.version_of_triton()
    table = tables.Tuned(device, triton, result.better(usual), result.pdl)
    path = out or tables.path_in(directory, device, triton)
    if out is None and is_there(path, BackendError):
        try:
            table = table.beside(tables.read(path), [choice.shape for choice in result.choices])
        except BackendError as error:
            logger.warning("what was there is replaced: %s", error)
    tables.write(path, table)
    return result, path


class DeviceClock:
    """Times launches over random weights, in a graph that reads more of them than the cache holds."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self._device, self._dtype = device, dtype
        self._held: tuple[Shape, list[Packed]] | None = None

    def __call__(self, shape: Shape, warps: Warps, pdl: bool) -> float | None:
        from qwenrt.backends.cuda.kernels import stream

        weights = self._weights(shape)
        if streaming.why_not(weights[0], self._dtype) is not None:
            return None
        x = torch.randn(1, shape[2], device=self._device, dtype=self._dtype)
        result: list[torch.Tensor] = []

        def work() -> None:
            result[:] = [stream.linear(x, w, warps, self._dtype, pdl=pdl) for w in weights]

        try:
            seconds = timing.seconds_of(timing.graph_of(work).replay) / len(weights)
        except Exception:  # more shared memory or registers than there are; a launch that cannot be captured
            return None
        if pdl:  # what begins too early is fast, and wrong
            right = [stream.linear(x, w, warps, self._dtype) for w in weights]
            if not all(map(torch.equal, result, right)):
                return None
        return seconds

    def _weights(self, shape: Shape) -> list[Packed]:
        if self._held is None or self._held[0] != shape:
            self._held = None  # before the next ones are made
            bits, outputs, inputs = shape
            copies = max(2, _BEYOND_CACHE // (outputs * inputs * bits // 8))
            self._held = shape, [_random(shape, self._device, self._dtype) for _ in range(copies)]
        return self._held[1]


def _random(shape: Shape, device: torch.device, dtype: torch.dtype) -> Packed:
    bits, outputs, inputs = shape
    if bits == 16:
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        return Packed("dense", outputs, inputs, {"weight": weight}, None)
    group = 32 if inputs % 128 else 128
    words = torch.randint(
        -(1 << 31), (1 << 31) - 1, (outputs, inputs * bits // 32), device=device, dtype=torch.int32
    )
    scales = torch.full((outputs, inputs // group), 0.01, device=device, dtype=torch.float16)
    data = {"words": words, "scales": scales, "zero": 1 << (bits - 1), "perm": None}
    return Packed(packing.KINDS[bits], outputs, inputs, data, None, bits=bits, group_size=group)
