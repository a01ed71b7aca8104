"""Long texts are encoded in slices, and nothing of their ids tells so."""

from __future__ import annotations

import re
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.text.tokenizer import slices as slices_module
from qwenrt.text.tokenizer import tokenizer as tokenizer_module
from qwenrt.text.tokenizer.slices import AT_ONCE, COMPOSED_PLACE, SPLIT_PLACE, STARTERS, first, slices
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from qwenrt.text.tokenizer.tokenizer_json import KNOWN_PATTERNS
from qwenrt.text.tokenizer.unicode import nfc

# Texts in which all meet that the patterns, composition and the cuts tell apart.
_SIGNS = (
    " \t\n\r\x1c\x85\u3000\u20281a9\u0660A\u017f\u212a\u00e9e\u0301\u0323\u0338\u4f60\u3002,\uff0c!?'\"<>|"
    "\u1100\u1161\uac00\U0001f600"
)
_MORE = [
    "'s",
    "'re",
    "'R",
    "  ",
    "\r\n",
    " \n ",
    "don't",
    "a1",
    "\n\n",
    "<|im_start|>",
    "\u4f60\uff0c",
    "word, word",
]
NEIGHBOURS = st.lists(
    st.one_of(st.text(_SIGNS, min_size=1, max_size=6), st.sampled_from(_MORE)), min_size=1, max_size=40
).map("".join)


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
@settings(deadline=None, max_examples=500)
@given(text=NEIGHBOURS)
def test_both_patterns_end_a_piece_where_a_text_is_cut(pattern: str, text: str) -> None:
    """Cut at every place that there is."""
    parts = [*slices(text, SPLIT_PLACE, 1)]
    assert "".join(parts) == text
    assert [piece for part in parts for piece in regex.findall(pattern, part)] == regex.findall(pattern, text)


@settings(deadline=None, max_examples=500)
@given(NEIGHBOURS)
def test_composition_crosses_no_place(text: str) -> None:
    parts = [*slices(text, COMPOSED_PLACE, 1)]
    assert "".join(parts) == text
    assert "".join(unicodedata.normalize("NFC", part) for part in parts) == unicodedata.normalize("NFC", text)


def test_starters_are_what_they_are_called() -> None:
    """Of combining class 0, left as they are, and never the second of two that become one."""
    starters = [c for c in map(chr, range(0x30000)) if re.fullmatch(f"[{STARTERS}]", c)]
    written = (unicodedata.decomposition(c).split() for c in map(chr, range(0x30000)))
    seconds = {chr(int(two[1], 16)) for two in written if len(two) == 2 and "<" not in two[0]}
    assert len(starters) > 40_000 and not seconds & set(starters)
    assert not any(map(unicodedata.combining, starters))
    assert all(unicodedata.normalize("NFC", c) == c for c in starters)


@pytest.mark.parametrize(
    "unit",
    [
        "The answer, they say, is 42.\n",
        "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
        "e\u0301 \U0001f600",
        "a",
        "<",
        " ",
    ],
)
def test_a_long_text_has_the_ids_of_the_whole(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (6 * AT_ONCE // len(unit))
    ids = tokenizer.encode(text)
    assert ids == tokenizer._encoding.encode_ordinary(unicodedata.normalize("NFC", text))
    assert nfc(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("length", [4095, 4096, 4097, 4096 + 511])
def test_long_blanks_are_seen_wherever_they_begin(length: int) -> None:
    for start in (0, 1, 511, 512, 513, 5000):
        assert tokenizer_module._may_have_long_blanks("a" * start + " " * length + "b") or length < 4096


def test_slices_are_short_where_a_text_has_places() -> None:
    parts = [*slices("word, " * AT_ONCE, SPLIT_PLACE)]
    assert len(parts) > 4 and max(map(len, parts)) < 2 * AT_ONCE + 10
    assert [*slices("", SPLIT_PLACE)] == [""] and [*slices("a" * 100, SPLIT_PLACE, 1)] == ["a" * 100]


def test_the_first_match_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices_module, "AT_ONCE", 3)
    for at in range(10):
        assert first(re.compile("[<]"), "." * at + "<.<") == at
    assert first(re.compile("[<]"), "<....", 1) is None


def test_ids_are_objects_that_all_texts_share(tokenizer: Tokenizer) -> None:
    """A prompt of a million tokens is copied and freed without a walk through a million integers."""
    one, other = tokenizer.encode("traveller from Rome " * 3), tokenizer.encode(" traveller from Rome")
    assert {id(i) for i in one} & {id(i) for i in other}
    assert len({id(i) for i in one}) == len(set(one))
