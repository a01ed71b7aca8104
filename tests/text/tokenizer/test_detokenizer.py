"""Streams of tokens against decoding the whole, for any ids and any stop strings."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import RequestError
from qwenrt.text.tokenizer.detokenizer import Detokenizer, StopMatcher
from qwenrt.text.tokenizer.tokenizer import Tokenizer

SMALL_IDS = st.lists(st.integers(0, 478), max_size=40)
# Few letters, so that stop strings overlap each other and themselves.
LETTERS = st.text(alphabet="ab好", max_size=30)
STOPS = st.lists(st.text(alphabet="ab好", min_size=1, max_size=5), max_size=5)


def cut(text: str, stop: Sequence[str]) -> str:
    """What a reader of the whole text would do."""
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def stream(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


@settings(deadline=None, max_examples=200)
@given(SMALL_IDS, st.lists(st.text(min_size=1, max_size=4), max_size=4), st.booleans(), st.data())
def test_stream_joined_is_the_whole_cut(
    small: Tokenizer, ids: list[int], stop: list[str], skip: bool, data: st.DataObject
) -> None:
    whole = small.decode(ids, skip_special_tokens=skip)
    for _ in range(data.draw(st.integers(0, 2), label="stops taken from the text")):
        if whole:
            start = data.draw(st.integers(0, len(whole) - 1))
            stop.append(whole[start : start + data.draw(st.integers(1, 6))])
    detokenizer = Detokenizer(small, stop, skip_special_tokens=skip)
    pieces = stream(detokenizer, ids)
    assert "".join(pieces) == cut(whole, stop) == detokenizer.text
    assert detokenizer.stopped == any(s in whole for s in stop)
    assert (detokenizer.stop_string in stop) == detokenizer.stopped


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 151850), max_size=30), st.text(max_size=10))
def test_stream_of_the_released_vocabulary(tokenizer: Tokenizer, ids: list[int], text: str) -> None:
    ids += tokenizer.encode(text)
    for skip in (True, False):
        assert "".join(stream(Detokenizer(tokenizer, (), skip), ids)) == tokenizer.decode(ids, skip)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=30))
def test_never_half_a_character(small: Tokenizer, text: str) -> None:
    """Nearly every byte is its own token here: no piece may hold a replacement for a cut character."""
    ids = small.encode(text)
    detokenizer = Detokenizer(small)
    pieces = [detokenizer.add(i) for i in ids]
    assert sum(p.count("\ufffd") for p in pieces) == text.count("\ufffd")
    assert detokenizer.finish() == ""


@settings(deadline=None, max_examples=200)
@given(LETTERS, STOPS, st.lists(st.integers(1, 6), max_size=30))
def test_matcher_does_not_depend_on_the_pieces(text: str, stop: list[str], sizes: list[int]) -> None:
    matcher = StopMatcher(stop)
    out, position = [], 0
    for size in [*sizes, len(text)]:
        out.append(matcher.push(text[position : position + size]))
        position += size
        shown = "".join(out)
        assert cut(text, stop).startswith(shown)
        seen = text[:position]
        if not matcher.stopped and not any(s in seen for s in stop):
            # Held back is only what a stop string may begin with.
            held = seen[len(shown) :]
            assert not held or any(s.startswith(held) for s in stop)
    out.append(matcher.finish())
    assert "".join(out) == cut(text, stop)
    assert matcher.stopped == any(s in text for s in stop)
    if matcher.stop_string is not None:
        assert text[len("".join(out)) :].startswith(matcher.stop_string)


def test_earliest_position_wins_over_first_completed() -> None:
    matcher = StopMatcher(["b", "abc"])
    assert [matcher.push(c) for c in "xab"] == ["x", "", ""]
    assert not matcher.stopped  # "abc" may still come, and would begin earlier
    assert (matcher.push("c"), matcher.stopped, matcher.stop_string) == ("", True, "abc")
    matcher = StopMatcher(["b", "abc"])
    assert [matcher.push(c) for c in "xabd"] == ["x", "", "", "a"]
    assert (matcher.stopped, matcher.stop_string) == (True, "b")
    matcher = StopMatcher(["b", "abc"])
    assert (matcher.push("xab"), matcher.finish(), matcher.stop_string) == ("x", "a", "b")


def test_nothing_comes_after_a_stop(small: Tokenizer) -> None:
    detokenizer = Detokenizer(small, ["lo"])
    assert [detokenizer.add(i) for i in small.encode("hello world")] == ["hel", ""]
    assert detokenizer.stopped and detokenizer.stop_string == "lo"
    assert detokenizer.add(0) == detokenizer.finish() == ""
    assert detokenizer.text == "hel"


def test_a_stop_string_inside_and_across_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Thought: x\nObservation:\nmade up")
    assert 510 in ids  # ":\n" is one token
    assert "".join(stream(Detokenizer(tokenizer, ["Observation:"]), ids)) == "Thought: x\n"


def test_the_first_tokens_are_not_searched(small: Tokenizer) -> None:
    ids = small.encode("a") * 5
    assert "".join(stream(Detokenizer(small, ["a"]), ids)) == ""
    assert "".join(stream(Detokenizer(small, ["a"], min_tokens=3), ids)) == "aaa"


def test_end_in_the_middle_of_a_character(small: Tokenizer) -> None:
    detokenizer = Detokenizer(small)
    assert detokenizer.add(small.encode("猫")[0]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_refused(small: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"stop strings: got 'ab'\. Pass a list of non-empty strings"):
        StopMatcher("ab")
    with pytest.raises(RequestError, match="non-empty strings"):
        Detokenizer(small, [""])
    with pytest.raises(RequestError, match="token id 479"):
        Detokenizer(small).add(479)


def test_automata_that_nobody_uses_are_soon_forgotten() -> None:
    """The largest takes 17 MiB, and its strings come from users."""
    alive = [weakref.ref(StopMatcher([f"stop {i}"])._automaton) for i in range(100)]
    gc.collect()
    assert sum(automaton() is not None for automaton in alive) <= 8


def test_hostile_stop_strings_end() -> None:
    stop = ["a" * n + "b" for n in range(1023, 1023 - 64, -1)]
    matcher = StopMatcher(stop)
    text = "a" * 200_000
    out = "".join([matcher.push(text[i : i + 4]) for i in range(0, len(text), 4)] + [matcher.finish()])
    assert out == text
