"""How long an answer may think: which of its tokens are its thought, and when that is ended for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

_OPENS_WITHIN = 4  # an answer that begins with a thought has its opening tag among so many first tokens
# With a budget, one of so many of the tokens that may be written is reserved for the answer.
_ANSWER_SHARE = 4


@dataclass(frozen=True)
class ThoughtRules:
    """How the thoughts of a model look, and how long they may be.

    opening, closing: the ids of the tags. words: what ends a thought whose time is up, the closing tag among them.
    in_thought: the prompt ended inside a thought. budget: the longest thought in tokens, None for any length.
    """

    opening: int | None
    closing: int | None
    words: tuple[int, ...]
    in_thought: bool = False
    budget: int | None = None

    def within(self, most: int) -> ThoughtRules:
        """The same where only ``most`` tokens may be written beside ``words``: a share of them is for the answer."""
        if self.budget is None:
            return self
        return replace(self, budget=max(1, min(self.budget, most - max(1, most // _ANSWER_SHARE))))


class Thought:
    """Follows the thought of one completion. ``num_tokens`` of those seen so far are its own, with its tags."""

    def __init__(self, rules: ThoughtRules) -> None:
        self._rules, self._budget = rules, rules.budget
        self._open, self._over = rules.in_thought, False
        self._seen = self.num_tokens = 0

    @property
    def words(self) -> tuple[int, ...]:
        return self._rules.words

    @property
    def is_due(self) -> bool:
        """Whether it has to end here, by its budget or because that was asked for."""
        return self._open and self._budget is not None and self._seen > 0 and self._seen >= self._budget

    def push(self, token: int) -> None:
        """One more token of the completion."""
        self._seen += 1
        if self._over:
            return
        if not self._open:
            self._open = token == self._rules.opening
            self._over = not self._open and self._seen >= _OPENS_WITHIN
        if self._open:
            self.num_tokens += 1
            if token == self._rules.closing:
                self._open, self._over = False, True

    def end(self) -> None:
        """It shall end now, or as soon as it has begun."""
        self._budget = 0
