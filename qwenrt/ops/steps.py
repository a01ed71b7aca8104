"""What flows in a step: what the host decides about it, and what the ops read while it is computed."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import torch

from qwenrt.ops.types import LoraSpan, StepAdapters

NOT_FINITE = -1  # in place of a chosen token: its logits were not finite
FROM_BEFORE = -1  # in place of a token id: the device has it, the host does not know it yet


@dataclass(frozen=True)
class Draw:
    """How a token is chosen from its logits where that depends on nothing else: the largest at ``temperature`` 0, else
    after top_k (0: all), top_p and min_p by ``uniform`` in [0, 1), which is known before the logits."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def width(self, vocab: int) -> int:
        """How many of the likeliest of ``vocab`` tokens have to be sorted for it: 0 where none has."""
        if self.greedy or (self.top_k == 0 and self.top_p == 1):
            return 0
        return min(self.top_k or vocab, vocab)


@dataclass(frozen=True)
class Step:
    """The host's half of a step over B sequences and T flat tokens: plain numbers, the same for every device.

    ``q_lens``, ``kv_lens`` [B]: tokens of each sequence computed now, and in the cache after this step (history
    included). ``tables``: block ids of each. ``ntk_alphas`` [B]: NTK factors. ``token_ids`` [T]; FROM_BEFORE where the
    token is what the step before chose in its row ``fed`` [B] of logits (-1: none is). ``logit_rows``: the tokens, by
    their place in the step, whose logits are wanted, rising; ``draws``: how each of these R rows becomes a token, None
    where the host chooses from the logits. ``state_slots`` [B]: where layers of linear attention keep each sequence's
    state; ``state_copies``, ``states_kept``: (from, to) of the states to copy before the step and after it. All three
    are empty for a model without such layers. ``state_trails`` [B], or empty where no sequence has guesses: where those
    layers write the state after each of a sequence's last tokens, which are guesses; the one before them is in its own
    slot. ``adapters`` [B]: the number of each sequence's adapter, 0 where it has none; empty where none has.
    """

    q_lens: list[int]
    kv_lens: list[int]
    tables: list[list[int]]
    ntk_alphas: list[int]
    token_ids: list[int]
    logit_rows: list[int] = field(default_factory=list)
    draws: list[Draw | None] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    state_slots: list[int] = field(default_factory=list)
    state_copies: list[tuple[int, int]] = field(default_factory=list)
    states_kept: list[tuple[int, int]] = field(default_factory=list)
    state_trails: list[list[int]] = field(default_factory=list)
    adapters: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_decode(self) -> bool:
        """Whether each sequence computes one token, whose logits are wanted."""
        return self.num_tokens == len(self.q_lens) == len(self.logit_rows) > 0

    def slots(self, block_size: int) -> list[int]:
        """Where the keys and values of each token go in a paged cache [T]."""
        return [
            table[p // block_size] * block_size + p % block_size
            for table, q_len, kv_len in zip(self.tables, self.q_lens, self.kv_lens, strict=True)
            for p in range(kv_len - q_len, kv_len)
        ]


@dataclass(frozen=True)
class RotaryRows:
    """What the positions of a step's tokens do to queries and keys: rows of cos and sin [T, rotary_dim] float32, and
    LogN's factors of the queries [T] float32, or None where there are none."""

    cos: torch.Tensor
    sin: torch.Tensor
    q_scale: torch.Tensor | None = None


@dataclass
class StepPlan:
    """One step over a batch of B sequences and T flat tokens, as every layer is told. Lengths are the host's.

    ``q_lens``, ``kv_lens``: tokens of each sequence computed now, and in the cache after this step (history
    included); sum(q_lens) == T. Token j of sequence b has position kv_lens[b] - q_lens[b] + j.
    ``slots`` int64 [T]: where each token's key and value go. ``block_table``: per sequence, its block ids. A plan
    without a cache (``slots is None``) attends over the step's own tokens only: training, `logits()` and embeddings;
    there ``causal`` may be False, and each token sees all of its sequence. ``state_slots``: per sequence, where layers
    of linear attention keep its state; ``state_trails``: where that after each of its last tokens goes (Step).
    ``adapters``: which tokens have one, None where none has. ``made``: what a backend made of the plan for the first
    layer, for the others.
    """

    q_lens: list[int]
    kv_lens: list[int]
    slots: torch.Tensor | None = None
    block_table: list[list[int]] = field(default_factory=list)
    causal: bool = True
    state_slots: list[int] = field(default_factory=list)
    state_trails: list[list[int]] = field(default_factory=list)
    adapters: StepAdapters | None = None
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def spans_of(self, linear: str) -> tuple[LoraSpan, ...]:
        """What adapters add to a linear, by its name; empty where it stays the model's own."""
        return () if self.adapters is None else self.adapters.of(linear)

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def has_history(self) -> bool:
        return any(q != kv for q, kv in zip(self.q_lens, self.kv_lens, strict=True))

    @cached_property
    def trail(self) -> list[TrailPart]:
        """Where states are written after each of several tokens: the step in parts that leave one each, in order; empty
        where there are none."""
        if not any(self.state_trails):
            return []
        ends, first = (
            list(accumulate(self.q_lens)),
            [q - len(trail) for q, trail in zip(self.q_lens, self.state_trails, strict=True)],
        )
        lens = list(zip(ends, self.q_lens, self.kv_lens, first, strict=True))
        rows = [row for end, q, _, own in lens for row in range(end - q, end - q + own)]
        known = [kv - q + own for _, q, kv, own in lens]
        parts = [TrailPart(self._rows(rows), self._for_states(first, known, self.state_slots))]
        for place in range(max(map(len, self.state_trails))):
            here = [b for b, trail in enumerate(self.state_trails) if place < len(trail)]
            trails = [[self.state_slots[b], *self.state_trails[b]] for b in here]
            slots = [trail[place + 1] for trail in trails]
            plan = self._for_states([1] * len(here), [known[b] + place + 1 for b in here], slots)
            rows = [ends[b] - len(self.state_trails[b]) + place for b in here]
            parts.append(TrailPart(self._rows(rows), plan, [(t[place], t[place + 1]) for t in trails]))
        return parts

    @staticmethod
    def _for_states(q_lens: list[int], kv_lens: list[int], slots: list[int]) -> StepPlan:
        return StepPlan(q_lens, kv_lens, block_table=[[] for _ in slots], state_slots=slots)

    def _rows(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=None if self.slots is None else self.slots.device)

    @cached_property
    def ragged(self) -> Ragged:
        """The lists as arrays, made once for all layers."""
        first_tokens, first_blocks, blocks, token = array("q"), array("q"), array("q"), 0
        for q_len, table in zip(self.q_lens, self.block_table, strict=True):
            first_tokens.append(token)
            first_blocks.append(len(blocks))
            blocks.extend(table)
            token += q_len
        return Ragged(first_tokens, array("q", self.q_lens), array("q", self.kv_lens), first_blocks, blocks)


@dataclass(frozen=True)
class TrailPart:
    """Some of a step's tokens, int64 ``rows`` of it: at most one more of each sequence that has guesses. Before them
    ``copies`` (from, to) of states are made, then each goes on in its slot."""

    rows: torch.Tensor
    plan: StepPlan
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Ragged:
    """A plan's lists as int64 arrays on the host: of each sequence its first token, lengths and first place in
    ``blocks``, where the tables follow each other."""

    first_tokens: array[int]
    q_lens: array[int]
    kv_lens: array[int]
    first_blocks: array[int]
    blocks: array[int]


@dataclass(frozen=True)
class DecodePlan:
    """One step that computes one token of each of B sequences, as every layer is told. All of it lies on the device.

    ``position`` int64 [B]: of the token; its sequence's cache holds position + 1 tokens after the step. ``table`` int64
    [B, W]: block ids, whatever stands behind those in use. ``slots`` int64 [B]: where keys and values go. ``states``
    int64 [B]: where layers of linear attention keep each sequence's state; None in a model without such layers.
    ``made``: as of StepPlan.
    """

    position: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor
    states: torch.Tensor | None = None
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    adapters: ClassVar[None] = None  # no token of a captured step has one

    def spans_of(self, linear: str) -> tuple[LoraSpan, ...]:
        """As StepPlan.spans_of."""
        return ()


@dataclass(frozen=True)
class DrawTensors:
    """Draws of R rows on the device: float32 [R] each, but ``top_k`` int64 and ``uniform`` float64."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor

    @classmethod
    def of(cls, draws: list[Draw], device: torch.device) -> DrawTensors:
        """Each draw a row."""

        def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor([getattr(draw, name) for draw in draws], dtype=dtype, device=device)

        return cls(
            column("temperature"),
            column("top_k", torch.int64),
            column("top_p"),
            column("min_p"),
            column("uniform", torch.float64),
        )

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        """Each of the five."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.uniform

    def first(self, rows: int) -> DrawTensors:
        """The first rows, the same memory."""
        return DrawTensors(*(column[:rows] for column in self.columns))


@dataclass(frozen=True)
class Vocabulary:
    """Which ids may be chosen: those below ``size`` (rows of the embedding behind it are padding) that are not
    ``unused`` (they lie in gaps of an extended vocabulary and have no token)."""

    size: int
    unused: frozenset[int] = frozenset()
    _sent: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def unused_on(self, device: torch.device) -> torch.Tensor | None:
        """``unused`` in order, int64, sent to a device once; None where there are none."""
        if self.unused and device not in self._sent:
            self._sent[device] = torch.tensor(sorted(self.unused), dtype=torch.int64, device=device)
        return self._sent.get(device)


@dataclass
class LayerKV:
    """One layer's paged cache. Slot s lives at block s // block_size, row s % block_size.

    ``k``, ``v`` [num_blocks, block_size, num_kv_heads, head_dim] in the activation dtype, or uint8 codes with
    ``k_scale``, ``k_zero``, ``v_scale``, ``v_zero`` float32 [num_blocks, block_size, num_kv_heads]:
    x = scale * code + zero (zero is the smallest value of that token and head). Or the same codes less 128, int8, with
    zero in steps: x = scale * (code + zero), where a device computes it so; scales and zeros may then lie transposed.
    ``k_offset``, ``k_factor`` float32 [num_kv_heads, head_dim], beside codes only: x then is (k - k_offset) / k_factor
    of a rotated key k, and the query that reads it is multiplied by k_factor (reference.fit_to_codes).
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    k_zero: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    v_zero: torch.Tensor | None = None
    k_offset: torch.Tensor | None = None
    k_factor: torch.Tensor | None = None

    @property
    def quantized(self) -> bool:
        return self.k_scale is not None

    @property
    def block_size(self) -> int:
        return int(self.k.shape[1])

    @property
    def paged(self) -> list[torch.Tensor]:
        """What is kept of each block: [num_blocks, ...] contiguous."""
        every = (self.k, self.v, self.k_scale, self.k_zero, self.v_scale, self.v_zero)
        return [x if x.is_contiguous() else x.transpose(1, 2) for x in every if x is not None]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it consists of."""
        return self.paged + [x for x in (self.k_offset, self.k_factor) if x is not None]


@dataclass
class LayerState:
    """What a layer of linear attention keeps of each sequence, by its slot; a slot of no sequence holds anything.

    ``conv`` [slots, K - 1, C] in the activation dtype: of the last tokens what goes into the convolution over K.
    ``delta`` float32 [slots, num_value_heads, key_dim, value_dim]: the matrices of the delta rule.
    """

    conv: torch.Tensor
    delta: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it consists of."""
        return [self.conv, self.delta]

    def copy(self, source: int, target: int) -> None:
        """One slot's state to another."""
        for tensor in self.tensors:
            tensor[target].copy_(tensor[source])


LayerCache = LayerKV | LayerState
