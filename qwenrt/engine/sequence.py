"""One completion on its way through the engine: its tokens, its blocks, how far it has come."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from qwenrt.engine.accounts import Marks
from qwenrt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qwenrt.engine.constraint import Constraint

# What a block's identity begins with: the block before it, by its uid; or at the start of a text what all of its keys
# and values depend on besides its tokens, and whom it may be shared with.
Link = int | tuple[int, str, int]


class Status(Enum):
    """Where a sequence is: waiting for room, running, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class Ahead:
    """Another prompt, in its ``epoch``, whose first ``tokens`` are those of one that waits for them."""

    seq: Sequence
    tokens: int
    epoch: int

    @property
    def is_computing(self) -> bool:
        """Whether these tokens are still to come."""
        seq = self.seq
        return seq.status is Status.RUNNING and seq.epoch == self.epoch and seq.num_stored < self.tokens


class Sequence:
    """The tokens of one completion, prompt first, and the cache blocks that hold their keys and values.

    ``ntk_alpha`` is the NTK factor, chosen from the whole prompt and never changed: cached keys were rotated with
    it. ``adapter``: the number of its adapter's load, 0 where it has none. ``seq_id`` grows with arrival. ``leader``:
    the completion of the same prompt to wait for, so that its blocks can be shared. ``max_len``: tokens, prompt
    included, at which it ends whatever they are. ``seed``: of its draws. ``banned_until_min`` are the ids that may not
    be drawn before ``params.min_tokens``. ``constraint``: what a grammar lets it say; it has taken the tokens of
    ``token_ids`` after the prompt.

    A step that computes its tokens may still be under way: ``num_computed`` counts the tokens whose keys and values are
    in the cache when all steps are done, ``num_stored`` those of steps that are; ``in_flight`` the tokens that steps
    under way are choosing, which follow ``token_ids``. ``num_committed`` counts the full blocks offered for sharing,
    ``chain`` is the identity of the last of them, `root` before the first. ``epoch`` changes
    whenever its cache is given up, ``course`` whenever tokens are put in the place of those under way: what a step of
    an earlier course chooses is dropped. ``num_forced`` of its tokens were not drawn; they count for no limit of the
    caller's. ``marks``: when it came how far. ``turn`` is the last step that computed some of its prompt,
    ``ahead`` a prompt that begins alike and is computed first; ``is_read`` says that its beginning is being read from
    the disk. ``guess``: tokens that may follow, which the next step checks.

    In a model with layers of linear attention ``state_slot`` says where its state is (-1: nowhere), ``kept_at`` after
    how many tokens that is to be kept, ``snapshots`` what steps under way keep: (tokens, slot); ``last_kept`` is the
    block of its answer whose state was kept last; ``trail``: where those after each of its guesses are being written.
    """

    __slots__ = (
        "adapter",
        "ahead",
        "banned_until_min",
        "block_table",
        "chain",
        "constraint",
        "course",
        "epoch",
        "guess",
        "in_flight",
        "index",
        "is_read",
        "kept_at",
        "last_kept",
        "leader",
        "marks",
        "max_len",
        "ntk_alpha",
        "num_cached",
        "num_committed",
        "num_computed",
        "num_forced",
        "num_stored",
        "params",
        "prompt_len",
        "request_id",
        "seed",
        "seq_id",
        "snapshots",
        "state_slot",
        "status",
        "token_ids",
        "trail",
        "turn",
    )

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        ntk_alpha: int = 1,
        adapter: int = 0,
        request_id: str = "",
        index: int = 0,
        leader: Sequence | None = None,
        banned_until_min: tuple[int, ...] = (),
        max_len: int = 2**31,
        seed: int | None = None,
        arrived: float = 0.0,
        constraint: Constraint | None = None,
    ) -> None:
        self.seq_id, self.request_id, self.index = seq_id, request_id, index
        self.token_ids = list(prompt_token_ids)
        self.prompt_len = len(prompt_token_ids)
        self.params, self.ntk_alpha, self.leader = params, ntk_alpha, leader
        self.adapter = adapter
        self.banned_until_min, self.max_len = banned_until_min, max_len
        self.constraint = constraint
        self.seed = secrets.randbits(64) if seed is None else seed
        self.in_flight = self.epoch = self.course = self.num_forced = self.turn = 0
        self.marks = Marks(arrived)
        self.ahead: Ahead | None = None
        self.status = Status.WAITING
        self.num_cached: int | None = None  # prompt tokens found in the cache at first admission
        self.block_table: list[int]
        self.state_slot: int
        self.last_kept: int | None
        self.kept_at: list[int]
        self.snapshots: list[tuple[int, int]]
        self.trail: list[int]
        self.reset()

    def reset(self) -> None:
        """Nothing of it is in the cache any more: the next admission computes its tokens anew."""
        self.block_table = []
        self.num_computed = self.num_stored = 0
        self.num_committed = 0
        self.is_read = False
        self.guess: list[int] = []
        self.state_slot, self.last_kept = -1, None
        self.kept_at, self.snapshots, self.trail = [], [], []
        self.epoch += 1
        self.chain: Link = self.root

    def drop_in_flight(self) -> None:
        """The tokens under way are not wanted: others come in their place."""
        self.course += 1
        self.in_flight = 0

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def root(self) -> tuple[int, str, int]:
        """What has to be alike, beside their tokens, where two sequences share blocks."""
        return (self.ntk_alpha, self.params.cache_salt, self.adapter)

    @property
    def num_output(self) -> int:
        """Tokens written so far."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_remaining(self) -> int:
        """Tokens that are not computed yet: 1 while decoding, more while prefilling."""
        return self.num_known - self.num_computed

    @property
    def num_known(self) -> int:
        """Tokens of it that there are, those that steps under way are choosing included."""
        return len(self.token_ids) + self.in_flight

    @property
    def ends_here(self) -> bool:
        """Whether the tokens under way are its last ones, whatever they are."""
        return self.in_flight > 0 and self.num_known >= self.max_len

    @property
    def held_back(self) -> bool:
        """Whether it waits: for a token of its own that a step is choosing, or for another to compute what they
        share."""
        leader = self.leader
        led = leader is not None and leader.status is not Status.FINISHED
        if led and leader is not None and leader.num_stored < leader.prompt_len:
            return True
        return self.in_flight > 0 or (self.ahead is not None and self.ahead.is_computing)
