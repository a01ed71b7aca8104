"""Adapters as csrc/ is told of them: each one's pairs once, and of a step who has which."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qwenrt.backends.adapted import whole_bias
from qwenrt.backends.cpu.attention import address
from qwenrt.ops.types import AdapterWeights, LoraPair, LoraSpan, Packed, StepAdapters


class Lora(ctypes.Structure):
    """QwenrtLora of csrc/abi/qwenrt_layer.h."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("added", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("first_token", ctypes.c_int64),
        ("last_token", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("reserved", ctypes.c_float),
    )


_STRUCT = np.dtype(Lora)


@dataclass(frozen=True)
class _Pairs:
    """An adapter's pairs as structs without tokens, and the tensors that they point at."""

    structs: np.ndarray
    tensors: list[torch.Tensor | None]


class Loras:
    """The adapters of steps, for the linears of a model: by name where its matrix lies, and its weight."""

    def __init__(self, linears: dict[str, tuple[int, Packed]]) -> None:
        self._linears = linears
        self._pairs: weakref.WeakKeyDictionary[AdapterWeights, _Pairs] = weakref.WeakKeyDictionary()
        # those of the last step: mostly the next one's as well
        self._last: tuple[list[tuple[weakref.ref[AdapterWeights], int, int]], np.ndarray] | None = None

    def of(self, adapters: StepAdapters) -> np.ndarray:
        """Structs sorted by their matrix, for as long as the adapters live."""
        key = [(weakref.ref(span.adapter), span.first, span.last) for span in adapters.spans]
        if self._last is None or self._last[0] != key:
            parts = []
            for span in adapters.spans:
                part = self._pairs_of(span.adapter).structs.copy()
                part["first_token"], part["last_token"] = span.first, span.last
                parts.append(part)
            every = np.concatenate(parts)
            self._last = key, every[np.argsort(every["matrix"], kind="stable")]
        return self._last[1]

    def _pairs_of(self, adapter: AdapterWeights) -> _Pairs:
        found = self._pairs.get(adapter)
        if found is None:
            tensors: list[torch.Tensor | None] = []
            structs = [
                self._struct(name, pair, tensors)
                for name, pairs in adapter.linears.items()
                if name in self._linears
                for pair in pairs
            ]
            made = np.frombuffer(b"".join(map(bytes, structs)), _STRUCT)  # type: ignore[call-overload]
            found = self._pairs[adapter] = _Pairs(made, tensors)
        return found

    def _struct(self, name: str, pair: LoraPair, tensors: list[torch.Tensor | None]) -> Lora:
        matrix, w = self._linears[name]
        return _struct(matrix, pair, None if pair.row_scale is None else whole_bias(w), tensors)


def _struct(
    matrix: int, pair: LoraPair, bias: torch.Tensor | None, tensors: list[torch.Tensor | None]
) -> Lora:
    """Of no token yet. ``bias``: the linear's; ``tensors`` gets what it points at."""
    if bias is not None:
        bias = bias[pair.rows].float().contiguous()
    # B is kept transposed by those who load adapters for this: then nothing is copied
    here = [pair.a.contiguous(), pair.b.t().contiguous(), pair.row_scale, bias, pair.bias]
    tensors += here
    rank, rows = here[1].shape  # type: ignore[union-attr]
    return Lora(matrix, *map(address, here), rank, rows, pair.first, 0, 0, pair.scale)


Kernel = Callable[["ctypes.Array[Lora]", torch.Tensor, torch.Tensor], None]


def add_lora(
    kernel: Kernel, y: torch.Tensor, x: torch.Tensor, spans: Sequence[LoraSpan], bias: torch.Tensor | None
) -> torch.Tensor:
    """As Backend.add_lora, all of it float32."""
    x, y = x.contiguous(), y.clone(memory_format=torch.contiguous_format)
    tensors: list[torch.Tensor | None] = []
    structs = []
    for span in spans:
        for pair in span.pairs:
            struct = _struct(0, pair, bias, tensors)
            struct.first_token, struct.last_token = span.first, span.last
            structs.append(struct)
    kernel((Lora * len(structs))(*structs), x, y)
    return y
