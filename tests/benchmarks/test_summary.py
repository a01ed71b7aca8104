"""Medians, ratios and fractions of the benchmarks, against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.summary import bytes_read, points, summarise, tokens_of, undisturbed, verdict


def a_round(ours: float, peer: float, read: float = 10e9, foreign: float = 0.0) -> dict[str, float]:
    return {
        "ours_s": ours,
        "peer_s": peer,
        "ours_foreign": foreign,
        "peer_foreign": 0.0,
        "read_bytes_per_s": read,
    }


def a_result(rounds: list[dict[str, float]], **work: Any) -> dict[str, Any]:
    work = {"kind": "decode", "tokens": 17, "new_tokens": 10, "batch": 1} | work
    about = {"weight_bytes_per_token": 1_000_000_000, "kv_bytes_per_token": 1000}
    return {"work": work, "rounds": rounds, "ours": {"about": about}, "peer": {"about": {}}}


def test_a_ratio_is_taken_within_its_round_and_the_median_over_rounds() -> None:
    summary = summarise(a_result([a_round(1.0, 2.0), a_round(4.0, 4.0), a_round(2.0, 3.0)]))
    assert summary.ratios == (2.0, 1.0, 1.5)
    assert summary.ratio == 1.5
    assert summary.ours == 10 / 2.0  # tokens by the median of qwenrt's seconds
    assert summary.peer == 10 / 3.0


def test_the_fraction_counts_weights_and_cache_of_every_step() -> None:
    summary = summarise(a_result([a_round(2.0, 2.0)], tokens=100, batch=4))
    per_step = 1_000_000_000 + 4 * (100 + 5) * 1000
    assert summary.fraction == pytest.approx(10 * per_step / 2.0 / 10e9)


def test_a_prefill_has_no_fraction() -> None:
    result = a_result([a_round(2.0, 2.0)], kind="prefill", tokens=512)
    assert summarise(result).fraction is None
    assert summarise(result).ours == 256.0


def test_bytes_are_unknown_for_an_engine_that_does_not_say_them() -> None:
    assert bytes_read(a_result([])["work"], {}) is None


def test_disturbed_rounds_do_not_count_whatever_they_showed() -> None:
    rounds = [a_round(1.0, 2.0), a_round(1.0, 9.0, foreign=0.5), a_round(1.0, 2.0)]
    summary = summarise(a_result(rounds))
    assert summary.ratios == (2.0, 2.0)
    assert (summary.disturbed, summary.all_disturbed) == (1, False)


def test_where_all_rounds_are_disturbed_they_are_shown_and_named() -> None:
    summary = summarise(a_result([a_round(1.0, 9.0, foreign=0.5)]))
    assert summary.ratios == (9.0,)
    assert summary.all_disturbed
    assert summary.foreign == 0.5


@given(st.lists(st.floats(0, 1), min_size=1))
def test_a_round_counts_up_to_a_tenth_of_the_cores(shares: list[float]) -> None:
    rounds = [a_round(1.0, 1.0, foreign=share) for share in shares]
    assert len(undisturbed(rounds)) == sum(share <= 0.1 for share in shares)


def test_tokens_of_every_kind_of_work() -> None:
    assert tokens_of({"kind": "prefill", "tokens": 512, "new_tokens": 0, "batch": 1}) == 512
    assert tokens_of({"kind": "decode", "tokens": 512, "new_tokens": 3, "batch": 8}) == 24
    assert tokens_of({"kind": "start", "tokens": 8, "new_tokens": 1, "batch": 1}) == 1


@pytest.mark.parametrize(
    ("value", "wanted", "stands"),
    [
        (1.3, (1.4, 1.7), "below"),
        (1.4, (1.4, 1.7), "floor"),
        (1.7, (1.4, 1.7), "goal"),
        (3.0, (2.5, 1.5), "below"),  # seconds: less is better
        (2.0, (2.5, 1.5), "floor"),
        (1.5, (2.5, 1.5), "goal"),
    ],
)
def test_a_value_stands_below_at_the_floor_or_at_the_goal(
    value: float, wanted: tuple[float, float], stands: str
) -> None:
    assert verdict(value, *wanted) == stands


def test_points_are_milliseconds_over_context_and_rates_over_batch() -> None:
    work = {"kind": "decode", "tokens": 17, "new_tokens": 10, "batch": 1}
    seconds = {"qwenrt": {"17": [1.0, 2.0, 3.0], "1025": [4.0]}}
    context = {"plot": "context", "varied": "tokens", "work": work, "seconds": seconds}
    assert points(context) == {"qwenrt": [(17, 200.0), (1025, 400.0)]}
    batch = {"plot": "batch", "varied": "batch", "work": work, "seconds": {"qwenrt": {"8": [2.0]}}}
    assert points(batch) == {"qwenrt": [(8, 40.0)]}
