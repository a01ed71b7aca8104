"""The definitions of what adapters add, in plain torch: any device, differentiable. Products are float32.

A linear is changed by ``add_lora``, the embedding by ``adapted_embedding``, a head whose rows are replaced by
``adapted_logits``. No token's bits depend on the tokens beside it, but where that is the device's product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

from qwenrt.ops.types import AdapterSpan, LoraPair, LoraSpan, StepAdapters, TokenRows

# BLAS multiplies fewer rows in other ways than many, whose last bits differ.
_FEWEST_ROWS = 16


def add_lora(
    y: torch.Tensor, x: torch.Tensor, spans: Sequence[LoraSpan], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K], y [T, N] = linear(x), the linear's ``bias`` [N] or None among it -> y as the spans' pairs make it of
    their rows (LoraPair), in y's dtype; the others' bits stay.

    A and B are multiplied and added in float32, and the sum is rounded once. ``spans`` rise and do not overlap.
    """
    out = y.clone()
    few: dict[int, list[LoraSpan]] = {}
    for span in spans:
        if _few(span.last - span.first, x):
            few.setdefault(id(span.pairs), []).append(span)
            continue
        rows = slice(span.first, span.last)
        out[rows] = _add_pairs(y[rows].float(), x[rows].float(), span.pairs, bias)
    for adapters in _alike(few.values()).values():
        index = _padded(tuple(tuple((span.first, span.last) for span in own) for own in adapters))
        x32, y32 = (t.index_select(0, index.flatten()).float().view(*index.shape, t.shape[1]) for t in (x, y))
        every = [own[0].pairs for own in adapters]
        new = _add_each(y32, x32, every) if len(every) > 1 else _add_pairs(y32[0], x32[0], every[0], bias)
        out.index_copy_(0, index.flatten(), new.view(-1, y.shape[1]).to(y.dtype))
    return out


def _alike(few: Iterable[list[LoraSpan]]) -> dict[object, list[list[LoraSpan]]]:
    """The spans of each adapter, put together where one batched product serves several: they have the same shapes and
    scales, and nothing but A and B."""
    groups: dict[object, list[list[LoraSpan]]] = {}
    for own in few:
        pairs = own[0].pairs
        plain = all(pair.row_scale is None and pair.bias is None for pair in pairs)
        key = tuple((pair.first, *pair.b.shape, pair.scale) for pair in pairs) if plain else id(pairs)
        groups.setdefault(key, []).append(own)
    return groups


@functools.lru_cache(maxsize=64)
def _padded(spans: tuple[tuple[tuple[int, int], ...], ...]) -> torch.Tensor:
    """The rows of each adapter's spans, int64 [g, n]: as many of each, by repeating its last. All linears of a step ask
    for the same, and mostly those of the next."""
    rows = [[row for first, last in own for row in range(first, last)] for own in spans]
    most = max(_FEWEST_ROWS, *map(len, rows))
    return torch.tensor([own + own[-1:] * (most - len(own)) for own in rows])


def _add_each(y: torch.Tensor, x: torch.Tensor, adapters: list[tuple[LoraPair, ...]]) -> torch.Tensor:
    """y [g, n, N] of x [g, n, K], both float32 -> as each of g adapters has it, whose pairs are alike."""
    y = y.clone()
    for pairs in zip(*adapters, strict=True):
        a, b = torch.stack([pair.a for pair in pairs]), torch.stack([pair.b.t() for pair in pairs])
        y[:, :, pairs[0].rows].baddbmm_(torch.bmm(x, a.transpose(1, 2)), b, alpha=pairs[0].scale)
    return y


def _few(rows: int, x: torch.Tensor) -> bool:
    """Whether BLAS would multiply so few rows of x otherwise, so that others are added."""
    return rows < _FEWEST_ROWS and x.device.type == "cpu" and not torch.is_grad_enabled()


def _add_pairs(
    y: torch.Tensor, x: torch.Tensor, pairs: tuple[LoraPair, ...], bias: torch.Tensor | None
) -> torch.Tensor:
    """y [n, N] of x [n, K], both float32 -> as ``pairs`` have it."""
    parts, at = [], 0
    for pair in pairs:
        own = y[:, pair.rows]
        seen = F.dropout(x, pair.dropout) if pair.dropout else x
        inner = F.linear(seen, pair.a)
        if pair.row_scale is None:
            changed = torch.addmm(own, inner, pair.b.t(), alpha=pair.scale)
        else:
            plain = own if bias is None else own - bias[pair.rows].float()
            update = F.linear(inner, pair.b) * pair.scale
            changed = own + ((pair.row_scale - 1) * plain + pair.row_scale * update)
        parts += [y[:, at : pair.first], changed if pair.bias is None else changed + pair.bias]
        at = pair.rows.stop
    whole = [part for part in (*parts, y[:, at:]) if part.shape[1]]
    return whole[0] if len(whole) == 1 else torch.cat(whole, dim=1)


def with_spans(
    y: torch.Tensor, spans: Sequence[AdapterSpan], new: Callable[[AdapterSpan, slice], torch.Tensor]
) -> torch.Tensor:
    """y with ``new(span, rows)`` in the rows of each span."""
    pieces: list[torch.Tensor] = []
    at = 0
    for span in spans:
        pieces += [y[at : span.first], new(span, slice(span.first, span.last))]
        at = span.last
    whole = [piece for piece in (*pieces, y[at:]) if piece.shape[0]]
    return whole[0] if len(whole) == 1 else torch.cat(whole) if whole else y


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, K] weightᵀ, each row the same however many there are."""
    n = len(x)
    if not _few(n, x):
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

    return with_spans(x, spans, embedded)


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

    return with_spans(logits, some, with_rows)


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
