"""One completion on its way through the engine: its tokens, its blocks, how far it has come."""

from __future__ import annotations

from enum import Enum

from qwenrt.sampling_params import SamplingParams


class Status(Enum):
    """Where a sequence is: waiting for room, running, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The tokens of one completion, prompt first, and the cache blocks that hold their keys and values.

    ``alpha`` is the NTK factor, chosen from the whole prompt and never changed: cached keys were rotated with
    it. ``seq_id`` grows with arrival. ``leader``: the completion of the same prompt to wait for, so that its
    blocks can be shared. ``num_computed`` counts the tokens whose keys and values are in the cache;
    ``num_committed`` the full blocks offered for sharing and ``chain`` the identity of the last of them.
    ``banned_until_min`` are the ids that may not be drawn before ``params.min_tokens``.
    """

    __slots__ = (
        "alpha",
        "banned_until_min",
        "block_table",
        "chain",
        "index",
        "leader",
        "num_cached",
        "num_committed",
        "num_computed",
        "params",
        "prompt_len",
        "request_id",
        "seq_id",
        "status",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        alpha: int = 1,
        request_id: str = "",
        index: int = 0,
        leader: Sequence | None = None,
        banned_until_min: tuple[int, ...] = (),
    ) -> None:
        self.seq_id, self.request_id, self.index = seq_id, request_id, index
        self.token_ids = list(prompt_token_ids)
        self.prompt_len = len(prompt_token_ids)
        self.params, self.alpha, self.leader = params, alpha, leader
        self.banned_until_min = banned_until_min
        self.status = Status.WAITING
        self.num_cached: int | None = None  # prompt tokens found in the cache at first admission
        self.block_table: list[int]
        self.reset()

    def reset(self) -> None:
        """Nothing of it is in the cache any more: the next admission computes its tokens anew."""
        self.block_table = []
        self.num_computed = 0
        self.num_committed = 0
        self.chain: int | tuple[int, ...] = (self.alpha,)

    @property
    def num_output(self) -> int:
        """Tokens written so far."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not computed yet: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed

    @property
    def held_back(self) -> bool:
        """Whether it waits for its leader to compute the prompt they share."""
        leader = self.leader
        return (
            leader is not None
            and leader.status is not Status.FINISHED
            and leader.num_computed < leader.prompt_len
        )
