"""Text that knows which of its characters the template wrote: equal to str, and nothing outside ever becomes own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.text.template.provenance import MASK, TemplateText, joined, masked, own_text, ownership, plain

# The template writes in capitals, the outside in small letters; both have blanks, lines and letters that grow.
OWN, OUTSIDE = "ABß <|>\n", "xyŉ <|>\n"


@st.composite
def mixed(draw: st.DrawFn) -> str:
    runs = draw(
        st.lists(
            st.tuples(
                st.booleans(), st.text(alphabet=OWN, max_size=4), st.text(alphabet=OUTSIDE, max_size=4)
            ),
            max_size=5,
        )
    )
    return joined(TemplateText(own) if is_own else outside for is_own, own, outside in runs)


def check(found: object, wanted: object) -> None:
    """The same value, and its own characters are none that only the outside has."""
    assert found == wanted and (type(wanted) is not str or len(ownership(found)) == len(wanted))  # type: ignore[arg-type]
    for text in found if isinstance(found, (list, tuple)) else [found]:
        if isinstance(text, str):
            assert len(ownership(text)) == len(text)
            assert not set("xyŉXYʼ") & set(masked(text))


NO_ARGUMENT = ["strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "upper", "lower", "title", "capitalize",
               "casefold", "swapcase", "__str__"]  # fmt: skip
ONE_TEXT = ["strip", "lstrip", "rstrip", "split", "rsplit", "partition", "rpartition", "removeprefix", "removesuffix",
            "__add__", "startswith", "find", "count"]  # fmt: skip


@given(mixed(), mixed(), mixed(), st.integers(-3, 9), st.integers(-3, 9))
def test_every_operation_gives_what_str_gives_and_keeps_apart(
    text: str, other: str, third: str, number: int, end: int
) -> None:
    bare, bare_other = plain(text), plain(other)
    for name in NO_ARGUMENT:
        check(getattr(TemplateText, name)(text), getattr(str, name)(bare))
    for name in ONE_TEXT:
        if other or name not in ("split", "rsplit", "partition", "rpartition"):
            check(getattr(TemplateText, name)(text, other), getattr(str, name)(bare, bare_other))
    for name in ("center", "ljust", "rjust"):
        check(getattr(TemplateText, name)(text, number), getattr(str, name)(bare, number))
    if other:
        check(TemplateText.split(text, other, number), str.split(bare, bare_other, number))
        check(TemplateText.rsplit(text, other, number), str.rsplit(bare, bare_other, number))
    check(TemplateText.split(text, None, number), str.split(bare, None, number))
    check(TemplateText.rsplit(text, None, number), str.rsplit(bare, None, number))
    check(TemplateText.splitlines(text, True), str.splitlines(bare, True))
    check(TemplateText.replace(text, other, third, number), bare.replace(bare_other, plain(third), number))
    check(TemplateText.join(text, [other, third]), bare.join([bare_other, plain(third)]))
    for step in (None, 2, -1):
        check(text[number:end:step], bare[number:end:step])
    check(text * max(number, 0), bare * max(number, 0))
    check(other + text, bare_other + bare)
    check(list(text), list(bare))
    assert hash(text) == hash(bare) and repr(text) == repr(bare)


def test_what_was_written_stays_the_templates_own() -> None:
    text = joined(["u<", TemplateText("<|END|> "), "x"])
    assert masked(text) == MASK * 2 + "<|END|> " + MASK
    assert own_text(text) == MASK + "<|END|> " + MASK and own_text(text[2:]) == "<|END|> " + MASK
    assert own_text("") == own_text(TemplateText("")) == "" and own_text("x") == MASK
    assert masked(text.lower()) == MASK * 2 + "<|end|> " + MASK
    assert masked(text.split("|")[1]) == "END"
    assert masked(text[2:].strip()) == "<|END|> " + MASK
    assert masked(TemplateText("-").join(["a", "b"])) == MASK + "-" + MASK
    assert masked(TemplateText.replace(TemplateText("aXb"), "X", TemplateText("<Y>"))) == "a<Y>b"
    # it replaced outside text
    assert masked(TemplateText.replace("aXb", "X", TemplateText("<Y>"))) == MASK * 5
    assert masked(TemplateText("ß").upper()) == "SS"
    assert [masked(line) for line in joined([TemplateText("A\n"), "x\n"]).splitlines()] == ["A", MASK]


def test_a_text_that_is_no_text_is_refused_as_str_does() -> None:
    with pytest.raises(TypeError):
        joined(["a", 1])
    with pytest.raises(TypeError):
        TemplateText("a") + 1  # type: ignore[operator]
