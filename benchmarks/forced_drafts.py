"""Guesses of a chosen quality: by a head that also knows the answers, for measurements and tests."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from qwenrt.engine.drafts import Head
from qwenrt.engine.launched import Span
from qwenrt.engine.sequence import Sequence


class Knowing:
    """A model's own head, which does its work, and whose guesses are then replaced: each is the right token with the
    probability ``share``, else a wrong one. ``text_of``: all tokens that a sequence will have had, its prompt first."""

    def __init__(
        self, head: Head, text_of: Callable[[Sequence], list[int]], share: float, seed: int = 0
    ) -> None:
        self._head, self._text_of, self.share = head, text_of, share
        self._random = random.Random(seed)
        self.most = head.most

    def computed(self, stream: torch.Tensor | None, spans: list[Span]) -> None:
        self._head.computed(stream, spans)

    def guess(self, asked: list[tuple[Sequence, int]], running: list[Sequence]) -> list[list[int]]:
        guesses = self._head.guess(asked, running)
        return [self._instead(seq, len(own)) for (seq, _), own in zip(asked, guesses, strict=True)]

    def _instead(self, seq: Sequence, count: int) -> list[int]:
        known = self._text_of(seq)[len(seq.token_ids) :][:count]
        return [token if self._random.random() < self.share else token ^ 1 for token in known]

    def checked(self, seq: Sequence, guessed: int, right: int) -> None:
        self._head.checked(seq, guessed, right)

    def forget(self, seq: Sequence) -> None:
        self._head.forget(seq)
