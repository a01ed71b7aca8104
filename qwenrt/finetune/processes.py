"""Several processes on one run: each computes its share of a step, gradients are summed, and all have the same weights.

They are started here, or by torchrun; on NVIDIA and AMD GPUs they speak through nccl, on NPUs through hccl, else gloo.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessException, start_processes

from qwenrt.errors import QwenrtError

_BACKENDS = {"cuda": "nccl", "npu": "hccl"}
_WAIT = timedelta(minutes=10)  # for a process that is late; one that has ended is noticed at once


class Group:
    """The processes of a run: this one's ``rank`` among ``size``."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each becomes the sum of what the processes have in its place, the same bits in all."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in any of the processes."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def group_of(device: torch.device) -> Iterator[Group]:
    """The processes that this one was started with, by `in_processes` or torchrun; else it alone."""
    if dist.is_available() and dist.is_initialized():
        yield Group(dist.get_rank(), dist.get_world_size())
        return
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Group()
        return
    dist.init_process_group(_BACKENDS.get(device.type, "gloo"), timeout=_WAIT)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def speaks() -> bool:
    """Whether this process is the one of torchrun's on a machine that speaks to the user."""
    return not (dist.is_available() and dist.is_torchelastic_launched()) or dist.get_node_local_rank(0) == 0


def device_of(device: torch.device, rank: int) -> torch.device:
    """A device for each process of a machine."""
    if device.type == "cpu" or device.index is not None:
        return device
    count = torch.get_device_module(device).device_count()
    return torch.device(device.type, rank % max(1, count))


def in_processes(
    count: int, device: torch.device, work: Callable[..., Any], arguments: Mapping[str, Any]
) -> Any:
    """``work`` with ``arguments`` in ``count`` processes -> what the first one gave. Where one fails or dies all end,
    and its error is raised here; KeyboardInterrupt where they were asked to end."""
    results: Any = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as place:
        backend = _BACKENDS.get(device.type, "gloo")
        how = (count, f"file://{place}/store", backend, results, work, dict(arguments))
        started = start_processes(_child, how, count, join=False, start_method="spawn")  # type: ignore[no-untyped-call]
        with _passed_on([process.pid for process in started.processes]):
            try:
                while not started.join():
                    pass
            except ProcessException as error:
                raise _error(results, error) from None
        return results.get()[1]


def _child(rank: int, count: int, store: str, backend: str, results: Any, work: Any, arguments: Any) -> None:
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=count, timeout=_WAIT)
    try:
        report = work(**arguments)
        if rank == 0:
            results.put(("report", report))
    except QwenrtError as error:
        results.put(("error", (error.asked, error.found, error.remedy)))
        os._exit(1)  # no waiting for others, which may never come
    except KeyboardInterrupt as stopped:
        if rank == 0:
            results.put(("interrupt", str(stopped)))
        dist.barrier()
        os._exit(130)
    dist.destroy_process_group()


def _error(results: Any, error: ProcessException) -> BaseException:
    if not results.empty():
        kind, value = results.get()
        if kind == "interrupt":
            return KeyboardInterrupt(value)
        return QwenrtError(*value)
    return QwenrtError(
        "training in several processes",
        f"process {error.error_index} ended: {str(error).strip().splitlines()[-1][:200]}",
        "See what it said above; the same call goes on from the last state that was kept.",
    )


@contextmanager
def _passed_on(pids: Sequence[int]) -> Iterator[None]:
    """Within the block Ctrl-C is the processes' own matter, which get it too, and SIGTERM is passed on to them."""

    def term(signum: int, frame: FrameType | None) -> None:
        for pid in pids:
            os.kill(pid, signum)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, term)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
