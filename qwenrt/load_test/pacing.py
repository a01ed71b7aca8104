"""When requests are sent: by clients that wait for their answers, or at times that no answer changes."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from qwenrt.errors import RequestError


@dataclass(frozen=True)
class ClosedLoop:
    """So many clients, each of which sends its next request when the answer to its last is complete."""

    clients: int

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise RequestError("--concurrency", f"got {self.clients}", "It must be at least 1.")


@dataclass(frozen=True)
class OpenLoop:
    """``rate``: requests a second on average, whatever the server does. ``burstiness``: 1 is a Poisson process, less
    comes in bursts, more is more even, infinity is a metronome."""

    rate: float
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value in (("--request-rate", self.rate), ("--burstiness", self.burstiness)):
            if not value > 0 or (math.isinf(value) and option == "--request-rate"):
                raise RequestError(option, f"got {value}", "It must be a number above 0.")

    def starts(self, count: int, requests_each: float = 1.0) -> list[float]:
        """Seconds from the beginning at which each of ``count`` conversations starts, of ``requests_each`` requests.

        Gaps have a gamma distribution. They are scaled so that the last start is when the rate says, as `vllm bench
        serve` does: otherwise two seeds would differ by their mean rate.
        """
        source, rate = random.Random(self.seed), self.rate / requests_each
        if math.isinf(self.burstiness):
            gaps = [1 / rate] * count
        else:
            gaps = [source.gammavariate(self.burstiness, 1 / (rate * self.burstiness)) for _ in range(count)]
        scale = count / rate / sum(gaps) if sum(gaps) > 0 else 1.0
        starts, now = [], 0.0
        for gap in gaps:
            now += gap * scale
            starts.append(now)
        return starts
