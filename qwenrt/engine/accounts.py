"""What an engine has done, in numbers for people and monitors; and where the time of one completion went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwenrt.outputs import Timing

Clock = Callable[[], float]


@dataclass
class Marks:
    """When one completion arrived, was first computed and got its first token; None for what has not happened. And how
    many tokens were ``guessed`` for it, and ``right``."""

    arrived: float = 0.0
    began: float | None = None
    first_token: float | None = None
    guessed: int = 0
    right: int = 0

    def timing(self, now: float, num_tokens: int) -> Timing:
        """Of a completion that ends now with ``num_tokens``."""
        total = now - self.arrived
        queue = total if self.began is None else self.began - self.arrived
        if self.first_token is None:
            return Timing(queue, 0.0, total)
        writing = now - self.first_token
        rate = (num_tokens - 1) / writing if writing > 0 and num_tokens > 1 else 0.0
        first = self.first_token - self.arrived
        return Timing(queue, first, total, rate, self.guessed, self.right)


class Accounts:
    """Counters that only grow. One thread writes; reading them from another is harmless.

    generated: tokens. prompt_tokens_looked_up, _found and _computed: of prompts that were admitted, those that were
    searched for in the cache and found there; and those computed, again after a preemption. finished: completions by
    the reason of their end. cancelled: requests. moved: when the engine last got on, by ``clock``.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.generated = self.steps = self.cancelled = 0
        self.prompt_tokens_looked_up = self.prompt_tokens_found = self.prompt_tokens_computed = 0
        self.finished: Counter[str] = Counter()
        self.moved = clock()

    def move(self) -> None:
        """The engine is getting on: it ended a step, or takes up work after a rest."""
        self.moved = self.clock()

    def read(self) -> dict[str, Any]:
        """All of them, by their names in `Engine.stats`."""
        return {
            "generated_tokens": self.generated,
            "prompt_tokens_looked_up": self.prompt_tokens_looked_up,
            "prompt_tokens_found": self.prompt_tokens_found,
            "prompt_tokens_computed": self.prompt_tokens_computed,
            "steps": self.steps,
            "finished": dict(self.finished),
            "cancelled": self.cancelled,
            "last_step_age_s": max(0.0, self.clock() - self.moved),
        }
