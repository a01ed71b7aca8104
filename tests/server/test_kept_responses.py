"""Responses kept for later requests: how many, how long, and for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.server.kept_responses import LIFETIME_S, MOST, MOST_BYTES, KeptResponse, KeptResponses
from qwenrt.text.dialects.problem import Problem


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def response(size: int = 8) -> KeptResponse:
    return KeptResponse(b"{}", b"x" * (size - 2))


def is_kept(kept: KeptResponses, owner: str, response_id: str) -> bool:
    try:
        kept.get(owner, response_id)
    except Problem:
        return False
    return True


def test_the_defaults_are_those_that_are_documented() -> None:
    assert (MOST, MOST_BYTES, LIFETIME_S) == (256, 64 * 1024 * 1024, 1800)


def test_a_response_is_found_by_its_owner_until_it_is_dropped() -> None:
    kept = KeptResponses()
    given_one = response()
    kept.keep("me", "resp_1", given_one)
    assert kept.get("me", "resp_1") is given_one
    kept.drop("me", "resp_1")
    assert not is_kept(kept, "me", "resp_1")
    assert kept.bytes == 0


def test_anothers_response_and_one_that_never_was_are_not_found_in_the_same_words() -> None:
    kept = KeptResponses()
    kept.keep("me", "resp_1", response())
    said = []
    for owner, asked in (("you", "resp_1"), ("you", "resp_2")):
        for act in (kept.get, kept.drop):
            with pytest.raises(Problem) as raised:
                act(owner, asked)
            problem = raised.value
            said.append((problem.kind, problem.status, problem.param, problem.message.replace(asked, "ID")))
    assert len(set(said)) == 1
    assert said[0][:3] == ("not_found", 404, "previous_response_id")
    assert is_kept(kept, "me", "resp_1")


def test_the_one_goes_that_was_longest_not_asked_for() -> None:
    kept = KeptResponses(most=2)
    kept.keep("me", "a", response())
    kept.keep("me", "b", response())
    kept.get("me", "a")
    kept.keep("me", "c", response())
    assert [name for name in "abc" if is_kept(kept, "me", name)] == ["a", "c"]


def test_bytes_are_bounded() -> None:
    kept = KeptResponses(most_bytes=100)
    kept.keep("me", "a", response(60))
    kept.keep("me", "b", response(60))
    kept.keep("me", "too large", response(101))
    assert [name for name in ("a", "b", "too large") if is_kept(kept, "me", name)] == ["b"]
    assert kept.bytes == 60


def test_time_counts_from_the_last_use() -> None:
    clock = Clock()
    kept = KeptResponses(lifetime_s=30, clock=clock)
    kept.keep("me", "used", response())
    kept.keep("me", "idle", response())
    clock.now = 20
    kept.get("me", "used")
    clock.now = 30
    assert is_kept(kept, "me", "used")
    assert not is_kept(kept, "me", "idle")
    clock.now = 60
    assert not is_kept(kept, "me", "used")
    assert len(kept) == 0 and kept.bytes == 0


@given(
    st.lists(st.tuples(st.sampled_from("kgdt"), st.sampled_from("ab"), st.integers(0, 5), st.integers(2, 50)))
)
def test_whatever_is_done_the_bounds_hold_and_the_bytes_are_right(
    steps: list[tuple[str, str, int, int]],
) -> None:
    clock = Clock()
    kept = KeptResponses(most=3, most_bytes=90, lifetime_s=10, clock=clock)
    for what, owner, number, size in steps:
        if what == "k":
            kept.keep(owner, str(number), response(size))
        elif what == "t":
            clock.now += number
        elif is_kept(kept, owner, str(number)) and what == "d":
            kept.drop(owner, str(number))
        found = sum(response.size for response, _ in kept._kept.values())
        assert kept.bytes == found <= 90
        assert len(kept) <= 3
