"""Wall time of a piece of work, and how much of the machine other processes used meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Stopwatch:
    """Every `with watch:` adds to ``seconds``."""

    def __init__(self) -> None:
        self.seconds, self._others = 0.0, 0.0

    def __enter__(self) -> Stopwatch:
        self._busy, self._own = busy_seconds(), time.process_time()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started
        self._others += busy_seconds() - self._busy - (time.process_time() - self._own)

    @property
    def foreign(self) -> float:
        """The share of all cores that other processes had meanwhile, from 0 to 1, in ticks of 10 ms."""
        return min(1.0, max(0.0, self._others) / max(self.seconds, 0.01) / (os.cpu_count() or 1))


def busy_seconds() -> float:
    """CPU seconds spent by all processes since the machine started, time taken by other machines on it included."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    ticks = [int(field) for field in fields]
    return (sum(ticks[:3]) + sum(ticks[5:8])) / _TICK  # without idle, iowait and what guests count twice
