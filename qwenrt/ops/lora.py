"""The definitions of what adapters add, in plain torch: any device, differentiable. Products are float32.

A linear is changed by ``add_lora``, the embedding by ``adapted_embedding``, a head whose rows are replaced by
``adapted_logits``. No token's bits depend on the tokens beside it, but where that is the device's product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F

from qwenrt.ops.types import AdapterSpan, LoraPair, LoraSpan, StepAdapters, TokenRows

Span = TypeVar("Span", LoraSpan, AdapterSpan)

# BLAS multiplies fewer rows in other ways than many, whose last bits differ.
_FEWEST_ROWS = 16


def add_lora(
    y: torch.Tensor, x: torch.Tensor, spans: Sequence[LoraSpan], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K], y [T, N] = linear(x), the linear's ``bias`` [N] or None among it -> y as the spans' pairs make it of
    their rows (LoraPair), in y's dtype; the others' bits stay.

    A and B are multiplied and added in float32, and the sum is rounded once. ``spans`` rise and do not overlap.
    """
    return _replaced(y, spans, lambda span, here: _add_pairs(y[here], x[here], span.pairs, bias))


def _replaced(
    y: torch.Tensor, spans: Sequence[Span], new: Callable[[Span, slice], torch.Tensor]
) -> torch.Tensor:
    """y with ``new(span, rows)`` in the rows of each span."""
    pieces: list[torch.Tensor] = []
    at = 0
    for span in spans:
        pieces += [y[at : span.first], new(span, slice(span.first, span.last))]
        at = span.last
    whole = [piece for piece in (*pieces, y[at:]) if piece.shape[0]]
    return whole[0] if len(whole) == 1 else torch.cat(whole) if whole else y


def _add_pairs(
    y: torch.Tensor, x: torch.Tensor, pairs: tuple[LoraPair, ...], bias: torch.Tensor | None
) -> torch.Tensor:
    x32, y32, parts, at = x.float(), y.float(), [], 0
    for pair in pairs:
        own = y32[:, pair.rows]
        update = _low_rank(x32, pair)
        if pair.row_scale is not None:
            plain = own if bias is None else own - bias[pair.rows].float()
            update = (pair.row_scale - 1) * plain + pair.row_scale * update
        changed = own + update
        parts += [y32[:, at : pair.first], changed if pair.bias is None else changed + pair.bias]
        at = pair.rows.stop
    return torch.cat([*parts, y32[:, at:]], dim=1).to(y.dtype)


def _low_rank(x: torch.Tensor, pair: LoraPair) -> torch.Tensor:
    """scale * B(A x), x float32 [n, K] -> [n, rows]."""
    if pair.dropout:
        x = F.dropout(x, pair.dropout)
    return _product(_product(x, pair.a), pair.b) * pair.scale


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, K] weightᵀ, each row the same however many there are; rows are added where BLAS would choose by them."""
    n = x.shape[0]
    if n >= _FEWEST_ROWS or torch.is_grad_enabled() or x.device.type != "cpu":
        return F.linear(x, weight)
    return F.linear(F.pad(x, (0, 0, 0, _FEWEST_ROWS - n)), weight)[:n]


def adapted_embedding(x: torch.Tensor, token_ids: torch.Tensor, adapters: StepAdapters) -> torch.Tensor:
    """x [T, D], the embeddings of ``token_ids`` int64 [T], -> x as the tokens' adapters have it, in its dtype."""
    spans = [s for s in adapters.spans if s.adapter.embed is not None or s.adapter.embed_pair is not None]

    def embedded(span: AdapterSpan, here: slice) -> torch.Tensor:
        own, ids, changes, pair = x[here], token_ids[here], span.adapter.embed, span.adapter.embed_pair
        if changes is not None:
            own = _with_rows(own, ids, changes)
        if pair is not None:
            own = (own.float() + _product(F.embedding(ids, pair.a.t()), pair.b) * pair.scale).to(x.dtype)
        return own

    return _replaced(x, spans, embedded)


def _with_rows(own: torch.Tensor, ids: torch.Tensor, changes: TokenRows) -> torch.Tensor:
    if changes.ids is None:
        return F.embedding(ids, changes.rows).to(own.dtype)
    place = torch.searchsorted(changes.ids, ids).clamp(max=changes.ids.shape[0] - 1)
    found = (changes.ids[place] == ids).unsqueeze(1)
    return torch.where(found, F.embedding(place, changes.rows).to(own.dtype), own)


def adapted_logits(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    adapters: StepAdapters,
    name: str = "lm_head",
) -> torch.Tensor:
    """hidden [R, D], ``head``: from rows of it to their logits -> logits float32 [R, V] as the rows' adapters have
    them: by a head of their own, or by pairs for the linear ``name`` and single rows of their own."""
    kept = [s for s in adapters.spans if s.adapter.head is not None and s.adapter.head.ids is None]
    logits = _by_own_heads(hidden, head, kept) if kept else head(hidden).float()
    logits = add_lora(logits, hidden, adapters.of(name))
    some = [s for s in adapters.spans if s.adapter.head is not None and s.adapter.head.ids is not None]

    def with_rows(span: AdapterSpan, here: slice) -> torch.Tensor:
        changes = span.adapter.head
        assert changes is not None and changes.ids is not None
        new = _product(hidden[here].to(changes.rows.dtype), changes.rows)
        return logits[here].index_copy(1, changes.ids, new.float())

    return _replaced(logits, some, with_rows)


def _by_own_heads(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], kept: list[AdapterSpan]
) -> torch.Tensor:
    """The logits where the rows of ``kept`` have whole heads of their own: the model's is not asked about them."""
    between = list(zip([0, *(s.last for s in kept)], [*(s.first for s in kept), len(hidden)], strict=True))
    rest = torch.cat([hidden[first:last] for first, last in between])
    others = torch.split((head(rest) if len(rest) else rest).float(), [b - a for a, b in between])
    parts = []
    for span, before in zip(kept, others, strict=False):
        assert span.adapter.head is not None
        rows = span.adapter.head.rows
        parts += [before, _product(hidden[span.first : span.last].to(rows.dtype), rows).float()]
    return torch.cat([part for part in (*parts, others[-1]) if part.shape[0]])
