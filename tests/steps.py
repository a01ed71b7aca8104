"""Steps by hand: what a runner would make of a batch, for tests of stacks and models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwenrt.backends.stack import Outcome, StackParts
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import Draw, LayerCache, Step, Vocabulary


def step_of(
    ids: list[int],
    q_lens: list[int],
    kv_lens: list[int],
    tables: list[list[int]],
    ntk_alphas: list[int] | None = None,
    rows: list[int] | None = None,
    state_slots: list[int] | None = None,
) -> Step:
    """A step whose logits are wanted of all tokens, or of ``rows``; their tokens are the likeliest."""
    rows = list(range(len(ids))) if rows is None else rows
    draws: list[Draw | None] = [Draw()] * len(rows)
    fed = [-1] * len(q_lens)
    return Step(
        q_lens, kv_lens, tables, ntk_alphas or [1] * len(q_lens), ids, rows, draws, fed, state_slots or []
    )


@torch.no_grad()
def run_step(
    model: Qwen,
    kv: Sequence[LayerCache],
    ids: list[int],
    q_lens: list[int],
    kv_lens: list[int],
    tables: list[list[int]],
    ntk_alphas: list[int] | None = None,
    rows: list[int] | None = None,
    seams: bool = False,
    state_slots: list[int] | None = None,
) -> Outcome:
    """One step by the best stack of a model over a cache, or by the seams."""
    parts = StackParts(model, kv, Vocabulary(model.config.vocab_size), len(q_lens), 1 << 16)
    stacks = model.backend.stacks(parts)
    step = step_of(ids, q_lens, kv_lens, tables, ntk_alphas, rows, state_slots)
    return stacks[-1 if seams else 0].run(step)
