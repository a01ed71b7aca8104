"""The limits that memory and instructions set: the kernels of a decode step, with weights in memory and in the cache.

On a shared machine both change within seconds: what the memory delivers, and what a neighbour on the other half of a
core leaves of its instructions. A kernel can be no faster than the lesser of the two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.bandwidth import Bandwidth
    from qwenrt.ops.types import Packed

FORMATS = {"int4": "int4, activations int8", "int8": "int8, activations int16", "bf16": "bf16"}
_COLUMNS, _ROWS = 2048, 11008  # gate_up_proj of Qwen-1.8B
_CACHED_ROWS = 4096  # of these rows, 4 to 13 MB
_MEMORY_BYTES = 2**28  # of matrices that are read one after the other, far more than any cache holds
_CACHED_SECONDS = 0.02  # about how long a measurement with weights in the cache takes


def sample(bandwidth: Bandwidth) -> Callable[[], dict[str, float]]:
    """What measures once, in bytes per second: ``read``, plain reading, and by format ``..._cache`` and
    ``..._memory``, the product of one token with weights that lie there."""
    works = [
        (f"{name}_{place}", _products(name, bandwidth.threads, place == "cache"))
        for name in FORMATS
        for place in ("cache", "memory")
    ]
    return lambda: {"read": bandwidth.bytes_per_s(), **{key: work() for key, work in works}}


def _products(name: str, threads: int, cached: bool) -> Callable[[], float]:
    import torch

    from qwenrt.backends.cpu import CPUBackend
    from qwenrt.backends.cpu.activations import rule_of
    from qwenrt.loader.random_weights import random_rows

    cpu = CPUBackend(torch.device("cpu"))
    activations = "int8" if name == "int4" else "int16"
    cpu.configure(num_threads=threads, activations=activations)
    bits = {"int4": 4, "int8": 8, "bf16": 16}[name]
    rows = _CACHED_ROWS if cached else _ROWS
    weights = [cpu.pack_linear(random_rows(rows, _COLUMNS, bits), torch.float32)]
    while not cached and len(weights) * weights[0].nbytes < _MEMORY_BYTES:
        weights.append(cpu.pack_linear(random_rows(rows, _COLUMNS, bits), torch.float32))
    x, nbytes = torch.randn(1, _COLUMNS), sum(weight.nbytes for weight in weights)
    how = rule_of(activations, weights[0])

    def multiply(weight: Packed) -> None:
        """The library's call without what the backend does around it: a step makes one for all its linears."""
        assert cpu.kernels is not None
        if name != "bf16":
            cpu.kernels.quant_linear(x, weight, how)
        elif weight.kind == "dense12":
            cpu.kernels.dense12_linear(x, weight)
        else:  # an instruction set that gains nothing from 12 bits
            cpu.kernels.dense16_linear(x, weight.data["weight"], None)

    times = max(1, int(_CACHED_SECONDS * 4e10 / nbytes)) if cached else 1

    def run() -> float:
        started = time.perf_counter()
        for _ in range(times):
            for weight in weights:
                multiply(weight)
        return times * nbytes / (time.perf_counter() - started)

    run()
    return run


def lesser(found: Mapping[str, float], name: str) -> float:
    """What a kernel could reach at most in a sample."""
    return min(found["read"], found[f"{name}_cache"])


def table(samples: Sequence[Mapping[str, float]]) -> str:
    """GB/s: medians of the half of the samples in which the memory was slower, and of the other half."""
    ordered = sorted(samples, key=lambda found: found["read"])
    middle = (len(ordered) + 1) // 2
    lines = [
        "| memory, GB/s | weights | plain reading | kernel, cache | kernel, memory | of the lesser |",
        "|---|---|---|---|---|---|",
    ]
    for half in filter(None, (ordered[:middle], ordered[middle:])):
        for name, label in FORMATS.items():
            spread = f"{half[0]['read'] / 1e9:.0f} to {half[-1]['read'] / 1e9:.0f}"
            lines.append(f"| {spread} | {label} | {' | '.join(_figures(half, name))} |")
    return "\n".join(lines) + "\n"


def _figures(samples: Sequence[Mapping[str, float]], name: str) -> list[str]:
    keys = ("read", f"{name}_cache", f"{name}_memory")
    rates = [statistics.median(found[key] for found in samples) / 1e9 for key in keys]
    share = statistics.median(found[f"{name}_memory"] / lesser(found, name) for found in samples)
    return [*(f"{rate:.1f}" for rate in rates), f"{share:.2f}"]
