"""Where the states of sequences are, in a model with layers of linear attention, and which can be found again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenrt.engine.sequence import Sequence

_EVERY = 1024  # tokens of a prompt after which its state is kept
_REST = 32  # tokens that a prompt has at least behind its last kept state, and before the next


class States:
    """Slots of states, as plain ints: one for each running sequence, the others for snapshots.

    Keys and values of a shared block are of no use without the state at the block's end. So states are kept: where a
    prompt is about to end, every 1024 tokens of it, and where it leaves what is cached, as the next one may too; and
    while an answer is written the one at its last full block, so that the next turn finds it all. They are found by the
    uid of their block; the least recently used go first.

    A state cannot be taken back to where it was some tokens ago. So while a step checks guesses, the states after each
    of them are written to slots of their own (``num_trail`` in all), and the one after the last right guess becomes the
    sequence's.
    """

    def __init__(self, num_sequences: int, num_snapshots: int, block_size: int, num_trail: int = 0) -> None:
        self.block_size = block_size
        self.num_slots = num_sequences + num_snapshots + num_trail
        self._num_trail = num_trail  # that are left
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._snapshots: OrderedDict[int, int] = OrderedDict()  # uid of a block -> slot, the oldest first
        self._num_snapshots = num_snapshots
        self._num_pending = 0  # snapshots that steps under way make
        self._copies: list[tuple[int, int]] = []

    def reach(self, uids: list[int]) -> int:
        """Of a chain of blocks that a prompt begins with, how many lead to a snapshot."""
        return next((n for n in range(len(uids), 0, -1) if uids[n - 1] in self._snapshots), 0)

    def admit(self, seq: Sequence, uid: int | None, matched: int) -> None:
        """Give a sequence its slot, and the state after the block ``uid``, if there is one. ``matched``: the tokens it
        shares with what is cached, snapshot or not."""
        slot = seq.state_slot = self._free.pop()
        if uid is not None:
            self._snapshots.move_to_end(uid)
            self._copies.append((self._snapshots[uid], slot))
        self.plan(seq, matched)

    def plan(self, seq: Sequence, also: int = 0) -> None:
        """Choose where, in the tokens that a sequence has to compute, its state is kept; ``also``: one more place."""
        size, length = self.block_size, len(seq.token_ids)
        every = -(-_EVERY // size) * size
        places = {also, (length - _REST) // size * size, *range(every, length, every)}
        new = {p for p in places if seq.num_computed + _REST <= p <= length - _REST}
        seq.kept_at = sorted(new | set(seq.kept_at))

    def until_kept(self, seq: Sequence) -> int:
        """How many tokens of a prompt a step may compute: to the next place where its state is kept, or all."""
        while seq.kept_at and seq.kept_at[0] - seq.num_computed < 1:
            seq.kept_at.pop(0)
        return seq.kept_at[0] - seq.num_computed if seq.kept_at else seq.num_remaining

    def take_copies(self) -> list[tuple[int, int]]:
        """(from, to) of the copies that have to be made before the next step computes anything."""
        copies, self._copies = self._copies, []
        return copies

    def keep(self, seq: Sequence, num_tokens: int) -> tuple[int, int] | None:
        """A step brings a sequence to ``num_tokens``: (from, to) of the copy to make after it where its state is kept,
        at a place that was planned, or at the end of a block of its answer."""
        writes = num_tokens % self.block_size == 0 and num_tokens > seq.prompt_len
        if not (writes or num_tokens in seq.kept_at):
            return None
        slot = self._slot_of_snapshot()
        if slot is None:
            return None
        seq.snapshots.append((num_tokens, slot))
        return seq.state_slot, slot

    def commit(self, seq: Sequence, num_tokens: int, uid: int) -> None:
        """A sequence's block that ends after ``num_tokens`` can be found from now on: so can its state, if it was kept.
        Of its answer the last one alone is needed."""
        for kept in [kept for kept in seq.snapshots if kept[0] == num_tokens]:
            seq.snapshots.remove(kept)
            self._num_pending -= 1
            if uid in self._snapshots:
                self._free.append(kept[1])
                self._snapshots.move_to_end(uid)
                continue
            self._snapshots[uid] = kept[1]
            if num_tokens > seq.prompt_len:
                if seq.last_kept is not None:
                    self.drop(seq.last_kept)
                seq.last_kept = uid

    def begin_trail(self, seq: Sequence, guesses: int) -> int:
        """Slots for the states after each of up to ``guesses`` tokens that a step checks -> for how many."""
        count = min(guesses, self._num_trail)
        self._num_trail -= count
        seq.trail = [self._free.pop() for _ in range(count)]
        return count

    def keep_guessed(self, seq: Sequence, num_tokens: int, place: int) -> None:
        """The guess at ``place`` was right, and the sequence has ``num_tokens`` with it: where a block ends there, the
        state is kept before the next step computes anything."""
        if num_tokens % self.block_size or place >= len(seq.trail):
            return
        slot = self._slot_of_snapshot()
        if slot is not None:
            seq.snapshots.append((num_tokens, slot))
            self._copies.append((seq.trail[place], slot))

    def end_trail(self, seq: Sequence, right: int) -> None:
        """Its first ``right`` guesses were right: its state is the one after them."""
        if right and seq.trail:
            seq.state_slot, seq.trail[right - 1] = seq.trail[right - 1], seq.state_slot
        self._free += seq.trail
        self._num_trail += len(seq.trail)
        seq.trail = []

    def drop(self, uid: int) -> None:
        """The block ``uid`` is found no more: neither is its state."""
        slot = self._snapshots.pop(uid, None)
        if slot is not None:
            self._free.append(slot)

    def free(self, seq: Sequence) -> None:
        """A sequence runs no more."""
        self.end_trail(seq, 0)
        self._free += [slot for _, slot in seq.snapshots]
        self._num_pending -= len(seq.snapshots)
        if seq.state_slot >= 0:
            self._copies = [copy for copy in self._copies if copy[1] != seq.state_slot]
            self._free.append(seq.state_slot)

    def _slot_of_snapshot(self) -> int | None:
        """A slot for one more snapshot, that of the oldest where there are as many as may be. None where all of these
        are under way."""
        if len(self._snapshots) + self._num_pending < self._num_snapshots:
            self._num_pending += 1
            return self._free.pop()
        if not self._snapshots:
            return None
        self._num_pending += 1
        return self._snapshots.popitem(last=False)[1]
