"""From a scheduled batch to a step, and to the stack that computes it; whole texts without a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.stack import Outcome, StackParts
from qwenrt.engine.kv_cache import KVCache
from qwenrt.engine.sequence import Sequence
from qwenrt.engine.states import States
from qwenrt.model.qwen import Qwen
from qwenrt.model.rotary import ntk_alpha
from qwenrt.ops.steps import FROM_BEFORE, Draw, Step, StepPlan, Vocabulary
from qwenrt.ops.types import AdapterSpan, AdapterWeights, StepAdapters

DrawOf = Callable[..., Draw | None]  # of a sequence, and how many guesses are before the token


class ModelRunner:
    """Runs one model over one paged cache. ``depth``: how many steps may be under way when the next one is begun, 0 or
    1."""

    def __init__(
        self,
        model: Qwen,
        backend: Backend,
        cache: KVCache,
        vocabulary: Vocabulary,
        *,
        max_num_seqs: int,
        max_model_len: int,
        depth: int | None = None,
        states: States | None = None,
        adapters: Mapping[int, AdapterWeights] | None = None,
    ) -> None:
        self.model, self.backend, self.cache, self._states = model, backend, cache, states
        self.depth = backend.depth if depth is None else depth
        self._adapters = {} if adapters is None else adapters
        parts = StackParts(
            model,
            cache.layers,
            vocabulary,
            max_num_seqs,
            max_model_len,
            cache.spare_blocks,
            cache.spare_state,
            self._adapters,
        )
        self.stacks = backend.stacks(parts)
        backend.note_wholes(self.stacks)
        self._last: tuple[dict[int, int], Outcome] | None = None  # rows of the step before, by sequence

    @torch.no_grad()
    def launch(self, batch: list[tuple[Sequence, int]], draw_of: DrawOf) -> tuple[Outcome, list[Draw | None]]:
        """Begin to compute the scheduled tokens of each sequence: their keys and values are stored, and of each
        sequence whose tokens are then all computed the next one is chosen, as ``draw_of`` says, and the one after each
        of its guesses -> the outcome, a row for each of these in order, and how each is drawn."""
        step, rows = self.step_of(batch, draw_of)
        stack = next(stack for stack in self.stacks if stack.why_not(step) is None)
        before = None if self._last is None else self._last[1]
        self._last = None
        outcome = stack.run(step, before)
        if self.depth:
            self._last = rows, outcome
        return outcome, step.draws

    def step_of(self, batch: list[tuple[Sequence, int]], draw_of: DrawOf) -> tuple[Step, dict[int, int]]:
        """A batch in numbers, and the row of logits of each sequence that gets a token; those after its guesses
        follow."""
        ids: list[int] = []
        logit_rows: list[int] = []
        draws: list[Draw | None] = []
        rows: dict[int, int] = {}
        fed: list[int] = []
        for seq, count in batch:
            start, end = seq.num_computed, seq.num_computed + count
            ids.extend(seq.token_ids[start:end])
            fed.append(-1)
            if end > len(seq.token_ids):
                assert self._last is not None and end == len(seq.token_ids) + 1
                ids.append(FROM_BEFORE)
                fed[-1] = self._last[0][seq.seq_id]
            if end == seq.num_known:
                rows[seq.seq_id] = len(logit_rows)
                logit_rows.append(len(ids) - 1)
                draws.append(draw_of(seq))
                for ahead, token in enumerate(seq.guess, 1):
                    ids.append(token)
                    logit_rows.append(len(ids) - 1)
                    draws.append(draw_of(seq, ahead))
        step = Step(
            [count + len(seq.guess) for seq, count in batch],
            [seq.num_computed + count + len(seq.guess) for seq, count in batch],
            [seq.block_table for seq, _ in batch],
            [seq.ntk_alpha for seq, _ in batch],
            ids,
            logit_rows,
            draws,
            fed,
            *self._states_of(batch),
            adapters=[seq.adapter for seq, _ in batch] if any(seq.adapter for seq, _ in batch) else [],
        )
        return step, rows

    def _states_of(
        self, batch: list[tuple[Sequence, int]]
    ) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]], list[list[int]]]:
        """Of a step, where each sequence's state is, which are copied before and after it, and where those after each
        guess go."""
        if self._states is None:
            return [], [], [], []
        kept = [self._states.keep(seq, seq.num_computed + count) for seq, count in batch]
        copies = self._states.take_copies()
        slots, trails = [seq.state_slot for seq, _ in batch], [list(seq.trail) for seq, _ in batch]
        return slots, copies, [copy for copy in kept if copy is not None], trails if any(trails) else []

    @torch.no_grad()
    def logits(self, token_ids: list[int], adapter: AdapterWeights | None = None) -> torch.Tensor:
        """One prefill of a whole text without the cache -> float32 [num_tokens, vocab_size] on the CPU."""
        n = len(token_ids)
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self.backend.device)
        plan = self._cacheless([n], adapter)
        hidden = self.model.forward(ids, plan, [ntk_alpha(n, self.model.config)])
        return self.model.logits(hidden, plan.adapters).cpu()

    @torch.no_grad()
    def hidden(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """One prefill of several texts without the cache -> the final states of each, [its tokens, D]."""
        lens = [len(prompt) for prompt in prompts]
        ids = torch.tensor([i for p in prompts for i in p], dtype=torch.int64, device=self.backend.device)
        alphas = [ntk_alpha(n, self.model.config) for n in lens]
        return list(torch.split(self.model.forward(ids, self._cacheless(lens), alphas), lens))

    @torch.no_grad()
    def first_overflow(self, token_ids: list[int], alpha: int, adapter: int = 0) -> str:
        """The part of the network after which the numbers of a text stop being finite, found by computing it again;
        ``adapter``: with that one, by number."""
        n = len(token_ids)
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self.backend.device)
        plan = self._cacheless([n], self._adapters[adapter] if adapter else None)
        for name, hidden in self.model.states(ids, plan, [alpha]):
            if not bool(torch.isfinite(hidden).all()):
                return name
        return "lm_head"

    def _cacheless(self, lens: list[int], adapter: AdapterWeights | None = None) -> StepPlan:
        """``adapter``: of all tokens."""
        spans = None if adapter is None else StepAdapters((AdapterSpan(adapter, 0, sum(lens)),))
        return StepPlan(lens, lens, causal=self.model.config.is_causal, adapters=spans)
