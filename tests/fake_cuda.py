"""A stand-in for torch.cuda on the CPU: streams that are only written down, and graphs that are what graphs are: the
operations of a body, over the memory they had, with the numbers the host gave them then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenrt.backends.cuda import CudaBackend, overrides

_REAL = torch.cuda


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def _storages(value: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(value) if isinstance(x, torch.Tensor)}


class FakeGraph:
    """What torch.cuda.CUDAGraph is to its users."""

    def __init__(self) -> None:
        self.recorder = _Recorder()
        self.replays = 0

    def replay(self) -> None:
        """The same operations, whose results lie where they lay when they were captured."""
        self.replays += 1
        for func, args, kwargs, out in self.recorder.calls:
            again, known = func(*args, **kwargs), _storages((args, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in known:
                    old.copy_(new)


class FakeCuda:
    """``log``: what was asked of streams, captures and memory, in order. ``fails``: where a capture goes wrong."""

    def __init__(
        self,
        fails: str = "",
        name: str = "NVIDIA H200",
        capability: tuple[int, int] = (9, 0),
        arch: str = "",
        warp_size: int = 64,
    ) -> None:
        self.log: list[str] = []
        self.graphs: list[FakeGraph] = []
        self.free, self.total, self.fails, self.streams = 10_000_000, 20_000_000, fails, 0
        self._current = self._stream("main")
        self._properties = SimpleNamespace(
            name=name,
            total_memory=self.total,
            major=capability[0],
            minor=capability[1],
            gcnArchName=arch,
            warp_size=warp_size,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(_REAL, name)  # what torch itself asks of it, on a machine without a device

    def _stream(self, name: str) -> SimpleNamespace:
        log = self.log
        return SimpleNamespace(
            name=name, wait_stream=lambda other: log.append(f"{name} waits for {other.name}")
        )

    def Stream(self) -> SimpleNamespace:
        self.streams += 1
        return self._stream(f"side{self.streams}")

    def current_stream(self, device: Any = None) -> SimpleNamespace:
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def CUDAGraph(self) -> FakeGraph:
        self.graphs.append(FakeGraph())
        return self.graphs[-1]

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 7)

    @contextlib.contextmanager
    def graph(
        self, graph: FakeGraph, pool: Any, stream: SimpleNamespace, capture_error_mode: str
    ) -> Iterator[None]:
        """As torch's: where the driver ends a capture with an error, the stream stays as it is."""
        if self.fails == "begin":
            raise RuntimeError("the device has no graphs")
        self.log.append(f"captures on {stream.name}, pool {pool}, {capture_error_mode}")
        before, self._current = self._current, stream
        try:
            with graph.recorder:
                yield
        finally:
            if self.fails:
                raise RuntimeError("operation failed due to a previous error during capture")
        self.free -= 1_000_000
        self._current = before

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        self.log.append("memory")
        return self.free, self.total

    def empty_cache(self) -> None:
        self.log.append("empties")

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True  # what torch says of an emulated one, too

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return self._properties


class OnCPU(CudaBackend):
    """The backend of GPUs, on a CPU that plays one."""

    depth = 1  # type: ignore[assignment]


def install(patch: pytest.MonkeyPatch, fake: FakeCuda) -> FakeCuda:
    """``fake`` in the place of torch.cuda; pinning does nothing."""
    patch.setattr(torch, "cuda", fake)
    patch.setattr(overrides, "missing_triton", lambda: "a stand-in for torch.cuda compiles nothing")
    patch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    return fake
