"""Unicode that hostile text cannot slow down or break: NFC in linear time, lone surrogates replaced."""

from __future__ import annotations

import re
import unicodedata

from qwenrt.text.tokenizer.slices import COMPOSED_PLACE, STARTERS, first, slices

_SUSPECT = re.compile(f"[^{STARTERS}]{{64,}}")  # what may be a run of marks long enough to matter
_LONG_RUN = re.compile(rb"[^\0]{64,}")
# The only starters (combining class 0) whose decomposition consists of combining marks.
_DECOMPOSED = {0x0F73: "\u0f71\u0f72", 0x0F75: "\u0f71\u0f74", 0x0F81: "\u0f71\u0f80"}
_SURROGATE = re.compile("[\ud800-\udfff]")


def nfc(text: str) -> str:
    """The canonical composition (NFC) of a text, made a slice at a time."""
    if text.isascii():
        return text
    return "".join(map(_composed, slices(text, COMPOSED_PLACE)))


def _composed(text: str) -> str:
    """unicodedata sorts each run of combining marks by insertion, quadratic in the run's length: 100,000 marks take
    10 s. Runs are therefore put in canonical order first, which NFC does not distinguish."""
    return unicodedata.normalize("NFC", _SUSPECT.sub(_in_order, text))


def _in_order(suspect: re.Match[str]) -> str:
    text = suspect[0].translate(_DECOMPOSED)
    classes = bytes(map(unicodedata.combining, text))
    pieces, end = [], 0
    for run in _LONG_RUN.finditer(classes):
        marks = sorted(text[run.start() : run.end()], key=unicodedata.combining)
        pieces += [text[end : run.start()], *marks]
        end = run.end()
    return "".join([*pieces, text[end:]])


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, which no bytes can express, as U+FFFD."""
    if text.isascii() or first(_SURROGATE, text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
