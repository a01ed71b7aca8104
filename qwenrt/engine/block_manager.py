"""Who owns which block of the paged cache, and which full blocks can be shared. Block ids are plain ints."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from qwenrt.engine.sequence import Link, Sequence
from qwenrt.engine.states import States

# A full block's identity: what comes before it, and its own tokens.
# Being the key of a dict, it is compared in full: equal hashes of different tokens never meet.
Key = tuple[Link, tuple[int, ...]]


@dataclass
class _Known:
    """A findable block: what it is found by, and how many requests have used it, the last of them by name; the adapter
    that it was computed with, by number."""

    key: Key
    uid: int
    last: str
    adapter: int = 0
    uses: int = 1

    def used_by(self, seq: Sequence) -> None:
        """Siblings of one request, and a sequence that is computed anew, count once."""
        if seq.request_id != self.last:
            self.uses, self.last = self.uses + 1, seq.request_id


class BlockManager:
    """Hands out blocks of ``block_size`` slots, counts their users, and keeps finished ones for reuse.

    Full blocks whose tokens are computed can be found again by content (``prefix_caching``). Such a block is
    only ever read: a sequence writes behind its shared prefix, into blocks of its own. Blocks nobody uses
    stay findable until they are needed. Those that one request alone has used go first, then those of several, the
    least recently used first: what is asked in passing does not drive out the beginning that a conversation comes back
    to. An eighth of the blocks is left to what was used once, or nothing new would ever be found again.
    ``states``: where sequences also have a state, which a shared prefix must have been kept with.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefix_caching: bool = True, states: States | None = None
    ) -> None:
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self.states = states
        self._users = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        # Findable and in nobody's use, oldest first: those that one request has used, and those that several have.
        self._once: OrderedDict[int, None] = OrderedDict()
        self._shared: OrderedDict[int, None] = OrderedDict()
        self._most_shared = num_blocks - num_blocks // 8
        self._by_key: dict[Key, int] = {}
        self._registered: dict[int, _Known] = {}
        self._next_uid = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._blank) + len(self._once) + len(self._shared)

    @property
    def num_findable(self) -> int:
        """Blocks a new prompt could share."""
        return len(self._by_key)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens``."""
        return -(-num_tokens // self.block_size)

    def admit(self, seq: Sequence, reserve: int = 0) -> bool:
        """Give a sequence without blocks room for all its tokens, shared ones first; False (and nothing
        changed) where fewer than ``reserve`` blocks would stay free. Sets ``num_computed`` to the tokens found
        in the cache; at least the last one is left to compute."""
        matched = self._match(seq)
        found = self._usable(matched)
        missing = self.blocks_for(len(seq.token_ids)) - len(found)
        idle = sum(self._users[block] == 0 for block in found)
        if missing + idle + reserve > self.num_free:
            return False
        for block in found:
            if self._users[block] == 0:
                del (self._once if block in self._once else self._shared)[block]
            self._users[block] += 1
            self._registered[block].used_by(seq)
        seq.block_table = found + [self._take() for _ in range(missing)]
        seq.num_computed = seq.num_stored = len(found) * self.block_size
        seq.num_committed = len(found)
        if found:
            seq.chain = self._registered[found[-1]].uid
        if self.states is not None:
            uid = seq.chain if found and isinstance(seq.chain, int) else None
            self.states.admit(seq, uid, len(matched) * self.block_size)
        return True

    def num_found(self, seq: Sequence) -> int:
        """How many tokens of a sequence without blocks are in the cache now."""
        return len(self._usable(self._match(seq))) * self.block_size

    def num_uses(self, block: int) -> int:
        """How many requests have used a block that can be found; 0 for another."""
        known = self._registered.get(block)
        return 0 if known is None else known.uses

    def uid_of(self, block: int) -> int:
        """What tells a block's content from those that it had before and will have; -1 where it cannot be found."""
        known = self._registered.get(block)
        return -1 if known is None else known.uid

    def reach(self, seq: Sequence, ahead: int, leave: int) -> int:
        """Give a running sequence slots for up to ``ahead`` tokens that may follow, as long as ``leave`` blocks stay
        free -> for how many it has them."""
        size = self.block_size
        while len(seq.block_table) * size < seq.num_known + ahead and self.num_free > leave:
            seq.block_table.append(self._take())
        return min(ahead, len(seq.block_table) * size - seq.num_known)

    def grow(self, seq: Sequence) -> bool:
        """Make sure a running sequence has slots for all its tokens; False (and nothing changed) where too few blocks
        are free."""
        missing = self.blocks_for(seq.num_known) - len(seq.block_table)
        if missing > self.num_free:
            return False
        seq.block_table.extend(self._take() for _ in range(missing))
        return True

    def commit(self, seq: Sequence) -> None:
        """Offer the blocks that are full and computed for sharing."""
        if not self.prefix_caching:
            return
        size = self.block_size
        while (seq.num_committed + 1) * size <= seq.num_stored:
            i = seq.num_committed
            key: Key = (seq.chain, tuple(seq.token_ids[i * size : (i + 1) * size]))
            same = self._by_key.get(key)
            if same is None:
                same = seq.block_table[i]
                self._by_key[key] = same
                self._registered[same] = _Known(key, self._next_uid, seq.request_id, seq.adapter)
                self._next_uid += 1
            known = self._registered[same]
            known.used_by(seq)
            seq.chain = known.uid
            seq.num_committed += 1
            if self.states is not None:
                self.states.commit(seq, seq.num_committed * size, known.uid)

    def free(self, seq: Sequence) -> None:
        """Take all blocks back. The end of a sequence is reused before its beginning, which others may share."""
        for block in reversed(seq.block_table):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._put_back(block)
        if self.states is not None:
            self.states.free(seq)
        seq.reset()

    def forget(self, seq: Sequence) -> None:
        """Nobody shall find this sequence's blocks again: what they hold is not to be trusted."""
        for block in seq.block_table:
            if block in self._registered:
                self._unregister(block)

    def forget_adapter(self, number: int) -> None:
        """The blocks that were computed with an adapter nobody will ask for again are blank, or will be when those who
        use them have ended."""
        for block in [block for block, known in self._registered.items() if known.adapter == number]:
            self._unregister(block)
            if self._users[block] == 0:
                del (self._once if block in self._once else self._shared)[block]
                self._blank.append(block)

    def _usable(self, matched: list[int]) -> list[int]:
        """Of the blocks that a sequence begins with, those it can use: up to the last whose state was kept."""
        if self.states is None:
            return matched
        return matched[: self.states.reach([self._registered[block].uid for block in matched])]

    def _match(self, seq: Sequence) -> list[int]:
        """The blocks in the cache that hold what a sequence begins with; its last token is left to compute."""
        if not self.prefix_caching:
            return []
        found: list[int] = []
        size, chain = self.block_size, seq.chain
        for start in range(0, len(seq.token_ids) - size, size):
            block = self._by_key.get((chain, tuple(seq.token_ids[start : start + size])))
            if block is None:
                break
            found.append(block)
            chain = self._registered[block].uid
        return found

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = (self._once or self._shared).popitem(last=False)
            self._unregister(block)
        self._users[block] = 1
        return block

    def _put_back(self, block: int) -> None:
        known = self._registered.get(block)
        if known is None:
            self._blank.append(block)
        elif known.uses == 1:
            self._once[block] = None
        else:
            self._shared[block] = None
            if len(self._shared) > self._most_shared:
                self._once[self._shared.popitem(last=False)[0]] = None

    def _unregister(self, block: int) -> None:
        known = self._registered.pop(block)
        del self._by_key[known.key]
        if self.states is not None:
            self.states.drop(known.uid)
