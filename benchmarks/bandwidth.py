"""How fast this machine reads memory."""

from __future__ import annotations

import statistics
import time

import torch

from qwenrt.backends.cpu.kernels import Kernels

_READS = 5


class Bandwidth:
    """Reads far more memory than any cache holds with qwenrt's own reading loop."""

    def __init__(self, threads: int, nbytes: int) -> None:
        self._kernels = Kernels(threads=threads)
        self.threads = self._kernels.threads
        self._buffer = torch.ones(nbytes // 8, dtype=torch.int64)

    def bytes_per_s(self) -> float:
        """The median of five readings with all threads."""
        times = []
        for _ in range(_READS):
            started = time.perf_counter()
            self._kernels.read(self._buffer)
            times.append(time.perf_counter() - started)
        return self._buffer.nbytes / statistics.median(times)
