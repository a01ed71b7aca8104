"""How many tokens of prompts a step may compute beside decoding sequences, so that these do not wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

# Tokens: a prompt always advances, by pieces that kernels compute in the same order as longer ones.
LEAST = 32
_SEEN = 5  # steps whose median counts: two that were held up by something else do not matter
_GROWTH = 2.0  # of a chunk, at most, from one step to the next
_KEPT = 64  # numbers of rows whose time is remembered
_BESIDE = 2.0  # a step may take as many times what its decoding takes, where that is longer than the target


class StepTarget:
    """Sizes the chunks of prompts by what steps took: a step that decodes shall take ``target_s`` seconds, or twice
    what it takes to decode alone where that is longer; with LEAST tokens of prompts it takes what it takes.

    A step that computes n tokens of prompts beside some rows takes t seconds. ``base`` is what those rows took without
    any, so (t - base) / n is the price of a token. If ``base`` is out of date the price is wrong, and yet the chunk
    made of it, (target - base) / price, comes nearer to the one that fits with each step. ``target_s`` None: chunks are
    never cut. ``clock``: seconds, rising.
    """

    def __init__(self, target_s: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.target_s, self.clock = target_s, clock
        self._bases: dict[int, deque[float]] = {}  # seconds of steps that only decode, by their rows
        self._mixed: deque[tuple[int, int, float]] = deque(maxlen=_SEEN)  # rows, tokens of prompts, seconds
        self._chunk = 0.0
        self._last_end = 0.0

    def chunk(self, rows: int, most: int) -> int:
        """How many tokens of prompts, LEAST to ``most``, the next step may compute beside ``rows`` decoding tokens."""
        if self.target_s is None or rows == 0:
            return most
        wanted = float(LEAST)
        if self._mixed:
            base = self._base(rows)
            room = max(self.target_s, _BESIDE * base) - base
            prices = [(seconds - self._base(r)) / tokens for r, tokens, seconds in self._mixed]
            wanted = room / max(median(prices), 1e-9)
        self._chunk = min(max(wanted, LEAST), _GROWTH * max(self._chunk, LEAST), max(most, LEAST))
        return min(int(self._chunk), most)

    def done(self, began: float, rows: int, tokens: int) -> None:
        """A step is over that began at ``began`` by the clock: ``tokens`` of prompts beside ``rows`` that decoded."""
        now = self.clock()
        # Two steps may be under way: the device takes one at a time.
        seconds = now - max(began, self._last_end)
        self._last_end = now
        if self.target_s is None or rows == 0:
            return
        if tokens:
            self._mixed.append((rows, tokens, seconds))
            return
        if rows not in self._bases and len(self._bases) == _KEPT:
            del self._bases[next(iter(self._bases))]
        self._bases.setdefault(rows, deque(maxlen=_SEEN)).append(seconds)

    def _base(self, rows: int) -> float:
        """Seconds that decoding this many rows took, or the nearest number of rows that was seen."""
        if not self._bases:
            return 0.0
        return median(self._bases[min(self._bases, key=lambda seen: abs(seen - rows))])
