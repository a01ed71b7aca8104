"""The one place that knows how a step and a paged cache look: what ops over a cache are called with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qwenrt.backends.base import Backend
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, LayerKV, StepPlan


@dataclass(frozen=True)
class Sequences:
    """``lens``: of each sequence how many tokens it has now and in the cache. Its blocks lie anywhere."""

    lens: tuple[tuple[int, int], ...]
    block_size: int

    @property
    def num_blocks(self) -> int:
        return sum(-(-kv_len // self.block_size) for _, kv_len in self.lens) + 2

    @property
    def tables(self) -> list[list[int]]:
        order = list(range(self.num_blocks))
        random.Random(len(order)).shuffle(order)
        return [[order.pop() for _ in range(-(-kv_len // self.block_size))] for _, kv_len in self.lens]

    def slots(self) -> list[list[int]]:
        """Of each sequence where its tokens are, from its first one on."""
        size = self.block_size
        return [
            [table[p // size] * size + p % size for p in range(kv_len)]
            for (_, kv_len), table in zip(self.lens, self.tables, strict=True)
        ]


def over_cache(backend: Backend, sequences: Sequences) -> StepPlan:
    """What a backend makes of the step in which each sequence computes its last tokens."""
    now = [slots[len(slots) - q_len :] for (q_len, _), slots in zip(sequences.lens, sequences.slots())]
    lens = ([q for q, _ in sequences.lens], [n for _, n in sequences.lens])
    return StepPlan(*lens, slots_tensor(backend, [slot for slots in now for slot in slots]), sequences.tables)


def decode_plan(backend: Backend, sequences: Sequences) -> DecodePlan:
    """The same as a captured step has it, of sequences that compute one token each; behind the blocks of each stand
    others, of nobody or of another one."""
    width = max((len(table) for table in sequences.tables), default=0) + 1
    rows = [
        table + [sequences.num_blocks - 1 - len(table) % 2] * (width - len(table))
        for table in sequences.tables
    ]
    table = torch.tensor(rows, dtype=torch.int64, device=backend.device).view(-1, width)
    position = slots_tensor(backend, [n - 1 for _, n in sequences.lens])
    return DecodePlan(position, table, reference.decode_slots(table, position, sequences.block_size))


def to_slots(backend: Backend, slots: list[int], num_blocks: int) -> StepPlan:
    """A step of one sequence whose tokens go to any slots."""
    lens = [len(slots)]
    return StepPlan(lens, lens, slots_tensor(backend, slots), [list(range(num_blocks))])


def without_cache(lens: list[int], *, causal: bool = True) -> StepPlan:
    return StepPlan(lens, lens, causal=causal)


def slots_tensor(backend: Backend, slots: list[int]) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int64, device=backend.device)


def empty_cache(
    backend: Backend,
    num_blocks: int,
    block_size: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    *,
    int8: bool,
    fit: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> LayerKV:
    """A cache with NaN wherever a number can be NaN; ``heads``: (KVH, hd). ``fit``: offset and factor of keys."""
    kv = backend.alloc_kv(1, num_blocks, block_size, *heads, dtype, int8)[0]
    for tensor in kv.tensors:
        tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    if fit is not None:
        kv.k_offset, kv.k_factor = (x.to(backend.device) for x in fit)
    return kv


def contents(kv: LayerKV) -> dict[str, torch.Tensor]:
    """What a cache holds, by slot: [slots, ...]."""
    sides = {name: getattr(kv, name) for name in ("k", "v", "k_scale", "k_zero", "v_scale", "v_zero")}
    return {name: x.flatten(0, 1) for name, x in sides.items() if x is not None}


def put(kv: LayerKV, k: torch.Tensor, v: torch.Tensor, slots: list[int]) -> None:
    """Store as defined, computed on the CPU: each device then reads the same codes."""
    sides = (kv.k, kv.v, kv.k_scale, kv.k_zero, kv.v_scale, kv.v_zero)
    plain = LayerKV(*(None if x is None else x.cpu().clone() for x in sides))  # type: ignore[arg-type]
    reference.store_kv(k, v, plain, torch.tensor(slots, dtype=torch.int64))
    for into, values in zip(kv.paged, plain.paged, strict=True):
        into.copy_(values)


def attend(
    call: Callable[..., Any],
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kv: LayerKV | None,
    plan: StepPlan | DecodePlan,
    scale: float,
    window: int,
) -> torch.Tensor:
    """``call``: attention, or with a DecodePlan decode_attention."""
    given = qkv[:1] if isinstance(plan, DecodePlan) else qkv
    result: torch.Tensor = call(*given, kv, plan, scale, window)
    return result


def rotate_and_store(
    call: Callable[..., Any], args: tuple[Any, ...], kv: LayerKV | None, plan: StepPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = call(*args, kv, plan)
    return q, k, v
