"""Which sequences compute how many tokens in the next step. Policy only: ints and lists."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict

from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.sequence import Sequence, Status

_SHORT = (
    32  # tokens; kernels compute pieces below in another order, and their last bits would tell of the cut
)


def _piece(remaining: int, budget: int) -> int:
    """How many of a prompt's ``remaining`` tokens a step takes: what is left over is none or a piece that is not short,
    where the budget allows it."""
    count = min(remaining, budget)
    missing = _SHORT - (remaining - count)
    return count - missing if 0 < missing < _SHORT and count - missing >= _SHORT else count


class Scheduler:
    """First come, first served, at most ``max_num_seqs`` at once and ``max_num_batched_tokens`` a step.

    Every decoding sequence gets its token each step; prompts are cut into chunks that fill what is left.
    A prompt gets the blocks for all its tokens when it is admitted. When a running sequence that has grown finds no
    block, the latest sequence gives up its own and is computed anew later; the oldest always advances.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_batched_tokens = max_num_batched_tokens
        # More sequences than tokens in a step would leave some without their token.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        self.waiting[seq.seq_id] = seq

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next step: (sequence, how many of its tokens), decoding sequences first."""
        batch = [(seq, 1) for seq in self._decodes()]
        budget = self.max_num_batched_tokens - len(batch)
        for seq in self.running:
            if seq.num_remaining > 1 and budget > 0:
                batch.append((seq, _piece(seq.num_remaining, budget)))
                budget -= batch[-1][1]
        for seq in self._admit(budget):
            if budget > 0:
                batch.append((seq, _piece(seq.num_remaining, budget)))
                budget -= batch[-1][1]
        return batch

    def launch(self, seq: Sequence, num_tokens: int) -> bool:
        """A step computes these tokens now -> whether it chooses the next one."""
        seq.num_computed += num_tokens
        chooses = seq.num_computed == seq.num_known
        seq.in_flight += chooses
        return chooses

    def collect(self, seq: Sequence, num_stored: int, epoch: int) -> None:
        """A step is done after which ``num_stored`` tokens of the cache it began with (``epoch``) hold what they
        must."""
        if seq.epoch == epoch and seq.status is Status.RUNNING:
            seq.num_stored = num_stored
            self.blocks.commit(seq)

    def finish(self, seq: Sequence) -> None:
        """Done, cancelled or failed, whether it runs or waits: its blocks are free again."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            del self.waiting[seq.seq_id]
        seq.status = Status.FINISHED
        self.blocks.free(seq)

    def _decodes(self) -> list[Sequence]:
        ready: list[Sequence] = []
        for seq in list(self.running):
            if seq.status is not Status.RUNNING or seq.num_remaining < 1 or seq.ends_here:
                continue
            while not self.blocks.grow(seq):
                latest = self.running[-1]
                self._preempt(latest)
                if latest is seq:
                    break
            else:
                if seq.num_remaining == 1:
                    ready.append(seq)
        return ready

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.free(seq)
        seq.status = Status.WAITING
        self.waiting[seq.seq_id] = seq
        self.waiting.move_to_end(seq.seq_id, last=False)
        self.num_preemptions += 1

    def _admit(self, budget: int) -> list[Sequence]:
        """Waiting sequences that fit now. None overtakes one that lacks blocks: it would starve."""
        admitted: list[Sequence] = []
        room = self.max_num_seqs - len(self.running)
        for seq in self.waiting.values():
            if len(admitted) >= room or budget <= 0:
                break
            if seq.held_back:
                continue
            # What the running ones will ask for in their next step, so that nobody is admitted in vain.
            busy = len(self.running) + len(admitted)
            if not self.blocks.admit(seq, reserve=busy // self.blocks.block_size + 1 if busy else 0):
                break
            admitted.append(seq)
            budget -= seq.num_remaining
        for seq in admitted:
            del self.waiting[seq.seq_id]
            seq.status = Status.RUNNING
            if seq.num_cached is None:
                seq.num_cached = seq.num_computed
            insort(self.running, seq, key=lambda s: s.seq_id)
        return admitted
