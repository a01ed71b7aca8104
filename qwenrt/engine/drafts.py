"""Guesses at what comes next: a step checks several at once.

A step computes the logits after the last token and after each guessed one, and chooses there as it would have if the
guesses were the text: how a token is chosen depends on its place alone. Guesses are kept as long as they are what was
chosen; the tokens are those that would have been written without. The numbers they are chosen by are the same but for
the order of their sums, which in the kernels of the CPU depends on how many tokens a step computes, whether these are
guesses or other requests: about 1e-5 of a logit, 1e-2 where the cache is int8. Where two tokens are nearer than that,
either may be written, as when requests run beside each other.

In a model with layers of linear attention the states after each guess are kept until it is known which were right
(`States`).

They come from two places: from what a sequence already has, where a request asks for it (`LookUp`); else from the head
that some models have for it, where one was loaded (`MtpDrafts`).

Where the host chooses a token (penalties, bias, logprobs, the ban on an early end), it chooses those behind guesses one
after the other, as the text grows. Nothing is guessed under a grammar, which changes with each token what the next may
be; nor where a step may be under way when the next one is begun (depth 1): what the guesses would follow is not known
yet.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qwenrt.config.layers import MOST_ROWS
from qwenrt.engine.launched import Launched, Span
from qwenrt.engine.sequence import Sequence

_FIRST = 4  # guesses of a sequence that has not been wrong yet
_MOST = 15
_MATCH = 32  # tokens before a place that are compared
_PLACES = 8  # where the last two tokens occurred before, the latest ones
_REST = (8, 64)  # tokens for which nothing is guessed after a row of errors: at first, and at most


class LookUp:
    """Guesses for one sequence: what followed the longest earlier occurrence of its last tokens, two at least.

    How many adapts: twice as many after all were right, down to none after errors; then a single one is tried again
    after a while, which grows as long as that is wrong.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], list[int]] = {}  # a pair of tokens -> the places behind it
        self._read = 1  # tokens whose pairs with the one before are in _places
        self._many, self._rest, self._pause_until = _FIRST, _REST[0], 0

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow."""
        many = min(self._many, most)
        if many <= 0 or len(tokens) < max(3, self._pause_until):
            return []
        for place in range(self._read, len(tokens) - 1):  # the last pair has no successor yet
            places = self._places.setdefault((tokens[place - 1], tokens[place]), [])
            places.append(place + 1)
            if len(places) > _PLACES:
                del places[0]
        self._read = max(self._read, len(tokens) - 1)
        places = self._places.get((tokens[-2], tokens[-1]), [])
        if not places:
            return []
        start = max(places, key=lambda place: (_alike(tokens, place), place))
        guessed: list[int] = []
        for i in range(start, start + many):  # behind the end is what was just guessed
            guessed.append(tokens[i] if i < len(tokens) else guessed[i - len(tokens)])
        return guessed

    def checked(self, guessed: int, right: int, num_tokens: int) -> None:
        """So many of the guesses were right; the sequence has ``num_tokens`` now."""
        if right == guessed:
            self._many = min(max(2 * guessed, self._many), _MOST)
        elif right:
            self._many = right + 1
        else:
            self._many //= 2
        if right:
            self._rest = _REST[0]
        elif self._many == 0:
            self._many, self._pause_until = 1, num_tokens + self._rest
            self._rest = min(2 * self._rest, _REST[1])


def _alike(tokens: list[int], place: int) -> int:
    """How many tokens before ``place`` are those at the end."""
    count = 0
    while count < min(place, _MATCH) and tokens[place - 1 - count] == tokens[-1 - count]:
        count += 1
    return count


class Head(Protocol):
    """What guesses by the hidden states that steps leave (`MtpDrafts`). ``most``: tokens for one sequence."""

    most: int

    def computed(self, stream: torch.Tensor | None, spans: list[Span]) -> None:
        """What left the layers of a step that is done, its tokens as in ``spans``."""

    def guess(self, asked: list[tuple[Sequence, int]], running: list[Sequence]) -> list[list[int]]:
        """Up to so many tokens that may follow, of each."""

    def checked(self, seq: Sequence, guessed: int, right: int) -> None:
        """How many of its guesses were right."""

    def forget(self, seq: Sequence) -> None:
        """It is finished."""


class Drafts:
    """The guesses of all sequences. ``head``: guesses for all that ask for nothing else, where there is one."""

    def __init__(self, head: Head | None = None) -> None:
        self.head = head
        self._lookups: dict[int, LookUp] = {}
        self.num_guessed = self.num_right = 0

    def guesses(
        self, decoding: list[Sequence], room: int, running: list[Sequence]
    ) -> list[tuple[Sequence, list[int]]]:
        """What each decoding sequence may go on with, at most ``room`` tokens in all. ``running``: all that have a
        cache."""
        asked = [seq for seq in decoding if self.head is not None or seq.params.draft == "lookup"]
        room = min(room, MOST_ROWS - len(decoding))
        found: list[tuple[Sequence, list[int]]] = []
        for_head: list[tuple[Sequence, int]] = []
        for i, seq in enumerate(asked):
            share = min(room // (len(asked) - i), seq.max_len - len(seq.token_ids) - 1)
            if share <= 0 or seq.in_flight or seq.constraint is not None:
                continue
            if seq.params.draft != "lookup" and self.head is not None:
                for_head.append((seq, min(share, self.head.most)))
                room -= for_head[-1][1]
                continue
            guess = self._lookups.setdefault(seq.seq_id, LookUp()).guess(seq.token_ids, share)
            if guess:
                found.append((seq, guess))
                room -= len(guess)
        if self.head is not None:
            guessed = self.head.guess(for_head, running)
            found += [(seq, own) for (seq, _), own in zip(for_head, guessed, strict=True) if own]
        return found

    def checked(self, seq: Sequence, guessed: int, right: int) -> None:
        """A step has shown how many of a sequence's guesses were right."""
        self.num_guessed += guessed
        self.num_right += right
        if seq.seq_id in self._lookups:
            self._lookups[seq.seq_id].checked(guessed, right, len(seq.token_ids))
        elif self.head is not None:
            self.head.checked(seq, guessed, right)

    def computed(self, done: Launched) -> None:
        """A step is done, and its guesses are checked."""
        if self.head is not None:
            self.head.computed(done.outcome.stream, done.spans)

    def forget(self, seq: Sequence) -> None:
        """A finished sequence needs no state."""
        self._lookups.pop(seq.seq_id, None)
        if self.head is not None:
            self.head.forget(seq)
