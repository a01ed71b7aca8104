"""From a scheduled step to logits: flat tensors in, one row per sequence that is due a token out."""

from __future__ import annotations

import torch

from qwenrt.backends.base import Backend
from qwenrt.engine.kv_cache import KVCache
from qwenrt.engine.sequence import Sequence
from qwenrt.model.qwen import Qwen
from qwenrt.model.rotary import ntk_alpha
from qwenrt.ops.types import StepPlan


class ModelRunner:
    """Runs one model over one paged cache."""

    def __init__(self, model: Qwen, backend: Backend, cache: KVCache) -> None:
        self.model, self.backend, self.cache = model, backend, cache

    @torch.no_grad()
    def step(self, batch: list[tuple[Sequence, int]]) -> torch.Tensor | None:
        """Compute the scheduled tokens of each sequence and store their keys and values.

        -> float32 logits [R, vocab_size], a row for each sequence whose tokens are then all computed, in the
        batch's order; None where every sequence is still within its prompt.
        """
        token_ids, plan, alphas, due = self._prepare(batch)
        return self.model.next_logits(token_ids, plan, alphas, self.cache.layers, due)

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """One prefill of a whole text without the cache -> float32 [num_tokens, vocab_size] on the CPU."""
        n = len(token_ids)
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self.backend.device)
        hidden = self.model.forward(ids, self._cacheless([n]), [ntk_alpha(n, self.model.config)])
        return self.model.logits(hidden).cpu()

    @torch.no_grad()
    def hidden(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """One prefill of several texts without the cache -> the final states of each, [its tokens, D]."""
        lens = [len(prompt) for prompt in prompts]
        ids = torch.tensor([i for p in prompts for i in p], dtype=torch.int64, device=self.backend.device)
        alphas = [ntk_alpha(n, self.model.config) for n in lens]
        return list(torch.split(self.model.forward(ids, self._cacheless(lens), alphas), lens))

    @torch.no_grad()
    def first_overflow(self, token_ids: list[int], alpha: int) -> str:
        """The part of the network after which the numbers of a text stop being finite, found by computing it again."""
        n = len(token_ids)
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self.backend.device)
        for name, hidden in self.model.states(ids, self._cacheless([n]), [alpha]):
            if not bool(torch.isfinite(hidden).all()):
                return name
        return "lm_head"

    def _cacheless(self, lens: list[int]) -> StepPlan:
        return StepPlan(lens, lens, causal=self.model.config.is_causal)

    def _prepare(
        self, batch: list[tuple[Sequence, int]]
    ) -> tuple[torch.Tensor, StepPlan, list[int], list[int]]:
        size = self.cache.block_size
        ids: list[int] = []
        slots: list[int] = []
        due: list[int] = []
        for seq, count in batch:
            start, end, table = seq.num_computed, seq.num_computed + count, seq.block_table
            ids.extend(seq.token_ids[start:end])
            slots.extend(table[p // size] * size + p % size for p in range(start, end))
            if end == len(seq.token_ids):
                due.append(len(ids) - 1)
        plan = self.backend.plan(
            [count for _, count in batch],
            [seq.num_computed + count for seq, count in batch],
            [seq.block_table for seq, _ in batch],
            slots,
        )
        token_ids = torch.tensor(ids, dtype=torch.int64, device=self.backend.device)
        return token_ids, plan, [seq.alpha for seq, _ in batch], due
