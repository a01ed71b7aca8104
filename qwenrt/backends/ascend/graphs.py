"""Steps that decode as graphs of torch_npu: captured once, and told the lengths of the sequences before each replay.

The lengths of attention are the host's numbers and part of what was captured, so torch_npu calls every attention of the
step again, on a stream of its own, to change them: host work for each layer and step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from qwenrt.backends.ascend.fused import HostLengths
from qwenrt.backends.graphs import Graph
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


class NPUGraphs:
    """Graphs for GraphStack. ``draws``: whether tokens can be drawn on the device (else only greedy steps are captured,
    qwenrt.backends.ascend.backend)."""

    sizes: tuple[int, ...] = (
        1,
        2,
        4,
        8,
        16,
        32,
    )  # few: each graph takes streams, of which a device has some hundreds

    def __init__(self, lengths: HostLengths, draws: bool) -> None:
        self._lengths, self._draws = lengths, draws
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
            with npu.graph(graph, pool=self._pool, auto_dispatch_capture=True):
                body()
        finally:
            self._lengths.capturing = False
        return _Captured(graph, self._lengths.rows, npu.Event())


class _Captured:
    def __init__(self, graph: Any, rows: int, done: Any) -> None:
        self._graph, self._rows, self._done = graph, rows, done

    def replay(self, step: Step) -> None:
        if self._rows:
            self._done.synchronize()  # the replay before must not see this one's lengths
            lengths = step.kv_lens + [1] * (self._rows - len(step.kv_lens))
            self._graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])
        self._graph.replay()
        self._done.record()
