"""Choosing tokens by the kernels of csrc/: passes over the vocabulary on one thread, where torch would wake others that
then spin beside ours. Tokens are those of reference.choose."""

from __future__ import annotations

import math

import torch

from qwenrt.backends.cpu.kernels import Kernels
from qwenrt.ops import reference
from qwenrt.ops.steps import NOT_FINITE, Draw, DrawTensors, Vocabulary

# How many of the likeliest tokens are sorted first; the whole vocabulary only where they hold less than top_p.
_FIRST_SORTED = 1024
# By how much a share of the probabilities may differ between two ways to add them up, with a wide margin.
_SUMS_DIFFER = 1e-5


def choose(kernels: Kernels, logits: torch.Tensor, draws: list[Draw], vocabulary: Vocabulary) -> torch.Tensor:
    """As Backend.choose of logits float32, each row contiguous."""
    logits = logits[:, : vocabulary.size]
    seen = kernels.argmax_finite(logits)
    unused = vocabulary.unused_on(logits.device)
    if unused is not None and not all(
        draw.greedy and token not in vocabulary.unused
        for draw, (token, _, _) in zip(draws, seen, strict=True)
    ):
        finite = [ok for _, _, ok in seen]
        logits.index_fill_(1, unused, torch.finfo(logits.dtype).min)  # as good as none, and a number
        seen = [(*found[:2], ok) for found, ok in zip(kernels.argmax_finite(logits), finite, strict=True)]
    tokens = []
    for row, (draw, (token, largest, finite_row)) in enumerate(zip(draws, seen, strict=True)):
        if finite_row and not draw.greedy:
            token = _drawn(kernels, logits[row], largest, draw)
        tokens.append(token if finite_row else NOT_FINITE)
    return torch.tensor(tokens, dtype=torch.int64)


def _drawn(kernels: Kernels, row: torch.Tensor, largest: float, draw: Draw) -> int:
    """The token of one row [V], whose largest is ``largest``."""
    vocab = row.shape[0]
    wanted = draw.width(vocab)
    width = wanted if draw.top_k else min(wanted, _FIRST_SORTED)
    heat = max(draw.temperature, 1e-8)
    if not wanted or not math.isfinite(largest):
        return _by_definition(row, draw, wanted)
    found = kernels.topk(row, largest, heat, width, draw.top_k == 0 and draw.top_p < 1)
    if found is None:
        return _by_definition(row, draw, wanted)
    values, ids, whole = found
    count = _counted(values[0], whole, draw, width < wanted)
    if count is None:
        return _by_definition(row, draw, wanted)
    kept, order = ids[0, :count].sort()
    scaled = values[0, :count][order]
    mass = scaled.exp().double().masked_fill_(scaled < torch.tensor(draw.min_p).log(), 0.0)
    total = mass.cumsum(0)
    last = total[-1]
    goal = torch.minimum(draw.uniform * last, last.nextafter(torch.zeros_like(last)))
    place = min(int(torch.searchsorted(total, goal.unsqueeze(0), right=True)), count - 1)
    return int(kept[place])


def _counted(values: torch.Tensor, whole: float, draw: Draw, more: bool) -> int | None:
    """How many of a row's largest, as they fall, top_p keeps; None where that cannot be told: the cut lies behind them,
    or so near that another way to add them up would move it. ``whole``: the logsumexp of all, where top_k cuts none."""
    if draw.top_p >= 1:
        return len(values)
    mass = values.exp().double()
    share = mass.cumsum(0) - mass
    share = share / (float(mass.sum()) if draw.top_k else math.exp(whole))
    if bool(((share - draw.top_p).abs() < _SUMS_DIFFER).any()):
        return None
    count = max(1, int((share < draw.top_p).sum()))
    return None if count == len(values) and more else count


def _by_definition(row: torch.Tensor, draw: Draw, wanted: int) -> int:
    return int(reference.choose(row.unsqueeze(0), DrawTensors.of([draw], row.device), wanted))
