"""Where a grammar begins in a text that is free until then."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qwenrt.structure import Begins

NOTHING = np.empty(0, dtype=np.int64)
# (an opening, how much of it is written) -> the ids, int64 and rising, of tokens that would end it and go on with what
# the grammar does not allow.
Misfits = Mapping[tuple[bytes, int], np.ndarray]


class Openings:
    """Reads free text for the next opening. ``over``: none will count any more."""

    __slots__ = ("_longest", "_misfits", "_openings", "_over", "_tail", "over")

    def __init__(self, begins: Begins, misfits: Misfits) -> None:
        self._openings = [opening.encode() for opening in begins.openings]
        self._over, self._misfits = begins.not_after.encode(), misfits
        self._longest = max(map(len, [*self._openings, self._over]))
        self._tail = b"" if begins.within_line else b"\n"
        self.over = False

    def push(self, text: bytes) -> tuple[bytes, bytes] | None:
        """More free text -> the first opening that is whole now, and what was written behind it."""
        if self.over:
            return None
        self._tail += text
        found = [(at, opening) for opening in self._openings if (at := self._tail.find(opening)) >= 0]
        end = self._tail.find(self._over) if self._over else -1
        if found and not 0 <= end < min(found)[0]:
            at, opening = min(found)
            rest, self._tail = self._tail[at + len(opening) :], b""
            return opening, rest
        self.over = end >= 0
        self._tail = self._tail[-self._longest + 1 :]
        return None

    def misfits(self) -> np.ndarray:
        """The ids, int64 and rising, that may not come next."""
        found = NOTHING
        for (opening, written), ids in self._misfits.items():
            if not self.over and self._tail.endswith(opening[:written]):
                found = np.union1d(found, ids)
        return found
