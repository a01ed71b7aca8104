"""Long texts a piece at a time. One call that walks over 8 MB keeps every other thread of the process from running."""

from __future__ import annotations

import re
from collections.abc import Iterator

AT_ONCE = 16384  # characters: a millisecond or two of the slowest call
_LOOKED_AT = 1024  # characters, until a slice is made longer
# Places where both of Qwen's split patterns end a piece, whatever stands before and behind, and end it there too where
# the text ends: before a blank that follows ink; behind a digit, which is a piece by itself; between a letter and a
# sign; behind a line's end that ink follows. The sets are subsets of the pattern's \s, \p{L} and the rest, so that it
# does not matter whose edition of Unicode it has.
SPLIT_PLACE = re.compile(
    r"(?<=\S)[ \t]|(?<=[0-9])|(?<=\n)(?=\S)"
    r"|(?<=[A-Za-z\u3400-\u4dbf\u4e00-\u9fa5])"
    r"(?=[!-/:-@\[-`{-~\u2026\u201c\u201d\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
)
# Characters that composition (NFC) leaves as they are and that combine with nothing before them: no marks among them.
# Of the scripts that are written much; a text of others is cut at its spaces.
STARTERS = (
    r"\0-\u02ff\u0400-\u0482\u048a-\u052f\u05d0-\u05ea\u0621-\u063f\u0641-\u064a\u3001-\u3029\u3041-\u3096"
    r"\u309b-\u30fa\u3400-\u9fff\uac00-\ud7a3\U0001f000-\U0001faff"
)
COMPOSED_PLACE = re.compile(f"(?=[{STARTERS}])")


def slices(text: str, place: re.Pattern[str], at_least: int = AT_ONCE) -> Iterator[str]:
    """The text in pieces of ``at_least`` so many characters, cut at a ``place``: where a match of it begins. They are
    longer where none comes soon; joined they are the text."""
    start, at = 0, at_least
    while len(text) - at > at_least:
        if found := place.search(text, at, at + _LOOKED_AT):
            yield text[start : found.start()]
            start = at = found.start()
        at += at_least
    yield text[start:] if start else text


def first(pattern: re.Pattern[str], text: str, start: int = 0) -> int | None:
    """Where the first match of a ``pattern`` of one character begins."""
    for at in range(start, len(text), AT_ONCE):
        if found := pattern.search(text, at, at + AT_ONCE):
            return found.start()
    return None
