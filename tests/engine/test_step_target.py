"""Chunks beside decoding sequences: sized by what steps took, by a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from qwenrt.engine.step_target import LEAST, StepTarget


class Machine:
    """Steps that take what this says; ``noise``: seconds that something else takes now and then."""

    def __init__(self, target_s: float | None, base: float, price: float, noise: float = 0.0) -> None:
        self.now, self.base, self.price, self.noise = 0.0, base, price, noise
        self.target = StepTarget(target_s, lambda: self.now)
        self.rng = random.Random(0)

    def step(self, rows: int, wants: int = 512) -> tuple[int, float]:
        tokens = self.target.chunk(rows, wants) if wants else 0
        began = self.now
        seconds = (self.base if rows else 0.0) + self.price * tokens
        self.now += seconds + (self.noise if self.rng.random() < 0.1 else 0.0)
        self.target.done(began, rows, tokens)
        return tokens, seconds


def test_a_step_comes_to_its_target_from_below() -> None:
    machine = Machine(0.25, base=0.05, price=0.001)
    for _ in range(6):
        machine.step(4, wants=0)
    seen = [machine.step(4) for _ in range(8)]
    assert seen[0][0] == LEAST
    assert max(seconds for _, seconds in seen) <= 0.251
    assert seen[-1] == (pytest.approx(200, abs=2), pytest.approx(0.25, abs=0.01))


def test_it_finds_the_target_without_a_step_that_only_decodes() -> None:
    machine = Machine(0.25, base=0.1, price=0.001)
    seen = [machine.step(4) for _ in range(60)]
    assert max(seconds for _, seconds in seen) <= 0.251
    assert seen[-1][1] > 0.24


@pytest.mark.parametrize("slower", [0.3, 4.0])
def test_it_follows_a_machine_that_changes(slower: float) -> None:
    machine = Machine(0.25, base=0.05, price=0.001)
    for _ in range(20):
        machine.step(4, wants=0)
        machine.step(4)
    machine.price *= slower
    seen = [machine.step(4, 2000) for _ in range(12)]
    assert seen[-1][1] == pytest.approx(0.25, abs=0.02)


def test_two_steps_in_five_that_something_held_up_do_not_matter() -> None:
    machine = Machine(0.25, base=0.05, price=0.001, noise=3.0)
    seen = []
    for _ in range(200):
        machine.step(4, wants=0)
        seen.append(machine.step(4)[0])
    middle = sorted(seen[20:])
    assert middle[len(middle) // 10] > 150 and middle[-1] < 220


def test_a_prompt_always_advances() -> None:
    machine = Machine(0.25, base=0.1, price=1.0)
    for _ in range(10):
        machine.step(16, wants=0)
    assert {machine.step(16)[0] for _ in range(10)} == {LEAST}
    assert machine.target.chunk(16, 5) == 5, "never more than there is room for"


def test_where_decoding_is_slow_a_step_takes_twice_as_long() -> None:
    machine = Machine(0.25, base=0.4, price=0.002)
    for _ in range(10):
        machine.step(16, wants=0)
    seen = [machine.step(16) for _ in range(20)]
    assert seen[-1][1] == pytest.approx(0.8, abs=0.02)


def test_nobody_decodes_or_no_target() -> None:
    machine = Machine(0.25, base=0.1, price=1.0)
    for _ in range(5):
        machine.step(2)
    assert machine.step(0)[0] == 512
    assert Machine(None, base=0.1, price=1.0).step(2)[0] == 512


def test_two_steps_under_way_are_not_counted_twice() -> None:
    now = 0.0
    target = StepTarget(1.0, lambda: now)
    for step in range(1, 9):
        now = float(step) / 10
        target.done(now - 0.2, 1, 50)  # each began before the one before it ended
    assert target.chunk(1, 10**6) <= 2 * LEAST
    sizes = [target.chunk(1, 10**6) for _ in range(10)]
    assert sizes[-1] == pytest.approx(500, abs=1)
