"""The largest of each row of logits. Defined in ops/reference.py: choose, of draws that are all greedy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenrt.backends.cuda.kernels.launch import cdiv, launch, power
from qwenrt.ops.steps import NOT_FINITE


@triton.jit
def largest_of_part(
    logits_ptr,
    unused_ptr,
    values_ptr,
    ids_ptr,
    vocab,
    stride,
    parts,
    UNUSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one part of one row: its largest logit and the first id that has it; NaN where one is not finite, be its id
    used or not."""
    row, part = tl.program_id(0), tl.program_id(1)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=0.0)
    spoilt = tl.sum((logits - logits != 0.0).to(tl.int32), 0) > 0
    chosen = ids < vocab
    if UNUSED:
        chosen = chosen & (tl.load(unused_ptr + ids, mask=chosen, other=1) == 0)
    logits = tl.where(chosen, logits, -float("inf"))
    best = tl.max(logits, 0)
    first = tl.min(tl.where(logits == best, ids, vocab), 0)
    tl.store(values_ptr + row * parts + part, tl.where(spoilt, float("nan"), best))
    tl.store(ids_ptr + row * parts + part, first)


@triton.jit
def largest_of_row(values_ptr, ids_ptr, y_ptr, parts, vocab, none: tl.constexpr, BLOCK: tl.constexpr):
    """Of the parts of one row its token; ``none`` where a part has NaN."""
    row, part = tl.program_id(0), tl.arange(0, BLOCK)
    inside = part < parts
    values = tl.load(values_ptr + row * parts + part, mask=inside, other=-float("inf"))
    ids = tl.load(ids_ptr + row * parts + part, mask=inside, other=vocab)
    spoilt = tl.sum((values != values).to(tl.int32), 0) > 0
    best = tl.max(tl.where(values != values, -float("inf"), values), 0)
    first = tl.min(tl.where(inside & (values == best), ids, vocab), 0)
    tl.store(y_ptr + row, tl.where(spoilt, none, first).to(tl.int64))


def largest(logits: torch.Tensor, unused: torch.Tensor | None, elements: int) -> torch.Tensor:
    """logits float32 [R, V] -> int64 [R]. ``elements``: logits that a program looks at."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    parts = cdiv(vocab, elements)
    y = torch.empty(rows, dtype=torch.int64, device=logits.device)
    values = torch.empty(rows, parts, device=logits.device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    mask = None
    if unused is not None:
        mask = torch.zeros(vocab, dtype=torch.uint8, device=logits.device).index_fill_(0, unused, 1)
    args = (logits, y if mask is None else mask, values, ids, vocab, logits.stride(0), parts)
    launch(largest_of_part, (rows, parts), *args, UNUSED=mask is not None, BLOCK=elements)
    launch(largest_of_row, (rows,), values, ids, y, parts, vocab, none=NOT_FINITE, BLOCK=power(parts))
    return y
