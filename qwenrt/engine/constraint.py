"""What one completion may say next: a grammar's state after its tokens, and the thought before it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

import numpy as np

from qwenrt.engine.grammar import Compiled
from qwenrt.engine.openings import Openings
from qwenrt.errors import BackendError, QwenrtError, RequestError
from qwenrt.structure import Grammar

_OPEN, _CLOSE = "<think>", "</think>"
_TOO_MUCH = re.compile("max is|limit|too many|fuel", re.IGNORECASE)  # in the words of a matcher that gave up


@dataclass(frozen=True)
class Allowed:
    """Which tokens may come next: those whose ``ids`` int64, rising, are given, or with ``but`` all except them."""

    ids: np.ndarray
    but: bool = False


class _Phase(Enum):
    """thought: whatever comes until it is closed. gap: it was, and line ends may follow. start: the model may begin
    a thought, or the answer. text: free, until an opening of the grammar is written. answer: within the grammar."""

    THOUGHT = "thought"
    TEXT = "text"
    GAP = "gap"
    START = "start"
    ANSWER = "answer"


class Constraint:
    """One completion held to a grammar. It knows the tokens that it was given by `take`, and nothing of the cache.

    ``ends``: ids that end the completion; they are allowed where the grammar may end, and nowhere else.
    """

    __slots__ = (
        "_allowed",
        "_compiled",
        "_ends",
        "_failed",
        "_gap",
        "_matcher",
        "_opening",
        "_openings",
        "_phase",
        "_tail",
        "_within",
    )

    def __init__(self, compiled: Compiled, grammar: Grammar, ends: Collection[int]) -> None:
        self._compiled, self._matcher = compiled, compiled.matcher()
        size = compiled.vocabulary.size
        self._ends = sorted(i for i in ends if i < size)
        self._phase = {"none": _Phase.ANSWER, "open": _Phase.THOUGHT, "possible": _Phase.START}[
            grammar.thought
        ]
        self._within = grammar.begins
        self._openings = None if self._within is None else Openings(self._within, compiled.misfits)
        if self._openings is not None and self._phase is _Phase.ANSWER:
            self._phase = _Phase.TEXT
        self._opening = compiled.tokenizer.token_id(_OPEN)
        self._gap = 2  # line ends that may follow a thought
        self._tail = b""  # of the thought, as long as its closing tag
        self._allowed: Allowed | None = None  # of the next token, where it is known
        self._failed: QwenrtError | None = None

    @property
    def free(self) -> bool:
        """Whether any token may come next: a thought goes on, or a text in which no opening is about to end."""
        if self._openings is not None and self._phase in (_Phase.TEXT, _Phase.START, _Phase.GAP):
            return not len(self._openings.misfits())
        return self._phase is _Phase.THOUGHT

    def allowed(self) -> Allowed | None:
        """Which tokens may come next; None: any. Computed once for each token, without the interpreter's lock. Where it
        cannot be computed, `take` of whatever comes next says why."""
        if self.free:
            return None
        if self._allowed is None:
            self._allowed = self._computed()
        return self._allowed

    def take(self, token: int) -> bool:
        """The completion goes on with this token -> whether it is complete: nothing can follow it.

        Raises RequestError where the grammar turned out to be too much, BackendError for a token that was not allowed.
        """
        if self._failed is not None:
            raise self._failed
        self._allowed = None
        if token in self._ends:
            return False
        if self._phase is _Phase.THOUGHT:
            return self._think(token)
        if self._phase is _Phase.START and token == self._opening:
            self._phase = _Phase.THOUGHT
            return False
        if self._openings is not None and self._phase is not _Phase.ANSWER:
            return self._read(self._compiled.tokenizer.token_bytes(token))
        if self._phase is _Phase.GAP and token in self._compiled.vocabulary.line_ends:
            self._gap -= len(self._compiled.tokenizer.token_bytes(token))
            if self._gap <= 0:
                self._phase = _Phase.ANSWER
            return False
        self._phase = _Phase.ANSWER
        return self._over(self._consume([token]))

    def _think(self, token: int) -> bool:
        text = self._tail + self._compiled.tokenizer.token_bytes(token)
        _, tag, rest = text.partition(_CLOSE.encode())
        self._tail = text[-len(_CLOSE) + 1 :]
        if not tag:
            return False
        self._phase = _Phase.GAP
        rest = rest.lstrip()
        if not rest:
            return False
        # The tag was spelled by tokens of text, the last of which begins the answer.
        if self._openings is not None:
            return self._read(rest)
        self._phase = _Phase.ANSWER
        return self._consume(self._compiled.tokenizer.encode(rest.decode("utf-8", "replace")))

    def _read(self, text: bytes) -> bool:
        """More of a text that is free until an opening is written."""
        assert self._openings is not None
        self._phase = _Phase.TEXT
        found = self._openings.push(text)
        if found is None:
            return False
        tokens = self._compiled.begun(*found)
        self._matcher = self._compiled.matcher()
        if self._matcher.validate_tokens(tokens) < len(tokens):  # a token that nobody asked `allowed` about
            return False
        self._phase = _Phase.ANSWER
        return self._over(self._consume(tokens))

    def _over(self, complete: bool) -> bool:
        """Whether the answer is complete, where the grammar is: behind it the text may be free again."""
        if complete and self._within is not None and self._within.again:
            self._phase = _Phase.TEXT
            return False
        return complete

    def _consume(self, tokens: list[int]) -> bool:
        matcher = self._matcher
        if not matcher.consume_tokens(tokens):
            said = matcher.get_error().partition("\n")[0][:160]
            if _TOO_MUCH.search(said):
                raise RequestError("a grammar", f"it takes too much: {said}", "Make it simpler.")
            raise BackendError(
                "an answer held to a grammar",
                f"token {tokens[0]} does not fit it: {said}",
                "Report it, with the grammar.",
            )
        if matcher.is_stopped():
            return True
        if not matcher.is_accepting():
            return False
        allowed = self.allowed()  # the only way to see that nothing else can come
        return allowed is not None and not allowed.but and set(allowed.ids.tolist()) <= set(self._ends)

    def _computed(self) -> Allowed:
        if self._openings is not None and self._phase is not _Phase.ANSWER:
            return Allowed(self._openings.misfits(), but=True)
        vocabulary, matcher = self._compiled.vocabulary, self._matcher
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)[: len(vocabulary.text)]
        if matcher.is_error():
            said = matcher.get_error().partition("\n")[0][:160]
            return self._give_up(RequestError("a grammar", f"it takes too much: {said}", "Make it simpler."))
        may_end = bool(bits[vocabulary.eod >> 3] >> (vocabulary.eod & 7) & 1)
        bits = bits & vocabulary.text
        more: list[int] = []
        if self._phase is _Phase.GAP:
            more += [
                i for i in vocabulary.line_ends if len(self._compiled.tokenizer.token_bytes(i)) <= self._gap
            ]
        if self._phase is _Phase.START and self._opening is not None:
            more.append(self._opening)
        _put(bits, self._ends, may_end)
        _put(bits, more, True)
        allowed = _allowed(bits, vocabulary.size)
        if not len(allowed.ids) and not allowed.but and not may_end:
            return self._give_up(
                RequestError(
                    "a grammar", "nothing can follow what was written", "Ask for text it can go on with."
                )
            )
        return allowed

    def _give_up(self, error: QwenrtError) -> Allowed:
        self._failed = error
        return Allowed(np.array([self._compiled.vocabulary.eod]))


def _put(bits: np.ndarray, ids: Collection[int], value: bool) -> None:
    for i in ids:
        if value:
            bits[i >> 3] |= 1 << (i & 7)
        else:
            bits[i >> 3] &= ~(1 << (i & 7)) & 255


def _allowed(bits: np.ndarray, size: int) -> Allowed:
    """The bits uint8 [ceil(size / 8)] as the shorter of the two lists. Bytes are looked at first: most are all of one
    kind."""
    some, not_all = bits != 0, bits != 255
    but = bool(np.count_nonzero(not_all) < np.count_nonzero(some))
    where = np.flatnonzero(not_all if but else some)
    single = np.unpackbits(~bits[where] if but else bits[where], bitorder="little")
    flat = np.flatnonzero(single.view(np.bool_))
    ids = (where[flat >> 3] << 3) + (flat & 7)
    return Allowed(ids[: np.searchsorted(ids, size)], but)
