"""Responses that clients may name in later requests, for a while: in memory, bounded, each seen by its own key only."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from qwenrt.errors import shown
from qwenrt.text.dialects.problem import Problem

MOST = 256
MOST_BYTES = 64 * 2**20
LIFETIME_S = 30 * 60.0


@dataclass(frozen=True)
class KeptResponse:
    """``body``: the response as JSON. ``items``: the whole conversation up to it, as the dialect reads it again."""

    body: bytes
    items: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.body) + len(self.items)


class KeptResponses:
    """The latest responses by owner (whoever's API key it was) and id. Any thread may use it.

    most, most_bytes: beyond them the one goes that was longest not asked for. lifetime_s: seconds from when it was
    last used. clock: seconds, monotonic.
    """

    def __init__(
        self,
        most: int = MOST,
        most_bytes: int = MOST_BYTES,
        lifetime_s: float = LIFETIME_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._most_bytes, self._lifetime_s, self._clock = most, most_bytes, lifetime_s, clock
        self._kept: OrderedDict[tuple[str, str], tuple[KeptResponse, float]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """The size of all that is kept."""
        return self._bytes

    def keep(self, owner: str, response_id: str, response: KeptResponse) -> None:
        """Keep a response; one that alone is larger than all may be is not kept."""
        with self._lock:
            self._forget((owner, response_id))
            self._expire()
            if response.size > self._most_bytes:
                return
            self._kept[owner, response_id] = (response, self._clock())
            self._bytes += response.size
            while len(self._kept) > self._most or self._bytes > self._most_bytes:
                self._forget(next(iter(self._kept)))

    def get(self, owner: str, response_id: str) -> KeptResponse:
        """The response. Raises Problem "not_found", the same for one that never was, is no more, or is another's."""
        with self._lock:
            self._expire()
            found = self._kept.pop((owner, response_id), None)
            if found is None:
                raise _not_found(response_id)
            self._kept[owner, response_id] = (found[0], self._clock())
            return found[0]

    def drop(self, owner: str, response_id: str) -> None:
        """Forget a response. Raises Problem "not_found" as `get` does."""
        with self._lock:
            self._expire()
            known = self._forget((owner, response_id))
        if not known:
            raise _not_found(response_id)

    def _expire(self) -> None:
        """Forget what was not used for too long: the first ones, since every use moves one to the end."""
        now = self._clock()
        while self._kept:
            key, (_, used) = next(iter(self._kept.items()))
            if now - used < self._lifetime_s:
                return
            self._forget(key)

    def _forget(self, key: tuple[str, str]) -> bool:
        found = self._kept.pop(key, None)
        if found is not None:
            self._bytes -= found[0].size
        return found is not None


def _not_found(response_id: str) -> Problem:
    found = (
        f"There is no response {shown(response_id)}: responses are kept for a while, unless store is false."
    )
    return Problem(
        "not_found", f"{found} Send the whole conversation as input.", param="previous_response_id"
    )
