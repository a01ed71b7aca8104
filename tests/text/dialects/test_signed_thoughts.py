"""Thoughts that leave and come back: only unchanged ones count."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.text.dialects.signed_thoughts import SignedThoughts

OURS, OTHERS = SignedThoughts(b"key"), SignedThoughts(b"another")


@given(st.text())
def test_a_thought_comes_back(thought: str) -> None:
    assert OURS.is_ours(thought, OURS.signature(thought))
    assert OURS.unpacked(OURS.packed(thought)) == thought
    assert SignedThoughts(b"key").packed(thought) == OURS.packed(thought)


@given(st.text(), st.text())
def test_a_signature_is_of_one_thought_and_one_key(thought: str, other: str) -> None:
    assert not OTHERS.is_ours(thought, OURS.signature(thought))
    assert OTHERS.unpacked(OURS.packed(thought)) is None
    assert OURS.is_ours(other, OURS.signature(thought)) == (other == thought)


@given(st.text(min_size=1), st.data())
def test_one_bit_changed_and_the_thought_is_dropped(thought: str, data: st.DataObject) -> None:
    packed = OURS.packed(thought)
    mark, _, content = packed.partition(".")
    raw = bytearray(base64.b64decode(content))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert OURS.unpacked(f"{mark}.{base64.b64encode(raw).decode()}") is None


@given(st.text())
def test_what_anybody_else_sends_is_no_thought(text: str) -> None:
    assert OURS.unpacked(text) is None
    assert OURS.unpacked("qwenrt1." + text) is None
    assert not OURS.is_ours("t", text)


def test_an_empty_key_signs_nothing() -> None:
    with pytest.raises(ValueError, match="key"):
        SignedThoughts(b"")
