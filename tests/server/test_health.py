"""What /health and /ready say of engines that work, stand, fail and lie."""

from __future__ import annotations

import pytest

from qwenrt.server.health import Health, Signs


class Engine:
    def __init__(self) -> None:
        self.signs = Signs(True)
        self.asked = 0

    def __call__(self) -> Signs:
        self.asked += 1
        if isinstance(self.signs, Exception):
            raise self.signs
        return self.signs


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def watched() -> tuple[Engine, Clock, Health]:
    engine, clock = Engine(), Clock()
    health = Health(engine, 10.0, clock)
    health.loaded()
    return engine, clock, health


def test_nothing_is_ready_before_it_is_loaded() -> None:
    health = Health(Engine(), 10.0, Clock())
    assert health.live().status == 200 and health.ready().status == 503
    health.loaded()
    assert health.ready().ok and health.ready().status == 200


def test_an_engine_that_stands_idle_is_ready_for_ever() -> None:
    engine, clock, health = watched()
    engine.signs = Signs(True, steps=7)
    for _ in range(5):
        clock.now += 10_000
        assert health.ready().ok


def test_an_engine_that_makes_steps_is_ready() -> None:
    engine, clock, health = watched()
    for steps in range(20):
        engine.signs = Signs(True, has_work=True, steps=steps)
        clock.now += 9
        assert health.ready().ok


def test_a_step_that_does_not_end_is_told() -> None:
    engine, clock, health = watched()
    engine.signs = Signs(True, has_work=True, steps=3)
    assert health.ready().ok
    clock.now += 9.9
    assert health.ready().ok and health.look() == pytest.approx(9.9)
    clock.now += 0.2
    report = health.ready()
    assert report.status == 503 and "10 seconds" in report.reason
    assert health.live().ok  # the process answers
    engine.signs = Signs(True, has_work=True, steps=4)
    assert health.ready().ok


def test_work_that_comes_after_an_idle_hour_has_its_time() -> None:
    engine, clock, health = watched()
    engine.signs = Signs(True, has_work=True, steps=3)
    health.look()
    engine.signs = Signs(True, steps=3)
    clock.now += 3600
    health.look()
    engine.signs = Signs(True, has_work=True, steps=3)
    assert health.ready().ok


def test_an_engine_that_has_ended_is_neither() -> None:
    engine, _, health = watched()
    engine.signs = Signs(False, "It ended with RuntimeError.")
    for report in (health.live(), health.ready()):
        assert report.status == 503 and "RuntimeError" in report.reason


def test_an_engine_that_cannot_be_asked_has_ended() -> None:
    engine, _, health = watched()
    engine.signs = ValueError("no such thing")  # type: ignore[assignment]
    assert health.live().status == health.ready().status == 503 and "no such thing" in health.live().reason


def test_a_server_that_is_being_stopped_is_not_ready() -> None:
    _, _, health = watched()
    health.close()
    assert (
        health.ready().status == 503
        and "stopped" in health.ready().reason
        and health.live().ok
        and health.closing
    )


def test_an_answer_costs_one_or_two_looks() -> None:
    engine, _, health = watched()
    health.live()
    assert engine.asked == 1
    health.ready()
    assert engine.asked <= 3


def test_time_that_goes_back_does_no_harm() -> None:
    engine, clock, health = watched()
    engine.signs = Signs(True, has_work=True, steps=1)
    health.look()
    clock.now -= 1000
    assert health.ready().ok
