"""Log-probabilities of tokens, in the shape that OpenAI, Ollama and DashScope share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qwenrt.outputs import TokenLogprob

LEAST = -9999.0  # stands for minus infinity, which JSON cannot say

TokenText = Callable[[int], tuple[str, bytes]]


def logprob_entries(logprobs: Sequence[TokenLogprob], token_text: TokenText | None) -> list[dict[str, Any]]:
    """[{"token", "logprob", "bytes", "top_logprobs": [the same without alternatives]}], the likeliest alternative
    first. token_text: a token's own text and bytes; None leaves both empty."""
    return [
        {
            **_entry(chosen.token_id, chosen.logprob, token_text),
            "top_logprobs": [
                _entry(token, logprob, token_text)
                for token, logprob in sorted(chosen.top.items(), key=lambda entry: -entry[1])
            ],
        }
        for chosen in logprobs
    ]


def _entry(token: int, logprob: float, token_text: TokenText | None) -> dict[str, Any]:
    text, raw = ("", b"") if token_text is None else token_text(token)
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(raw)}
