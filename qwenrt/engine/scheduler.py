"""Which sequences compute how many tokens in the next step. Policy only: ints and lists."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable

from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.drafts import Drafts
from qwenrt.engine.sequence import Ahead, Sequence, Status
from qwenrt.engine.shares import shares
from qwenrt.engine.step_target import StepTarget

_WORTH_WAITING = 64  # tokens of a beginning that another prompt is computing right now
_JUST_BEGUN = 8  # tokens of an answer, at most


class Scheduler:
    """Admitted as they came, at most ``max_num_seqs`` at once and ``max_num_batched_tokens`` a step.

    Every decoding sequence gets its token each step. Prompts share what is left equally (`shares`), in turns where that
    is little, so that a short one passes a long one and both advance; ``target`` says how much that is while anybody
    decodes who has not just begun. A prompt gets the blocks for all its tokens when it is admitted. When a running
    sequence that has grown finds no block, the latest sequence gives up its own and is computed anew later; the oldest
    never does.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        target: StepTarget | None = None,
    ) -> None:
        self.blocks = blocks
        self.target = target or StepTarget(None)
        self.max_num_batched_tokens = max_num_batched_tokens
        # More sequences than tokens in a step would leave some without their token.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: list[Sequence] = []  # oldest first
        self.on_admit: Callable[[Sequence], None] = lambda seq: None  # it has its blocks and is about to run
        self.drafts: Drafts | None = None
        self.num_preemptions = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        self.waiting[seq.seq_id] = seq

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next step: (sequence, how many of its tokens), decoding sequences first."""
        decoding = self._decodes()
        batch = [(seq, 1) for seq in decoding]
        rows = len(batch) + self._guess(decoding)
        most = self.max_num_batched_tokens - rows
        if most <= 0:
            return batch
        prompts = [seq for seq in self.running if seq.num_remaining > 1]
        prompts += self._admit()
        prompts = [seq for seq in prompts if not seq.is_read]
        prompts.sort(key=lambda seq: (seq.turn, seq.seq_id))
        remaining = [self._until(seq) for seq in prompts]
        counts = shares(remaining, self._budget(decoding, remaining, rows, most), most)
        self._num_steps += 1
        for seq, count in zip(prompts, counts, strict=True):
            if count:
                seq.turn = self._num_steps
                batch.append((seq, count))
        return batch

    def _until(self, seq: Sequence) -> int:
        """How many tokens of a prompt a step may compute: all, or up to where its state is kept."""
        states = self.blocks.states
        return seq.num_remaining if states is None else states.until_kept(seq)

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

    def collect_guess(self, seq: Sequence, place: int) -> None:
        """The guess at ``place`` of a sequence was right: what was computed of it is in the cache."""
        seq.num_computed += 1
        if self.blocks.states is not None:
            self.blocks.states.keep_guessed(seq, seq.num_computed, place)
        self.collect(seq, seq.num_computed, seq.epoch)

    def settle(self, seq: Sequence, right: int) -> None:
        """The guesses of a sequence are checked: the first ``right`` were."""
        if self.blocks.states is not None:
            self.blocks.states.end_trail(seq, right)

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

    def _budget(self, decoding: list[Sequence], remaining: list[int], rows: int, most: int) -> int:
        """How many tokens of prompts this step computes beside ``rows``.

        Requests that come together are not read in the same step, and the first to decode would make all others wait
        for small chunks. So while everyone who decodes has just begun, prompts that one step could finish get half of
        each: so long an answer waits between its first tokens, and later ones do not. Whole steps would double that
        wait, and bring first tokens hardly sooner.
        """
        chunk = self.target.chunk(rows, most)
        if any(seq.num_output + seq.in_flight >= _JUST_BEGUN for seq in decoding):
            return chunk
        short = sum(count for count in remaining if count <= self.max_num_batched_tokens)
        return max(chunk, min(short, most, self.max_num_batched_tokens // 2))

    def _guess(self, decoding: list[Sequence]) -> int:
        """Give decoding sequences guesses to check, where slots are free -> how many tokens more that is."""
        if self.drafts is None:
            return 0
        count = 0
        room, states = self.max_num_batched_tokens - len(decoding), self.blocks.states
        for seq, guess in self.drafts.guesses(decoding, room, self.running):
            most = self.reach(seq, len(guess))
            if states is not None:
                most = states.begin_trail(seq, most)
            seq.guess = guess[:most]
            count += len(seq.guess)
        return count

    def reach(self, seq: Sequence, ahead: int) -> int:
        """Give a running sequence slots for up to ``ahead`` tokens that may follow, where some are left for others ->
        for how many it has them."""
        return self.blocks.reach(seq, ahead, leave=len(self.running))

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.free(seq)
        seq.status = Status.WAITING
        self.waiting[seq.seq_id] = seq
        self.waiting.move_to_end(seq.seq_id, last=False)
        self.num_preemptions += 1

    def _admit(self) -> list[Sequence]:
        """Waiting sequences that fit now. None overtakes one that lacks blocks: it would starve."""
        admitted: list[Sequence] = []
        room = self.max_num_seqs - len(self.running)
        for seq in self.waiting.values():
            if len(admitted) >= room:
                break
            if seq.held_back or self._is_begun_by_another(seq, admitted):
                continue
            # What the running ones will ask for in their next step, so that nobody is admitted in vain.
            busy = len(self.running) + len(admitted)
            if not self.blocks.admit(seq, reserve=busy // self.blocks.block_size + 1 if busy else 0):
                break
            admitted.append(seq)
        for seq in admitted:
            del self.waiting[seq.seq_id]
            self.on_admit(seq)
            seq.status = Status.RUNNING
            seq.turn = self._num_steps  # behind those that wait for theirs
            if seq.num_cached is None:
                seq.num_cached = seq.num_computed
            insort(self.running, seq, key=lambda s: s.seq_id)
        return admitted

    def _is_begun_by_another(self, seq: Sequence, admitted: list[Sequence]) -> bool:
        """Whether a prompt that is being computed begins as this one does and will be there sooner: then it waits for
        it, rather than that both compute the same."""
        if not self.blocks.prefix_caching:
            return False
        found = -1
        for other in (*self.running, *admitted):
            if other.root != seq.root or other.num_stored >= other.prompt_len:
                continue
            if found < 0:
                found = self.blocks.num_found(seq)
            size = self.blocks.block_size
            same = common_length(other.token_ids[: other.prompt_len], seq.token_ids[:-1]) // size * size
            if same >= max(found, other.num_stored) + _WORTH_WAITING:
                seq.ahead = Ahead(other, same, other.epoch)
                if self.blocks.states is not None:
                    self.blocks.states.plan(other, same)
                return True
        return False


def common_length(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # the first ``low`` are alike
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
