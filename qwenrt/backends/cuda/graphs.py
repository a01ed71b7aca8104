"""Capture by torch.cuda: CUDA's graphs on NVIDIA's devices, HIP's on AMD's, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwenrt.backends.graphs import Graph
from qwenrt.ops.steps import Step

_WARM_UPS = 2  # the first run makes handles, work areas and compiled kernels; the second is the first without


class _Captured:
    """A graph that is on its device."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self, step: Step) -> None:
        self._graph.replay()


class CudaGraphs:
    """Captures on one device, for numbers of rows up to the last of ``sizes``.

    All graphs work in one pool of memory, each over what another has left there: they are replayed one after the other,
    and what a body gives is in memory of its own. ``nbytes``: how much less the device had free after the captures.
    """

    def __init__(self, device: torch.device, sizes: tuple[int, ...]) -> None:
        self._device, self.sizes, self.nbytes, self._count = device, sizes, 0, 0
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # a handle of torch's

    def capture(self, body: Callable[[], None]) -> Graph:
        """As Graphs.capture. Raises what ``body`` did wrong, or else what the driver says."""
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()
            before, _ = torch.cuda.mem_get_info(self._device)
            # A capture that fails leaves its own stream the current one; this puts back the one that was.
            with torch.cuda.stream(torch.cuda.current_stream()):
                graph = self._take_down(body)
            after, _ = torch.cuda.mem_get_info(self._device)
        self._count += 1
        self.nbytes += max(0, before - after)
        return _Captured(graph)

    def note(self) -> str:
        graphs = f"{self._count} graph{'' if self._count == 1 else 's'}"
        return f"captured in {graphs}, which took {self.nbytes / 2**20:.1f} MiB"

    def _take_down(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        own, asking = self._stream, torch.cuda.current_stream()
        own.wait_stream(asking)
        with torch.cuda.stream(own):  # that of the capture: libraries keep a work area for each stream
            for _ in range(_WARM_UPS):
                body()
        asking.wait_stream(own)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on with what they do on this device: only this one's calls are part of the capture.
            with torch.cuda.graph(graph, self._pool, own, capture_error_mode="thread_local"):
                body()
        except Exception as error:
            raise _first(error) from None
        return graph


def _first(error: BaseException) -> BaseException:
    """What went wrong before a capture that it spoilt was ended, which is an error itself."""
    while error.__context__ is not None:
        error = error.__context__
    return error
