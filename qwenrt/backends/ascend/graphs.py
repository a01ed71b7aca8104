"""Steps that decode as graphs of torch_npu: captured once, and told the lengths of the sequences before each replay.

The lengths of attention are the host's numbers and part of what was captured, so torch_npu calls every attention of the
step again, on a stream of its own, to change them: host work for each layer and step, which `explain` says.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qwenrt.backends.ascend.fused import HostLengths
from qwenrt.backends.graphs import Graph, GraphStack
from qwenrt.ops.steps import Step


def why_no_graphs() -> str | None:
    """The reason steps cannot be captured here: a torch_npu without graphs whose lengths can change. None if it can."""
    npu = getattr(torch, "npu", None)
    missing = [name for name in ("NPUGraph", "graph", "graph_pool_handle") if not hasattr(npu, name)]
    if missing:
        return f"this torch_npu has no torch.npu.{missing[0]}"
    if "auto_dispatch_capture" not in inspect.signature(npu.graph.__init__).parameters:  # type: ignore[union-attr]
        return "graphs of this torch_npu do not take new lengths (auto_dispatch_capture)"
    return None


@dataclass
class HostWork:
    """What telling graphs their lengths has taken, of all replays so far."""

    steps: int = 0
    seconds: float = 0.0


class NPUGraphs:
    """Graphs for GraphStack, in one pool of memory: they are replayed one after the other, and what a body gives is in
    memory of its own. Few sizes: each graph takes streams, of which a device has some hundreds."""

    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)

    def __init__(self, lengths: HostLengths) -> None:
        self._lengths, self._count, self._work = lengths, 0, HostWork()
        self._pool: Any = None

    def capture(self, body: Callable[[], None]) -> Graph:
        npu = torch.get_device_module("npu")
        body()  # what is compiled or allocated by a first call must not be captured
        npu.synchronize()
        if self._pool is None:
            self._pool = npu.graph_pool_handle()
        graph = npu.NPUGraph()
        self._lengths.capturing, self._lengths.rows = True, 0
        try:
            # Other threads go on with what they do on this device: only this one's calls are part of the capture.
            with npu.graph(
                graph, pool=self._pool, auto_dispatch_capture=True, capture_error_mode="thread_local"
            ):
                body()
        finally:
            self._lengths.capturing = False
        self._count += 1
        return _Captured(graph, self._lengths.rows, npu.Event(), self._work)

    def note(self) -> str:
        work = self._work
        each = ""
        if work.steps:
            each = f"; to tell them lengths takes the host {work.seconds / work.steps * 1e3:.2f} ms a step"
        return f"captured in {self._count} graph{'' if self._count == 1 else 's'}{each}"


class _Captured:
    def __init__(self, graph: Any, rows: int, done: Any, work: HostWork) -> None:
        self._graph, self._rows, self._done, self._work = graph, rows, done, work

    def replay(self, step: Step) -> None:
        if self._rows:
            self._done.synchronize()  # the replay before must not see this one's lengths
            lengths = step.kv_lens + [1] * (self._rows - len(step.kv_lens))
            began = time.perf_counter()
            self._graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])
            self._work.seconds += time.perf_counter() - began
            self._work.steps += 1
        self._graph.replay()
        self._done.record()


class GreedyGraphStack(GraphStack):
    """For devices that do not sum float64, which drawing tokens needs: the host draws, after a step by the seams."""

    def why_not(self, step: Step) -> str | None:
        if any(draw is not None and not draw.greedy for draw in step.draws):
            return "tokens are drawn, for which this device has no float64"
        return super().why_not(step)
