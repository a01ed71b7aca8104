"""Which programs of a launch may meet in memory without an order between them: Triton's interpreter, with its programs
in any order, watched as a race detector watches threads.

A program is a block of threads. What they stored before a barrier, whichever of them releases behind it has published;
what one of them has acquired, all may read behind the next barrier. Two programs that touch the same place, one of them
to write, need such a chain from the first to the second. That is what CUDA's memory model asks for, and less than a
device may give by luck. To be imported before Triton is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.gpu_sources import interpreter as mended  # isort: skip  # noqa: F401

from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

Clock = dict[Any, int]  # of each program how many of its barriers are known to be over


@dataclass
class _Program:
    barriers: int = 0
    sees: Clock = field(default_factory=dict)
    acquired: Clock = field(default_factory=dict)  # by one thread: the others see it behind the next barrier


class Watch:
    """``races``: what was found, as words. ``seed``: of the order of programs; None for the usual one."""

    def __init__(self, seed: int | None = None) -> None:
        self.races: list[str] = []
        self._seed = seed
        self._begin((1, 1, 1))

    def _begin(self, grid: tuple[int, ...]) -> None:
        """Another launch: all that was written before it is there."""
        self._programs: dict[Any, _Program] = {}
        self._written: dict[int, tuple[Any, int]] = {}
        self._read: dict[int, Clock] = {}
        self._released: dict[int, Clock] = {}
        every = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        order = list(every)
        if self._seed is not None:
            random.Random(self._seed).shuffle(order)
        self._order = dict(zip(every, order, strict=True))

    def place(self, usual: tuple[int, ...]) -> tuple[int, ...]:
        self.now = self._order[usual]
        self.program = self._programs.setdefault(self.now, _Program())
        return self.now

    def _knows(self, other: Any, barriers: int) -> bool:
        return bool(other == self.now or self.program.sees.get(other, 0) > barriers)

    def load(self, places: list[int]) -> None:
        for place in places:
            by, when = self._written.get(place, (self.now, 0))
            if not self._knows(by, when):
                self.races.append(f"{self.now} reads what {by} wrote")
            self._read.setdefault(place, {})[self.now] = self.program.barriers

    def store(self, places: list[int]) -> None:
        for place in places:
            by, when = self._written.get(place, (self.now, 0))
            if not self._knows(by, when):
                self.races.append(f"{self.now} writes over what {by} wrote")
            for reader, at in self._read.get(place, {}).items():
                if not self._knows(reader, at):
                    self.races.append(f"{self.now} writes what {reader} reads")
            self._written[place] = self.now, self.program.barriers

    def atomic(self, place: int, order: str) -> None:
        """Its own place is no race: only who writes it plainly has to be behind all who did this."""
        clock = self._released.setdefault(place, {})
        if "acq" in order:
            _join(self.program.acquired, clock)
        if "rel" in order:
            _join(clock, self.program.sees | {self.now: self.program.barriers})
        self._read.setdefault(place, {})[self.now] = self.program.barriers - 1

    def barrier(self) -> None:
        _join(self.program.sees, self.program.acquired)
        self.program.barriers += 1


def _join(clock: Clock, other: Clock) -> None:
    for program, barriers in other.items():
        clock[program] = max(clock.get(program, 0), barriers)


def _places(pointers: Any, mask: Any) -> list[int]:
    found: list[int] = pointers.data[mask.data.astype(bool)].reshape(-1).tolist()
    return found


@contextmanager
def watched(seed: int | None = None) -> Iterator[Watch]:
    """Every launch inside, with its programs in an order of their own."""
    watch, kept = Watch(seed), {}

    def instead(name: str, made: Any) -> None:
        right = kept[name] = getattr(InterpreterBuilder, name)
        setattr(InterpreterBuilder, name, lambda self, *args: made(right, self, *args))

    def grid(right: Any, self: Any, *size: int) -> None:
        watch._begin(size)
        right(self, *size)

    def load(right: Any, self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watch.load(_places(pointers, mask))
        return right(self, pointers, mask, *rest)

    def store(right: Any, self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.store(_places(pointers, mask))
        return right(self, pointers, value, mask, *rest)

    def atomic(
        right: Any, self: Any, op: Any, pointer: Any, value: Any, mask: Any, order: Any, scope: Any
    ) -> Any:
        assert str(scope).lower().endswith("gpu"), "an atomic that other programs may not see"
        for place in _places(pointer, mask):
            watch.atomic(place, _ORDERS[str(order).rpartition(".")[2]])
        return right(self, op, pointer, value, mask, order, scope)

    instead("set_grid_dim", grid)
    instead("set_grid_idx", lambda right, self, *at: right(self, *watch.place(at)))
    instead("create_masked_load", load)
    instead("create_masked_store", store)
    instead("create_atomic_rmw", atomic)
    instead("create_barrier", lambda right, self: watch.barrier())
    try:
        yield watch
    finally:
        for name, right in kept.items():
            setattr(InterpreterBuilder, name, right)


_ORDERS = {"ACQUIRE_RELEASE": "acq_rel", "ACQUIRE": "acq", "RELEASE": "rel", "RELAXED": ""}
assert interpreter  # what is changed here
