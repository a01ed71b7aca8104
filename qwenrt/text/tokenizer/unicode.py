"""Unicode that hostile text cannot slow down or break: NFC in linear time, lone surrogates replaced."""

from __future__ import annotations

import re
import unicodedata

_LONG_TEXT = 512  # shorter texts cannot hold a run of marks long enough to matter
_LONG_RUN = re.compile(rb"[^\0]{64,}")
# The only starters (combining class 0) whose decomposition consists of combining marks.
_DECOMPOSED = {0x0F73: "\u0f71\u0f72", 0x0F75: "\u0f71\u0f74", 0x0F81: "\u0f71\u0f80"}


def nfc(text: str) -> str:
    """The canonical composition (NFC) of a text.

    unicodedata sorts each run of combining marks by insertion, quadratic in the run's length: 100,000 marks
    take 10 s. Runs are therefore put in canonical order first, which NFC does not distinguish.
    """
    if len(text) > _LONG_TEXT and not text.isascii():
        text = text.translate(_DECOMPOSED)
        classes = bytes(map(unicodedata.combining, text))
        pieces, end = [], 0
        for run in _LONG_RUN.finditer(classes):
            marks = sorted(text[run.start() : run.end()], key=unicodedata.combining)
            pieces += [text[end : run.start()], *marks]
            end = run.end()
        if pieces:
            text = "".join([*pieces, text[end:]])
    return unicodedata.normalize("NFC", text)


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, which no bytes can express, as U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
