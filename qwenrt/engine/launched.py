"""A step under way, and whose tokens come of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwenrt.backends.stack import Outcome
from qwenrt.engine.sequence import Sequence, Status
from qwenrt.ops.steps import Draw


@dataclass(frozen=True)
class Row:
    """A row of a step's logits: the sequence that may go on with the token chosen there, the course it was on, and the
    guess that the row was computed from, None where that is a token of the sequence."""

    seq: Sequence
    course: int
    guess: int | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether its sequence still waits for the token; of a guess, whether it may."""
        return self.seq.course == self.course and self.seq.status is not Status.FINISHED

    @property
    def is_right(self) -> bool:
        """Whether the sequence has come to what was guessed: it is the last token, which alone is not in the cache
        yet."""
        return self.is_wanted and self.seq.num_remaining == 1 and self.seq.token_ids[-1] == self.guess


@dataclass(frozen=True)
class Span:
    """The tokens of one sequence in a step, guesses included: ``count`` from the place ``start`` on, in an ``epoch`` of
    its cache."""

    seq: Sequence
    epoch: int
    start: int
    count: int


@dataclass(frozen=True)
class Launched:
    """A step under way: its sequences, each with the tokens of its cache that hold what they must when it is done, and
    the cache it began with (its epoch); the rows of its outcome and how each is drawn, those of a sequence's guesses
    behind its own; when it began; and where each sequence's tokens are in it."""

    batch: list[tuple[Sequence, int]]
    stored: list[tuple[Sequence, int, int]]
    rows: list[Row]
    draws: list[Draw | None]
    outcome: Outcome
    began: float = 0.0
    spans: list[Span] = field(default_factory=list)

    @property
    def num_decoding(self) -> int:
        """Its tokens that are not of prompts."""
        return sum(count == 1 for _, count in self.batch) + sum(row.guess is not None for row in self.rows)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(count for _, count in self.batch if count > 1)
