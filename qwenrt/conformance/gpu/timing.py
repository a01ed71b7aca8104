"""Times of an accelerator, by its own events: bandwidth, products, launches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from qwenrt.conformance.gpu import driver
from qwenrt.conformance.gpu.report import Notes

_TRIES = 20
_CHAIN = 200  # kernels of a graph
_BANDWIDTH = "bandwidth, GB/s"
_PRODUCTS = "products of bfloat16, TFLOP/s"


def seconds_of(work: Callable[[], Any], tries: int = _TRIES) -> float:
    """The median time of what ``work`` asks of the current device, after a first time that is not counted."""
    work()
    event: Any = torch.cuda.Event
    begins, ends = ([event(enable_timing=True) for _ in range(tries)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return float(median(b.elapsed_time(e) for b, e in zip(begins, ends, strict=True))) / 1000


def graph_of(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """What ``work`` asks for, captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def bandwidth(notes: Notes, device: torch.device) -> None:
    """Of 1 and 4 GB: a copy (read and written bytes), and a kernel that only reads."""
    kernels = _kernels(notes)
    for size in (1 << 30, 4 << 30):
        try:
            source = torch.ones(size // 4, dtype=torch.int32, device=device)
            target = torch.empty_like(source)
        except torch.OutOfMemoryError:
            return
        rates = {"copy": 2 * size / seconds_of(lambda a=target, b=source: a.copy_(b))}  # type: ignore[misc]
        if kernels is not None:
            rates["read"] = size / seconds_of(lambda b=source: kernels.read(b))  # type: ignore[misc]
        for name, rate in rates.items():
            notes.figure(f"{name} of {size >> 30} GiB, GB/s", rate / 1e9)
        best = max(notes.figures.get(_BANDWIDTH, 0.0), *(rate / 1e9 for rate in rates.values()))
        notes.figure(_BANDWIDTH, best)
        del source, target


def measured_bandwidth(out: Path) -> float:
    """Bytes a second as phase "limits" found them; 0 where it did not."""
    return driver.figures_of(out, "limits").get(_BANDWIDTH, 0.0) * 1e9


def measured_products(out: Path) -> float:
    """Operations a second of products, as phase "limits" found them; 0 where it did not."""
    return driver.figures_of(out, "limits").get(_PRODUCTS, 0.0) * 1e12


def products(notes: Notes, device: torch.device, size: int = 8192) -> None:
    """A square product of random numbers in bfloat16: zeros would take less power, and be faster."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    notes.figure(_PRODUCTS, 2 * size**3 / seconds_of(lambda: a @ b) / 1e12)


def launches(notes: Notes, device: torch.device) -> None:
    """What each kernel of a captured chain costs: empty ones, and ones that read 4 MB and depend on each other, each
    with and without a programmed dependent launch, by which a kernel begins while the one before ends."""
    kernels = _kernels(notes)
    data = torch.ones(1 << 20, dtype=torch.int32, device=device)
    if kernels is None:
        graph = graph_of(lambda: [data.add_(1) for _ in range(_CHAIN)])
        notes.figure("torch's addition of 4 MB in a graph, us", seconds_of(graph.replay) / _CHAIN * 1e6)
        return
    for pdl in (False, *([True] if kernels.has_pdl(device) else [])):
        how = "with" if pdl else "without"
        for name, kernel in (("empty", kernels.empty), ("reading 4 MB", kernels.dependent)):
            try:
                graph = graph_of(lambda: [kernel(data, pdl) for _ in range(_CHAIN)])  # noqa: B023
                cost = seconds_of(graph.replay) / _CHAIN * 1e6
            except Exception as error:  # whether such a launch can be captured is one of the questions
                notes.detail[f"{name} {how} PDL"] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            notes.figure(f"a kernel of a graph, {name}, {how} PDL, us", cost)


def linear(notes: Notes, device: torch.device, name: str, shape: tuple[int, int], limit: float) -> None:
    """One token by torch's product in bfloat16, over copies of the weight that do not fit the cache together."""
    rows, columns = shape
    copies = max(2, (256 << 20) // (rows * columns * 2))
    x = torch.randn(1, columns, device=device, dtype=torch.bfloat16)
    weights = [torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    graph = graph_of(lambda: [F.linear(x, weight) for weight in weights])
    rate = rows * columns * 2 * copies / seconds_of(graph.replay)
    notes.figure(f"{name} by torch, GB/s", rate / 1e9)
    if limit:
        notes.figure(f"{name} by torch, of the bandwidth", rate / limit)


def _kernels(notes: Notes) -> Any:
    """Our own reading kernels, where there is a Triton."""
    try:
        return importlib.import_module("qwenrt.conformance.gpu.kernels")
    except Exception as error:  # one that is broken too
        notes.detail["triton"] = f"{type(error).__name__}: {str(error)[:200]}"
        return None
