"""Texts of templates as tests look at them."""

from __future__ import annotations

from qwenrt.text.template.provenance import MASK, own_runs, plain


def masked(text: str) -> str:
    """The text, in its length, with a lone surrogate in place of every untrusted character."""
    view = [MASK] * len(text)
    for start, stop in own_runs(text):
        view[start:stop] = plain(text)[start:stop]
    return "".join(view)
