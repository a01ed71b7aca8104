"""Whether the server lives and is ready: what `/health` and `/ready` say, told at any load in microseconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Signs:
    """What an engine shows of itself. ``alive``: its thread runs; else ``reason`` says in a sentence why not.
    ``has_work``: something waits for a step or is computed. ``steps``: how many it has made, or anything else that
    changes with each, such as the time of the last."""

    alive: bool
    reason: str = ""
    has_work: bool = False
    steps: float = 0


@dataclass(frozen=True)
class Report:
    """One answer: ``status`` 200 or 503, and ``reason``, "" where all is well."""

    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason

    @property
    def status(self) -> int:
        return 200 if self.ok else 503


class Health:
    """Watches an engine from outside.

    ``signs`` must neither wait nor take a lock. An engine is stuck when it has had work for ``watchdog`` seconds while
    no step ended, which is told from two looks: call `look` about once a second, as `/ready` and the server do. Until
    `loaded` is called there is nothing to be ready.
    """

    def __init__(
        self, signs: Callable[[], Signs], watchdog: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._signs, self._watchdog, self._clock = signs, watchdog, clock
        self._loaded, self._closing = False, ""
        self._steps: float | None = None  # those at the first look since the last step; None without work
        self._waits_since = 0.0

    def loaded(self) -> None:
        """The model can be asked."""
        self._loaded = True

    def close(self, reason: str = "The server is being stopped.") -> None:
        """Not ready from now on. Safe in a signal's handler."""
        self._closing = reason

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return bool(self._closing)

    def look(self) -> float:
        """Look at the engine once more -> seconds that its work has waited for the end of a step, 0 without work."""
        signs = self._read()
        if not (signs.alive and signs.has_work):
            self._steps = None
            return 0.0
        now = self._clock()
        if self._steps != signs.steps:
            self._steps, self._waits_since = signs.steps, now
        return now - self._waits_since

    def live(self) -> Report:
        """/health: the process answers, and the engine's thread is there once the model is loaded."""
        signs = self._read()
        return Report() if signs.alive or not self._loaded else Report(_dead(signs))

    def ready(self) -> Report:
        """/ready: a request that comes now would be served."""
        if self._closing:
            return Report(self._closing)
        if not self._loaded:
            return Report("The model is being loaded.")
        signs = self._read()
        if not signs.alive:
            return Report(_dead(signs))
        waited = self.look()
        if waited >= self._watchdog:
            return Report(f"A step has taken {waited:.0f} seconds; the watchdog allows {self._watchdog:g}.")
        return Report()

    def _read(self) -> Signs:
        try:
            return self._signs()
        except Exception as error:  # an engine that cannot be asked is none
            return Signs(False, f"{type(error).__name__}: {error}")


def _dead(signs: Signs) -> str:
    return f"The engine has ended. {signs.reason}".rstrip()
