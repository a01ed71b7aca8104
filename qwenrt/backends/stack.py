"""One step of a model as a whole: whoever computes one is a Stack, and its result an Outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from qwenrt.config.layers import BLOCK_SIZE
from qwenrt.ops.steps import (
    FROM_BEFORE,
    NOT_FINITE,
    DecodePlan,
    Draw,
    DrawTensors,
    LayerCache,
    LayerKV,
    LayerState,
    RotaryRows,
    Step,
    StepPlan,
    Vocabulary,
)
from qwenrt.ops.types import AdapterSpan, AdapterWeights, Head, LayerWeights, StepAdapters


class DecodeLayers(Protocol):
    """All layers of a step that decodes at once, of up to ``most`` rows."""

    most: int

    def logits(
        self, x: torch.Tensor, rotary: RotaryRows, plan: DecodePlan, cache: Sequence[LayerCache]
    ) -> torch.Tensor:
        """The residual stream before the layers [T, D] -> logits float32 [T, V]; no less capturable than the seams."""


class Device(Protocol):
    """What a stack asks of its backend beside the ops; qwenrt.backends.base.Backend says what each is."""

    device: torch.device

    def send(self, values: list[int] | np.ndarray) -> torch.Tensor: ...

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]: ...

    def choose(self, logits: torch.Tensor, draws: list[Draw], vocabulary: Vocabulary) -> torch.Tensor: ...

    def choose_rows(
        self, logits: torch.Tensor, draw: DrawTensors | None, width: int, unused: torch.Tensor | None
    ) -> torch.Tensor: ...

    def decode_layers(self, network: Network) -> DecodeLayers | None: ...


class Network(Protocol):
    """What a stack sees of a model: its weights, and its parts op by op."""

    dtype: torch.dtype
    head: Head

    @property
    def vocab_size(self) -> int:
        """Rows of the head, padding included."""

    @property
    def layer_weights(self) -> Sequence[LayerWeights]:
        """Every decoder layer's."""

    def bind_decode(self) -> str | None:
        """Make `run_layers` serve DecodePlan as well -> why it cannot, or None."""

    def embed(self, token_ids: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """int64 [T] -> the residual stream before the layers [T, D]."""

    def rotary(self, plan: StepPlan, ntk_alphas: list[int]) -> RotaryRows:
        """The rows of a step's tokens."""

    def rotary_table(self, length: int) -> RotaryTable:
        """The rows of every position below ``length``, for all NTK factors that sequences of such a length have."""

    def run_layers(
        self,
        x: torch.Tensor,
        rotary: RotaryRows,
        plan: StepPlan | DecodePlan,
        kv: Sequence[LayerCache] | None,
    ) -> torch.Tensor:
        """The residual stream before the layers -> after them [T, D], op by op."""

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layers -> hidden states [T, D]."""

    def logits(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """[R, D] -> float32 [R, vocab_size]; ``adapters``: of these rows."""


@dataclass(frozen=True)
class RotaryTable:
    """Rows of RotaryRows on the device: those of NTK factor a begin at ``first[a]``; LogN's by position, or None."""

    rows: RotaryRows
    first: dict[int, int]


@dataclass(frozen=True)
class StackParts:
    """What stacks are made for: a model, its cache, and the largest step."""

    network: Network
    cache: Sequence[LayerCache]
    vocabulary: Vocabulary
    max_rows: int  # sequences computed together
    max_model_len: int  # tokens of a sequence
    # of the cache, max_rows that no sequence ever owns, or none
    spare_blocks: list[int] = field(default_factory=list)
    # a slot of states that no sequence ever owns, where there are spare blocks and states
    spare_state: int = 0
    # those that are loaded now, by the numbers that steps name them by
    adapters: Mapping[int, AdapterWeights] = field(default_factory=dict)

    @property
    def block_size(self) -> int:
        """Slots of a block; any number where no layer keeps keys and values."""
        return next((layer.block_size for layer in self.cache if isinstance(layer, LayerKV)), BLOCK_SIZE)


@dataclass(frozen=True)
class Outcome:
    """What a step gave: of each of its R rows of logits the chosen token, which may still be being computed.

    ``chosen`` int64 [R] on the device, NOT_FINITE where a row was not finite, nothing of meaning where the step's draw
    was None. ``fetched`` waits for them alone and gives them on the host. ``logits`` float32 [R, V] last until the next
    step. ``served_by``: the stack that computed it. ``stream`` [T, D]: what left the layers, before the final norm, of
    every token of the step; None where the stack keeps none.
    """

    chosen: torch.Tensor
    fetched: Callable[[], torch.Tensor]
    logits: torch.Tensor
    served_by: Stack
    stream: torch.Tensor | None = None

    def tokens(self) -> list[int | None]:
        """Waits for the device; None for a row that was not finite."""
        return [None if token == NOT_FINITE else token for token in self.fetched().tolist()]


class Stack(Protocol):
    """Computes whole steps of one model over its cache."""

    name: str

    def why_not(self, step: Step) -> str | None:
        """The reason it does not serve a step, as data; None where it does."""

    def note(self) -> str:
        """What `LLM.explain` says of it as things are now, or nothing."""

    def run(self, step: Step, before: Outcome | None = None) -> Outcome:
        """Begin to compute a step it serves: store keys and values, choose tokens. ``before``: the step before, whose
        tokens may be this one's input. What `run` needs of the step it has read when it returns."""


class SeamStack:
    """A step op by op, through the seams of a backend: it serves everything, on any device."""

    name = "seams"

    def __init__(self, backend: Device, parts: StackParts) -> None:
        self._backend, self._parts = backend, parts

    def why_not(self, step: Step) -> str | None:
        return None

    def note(self) -> str:
        return ""

    def run(self, step: Step, before: Outcome | None = None) -> Outcome:
        backend, network = self._backend, self._parts.network
        plan = plan_of(backend, step, self._parts.block_size)
        plan.adapters = adapters = adapters_of(step, self._parts.adapters)
        copy_states(self._parts.cache, step.state_copies)
        x = network.embed(token_ids(backend, step, before), adapters)
        x = network.run_layers(x, network.rotary(plan, step.ntk_alphas), plan, self._parts.cache)
        copy_states(self._parts.cache, step.states_kept)
        stream = x
        if len(step.logit_rows) < step.num_tokens:
            x = x.index_select(0, backend.send(step.logit_rows))
            adapters = None if adapters is None else adapters.at(step.logit_rows)
        logits = network.logits(network.final_norm(x), adapters) if step.logit_rows else x
        outcome = chosen_from(self, backend, logits, step.draws, self._parts.vocabulary)
        return replace(outcome, stream=stream)


def copy_states(cache: Sequence[LayerCache], copies: list[tuple[int, int]]) -> None:
    """States of sequences, (from, to) slot, in every layer that keeps one."""
    for source, target in copies:
        for layer in cache:
            if isinstance(layer, LayerState):
                layer.copy(source, target)


def plan_of(backend: Device, step: Step, block_size: int) -> StepPlan:
    """What the layers are told of a step, its slots on the device."""
    slots = backend.send(step.slots(block_size))
    return StepPlan(
        step.q_lens,
        step.kv_lens,
        slots,
        step.tables,
        state_slots=step.state_slots,
        state_trails=step.state_trails,
    )


def adapters_of(step: Step, loaded: Mapping[int, AdapterWeights]) -> StepAdapters | None:
    """Which tokens of a step have which adapter; None where none has."""
    spans, first = [], 0
    for number, q_len in zip(step.adapters, step.q_lens, strict=False):
        if number:
            spans.append(AdapterSpan(loaded[number], first, first + q_len))
        first += q_len
    return StepAdapters(tuple(spans)) if spans else None


def token_ids(backend: Device, step: Step, before: Outcome | None) -> torch.Tensor:
    """A step's tokens int64 [T] on the device, those of the step before among them."""
    ids = backend.send(step.token_ids)
    if FROM_BEFORE not in step.token_ids:
        return ids
    assert before is not None
    source = [0] * step.num_tokens
    place = 0
    for row, q_len in zip(step.fed, step.q_lens, strict=True):
        if row >= 0:
            source[place + q_len - 1] = row
        place += q_len
    fed = before.chosen.index_select(0, backend.send(source)).clamp(min=0)
    return torch.where(ids == FROM_BEFORE, fed, ids)


def chosen_from(
    stack: Stack, backend: Device, logits: torch.Tensor, draws: list[Draw | None], vocabulary: Vocabulary
) -> Outcome:
    """The outcome of a step by its logits float32 [R, V]: rows that have a draw are chosen by it, the host chooses the
    others."""
    own = [i for i, draw in enumerate(draws) if draw is not None]
    asked = [draw for draw in draws if draw is not None]
    if len(own) == len(draws):
        chosen = backend.choose(logits, asked, vocabulary) if draws else torch.empty(0, dtype=torch.int64)
        return Outcome(chosen, backend.fetch(chosen), logits, stack)
    chosen = torch.zeros(len(draws), dtype=torch.int64, device=logits.device)
    if own:
        index = backend.send(own)
        chosen[index] = backend.choose(logits.index_select(0, index), asked, vocabulary)
    return Outcome(chosen, backend.fetch(chosen), logits, stack)
