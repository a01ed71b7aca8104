"""A vocabulary of 271 tokens, written as a file would have it."""

from __future__ import annotations

import base64


def small_ranks() -> dict[bytes, int]:
    """256 single bytes and a few merges: enough to be a vocabulary."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [
        t.encode() for t in ("he", "ll", "hell", "hello", " w", "or", " wor", "ld", " world", "  ", "\n\n")
    ]
    tokens += [b"\xe4\xbd", "你".encode(), "好".encode()[:2], "你好".encode()]
    return {token: rank for rank, token in enumerate(tokens)}


def vocab_lines(ranks: dict[bytes, int]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
