"""From logits to tokens: penalties, truncation, and a draw that depends on nothing but the request.

The order: ids past the real vocabulary cut off, those in its gaps ruled out; log-probabilities taken for who
asked; logit_bias; repetition, presence and frequency penalties; ids banned before min_tokens; then the
likeliest token, or temperature, top_k, top_p, min_p and a draw.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from qwenrt.backends.base import Backend
from qwenrt.engine.sequence import Sequence
from qwenrt.outputs import TokenLogprob
from qwenrt.sampling_params import SamplingParams

# How many of the likeliest tokens are sorted first; the whole vocabulary only where they hold less than top_p.
_FIRST_SORTED = 1024
# By how much a sum of probabilities may differ between two ways to add them up, with a wide margin.
_SUMS_DIFFER = 1e-5

Seen = tuple[int, float, bool]  # of a row: its first largest, that logit, whether all are finite


@dataclass
class Sampled:
    """One step's outcome, in the order of the rows. A token is None where its logits were not finite."""

    token_ids: list[int | None]
    logprobs: list[TokenLogprob | None]


class Sampler:
    """Keeps what each sequence's sampling needs between steps: its random numbers and its token counts.

    ``vocab_limit``: ids from here on are padding of the embedding and never drawn; ``absent``: nor are these
    below it, which have no token. What ``backend`` does better than torch it does; tokens are the same.
    """

    def __init__(
        self, vocab_limit: int | None = None, absent: Iterable[int] = (), backend: Backend | None = None
    ) -> None:
        self.vocab_limit = vocab_limit
        self._absent = torch.tensor(list(absent), dtype=torch.int64)
        self._absent_ids = frozenset(self._absent.tolist())
        self._backend = backend
        self._randoms: dict[int, random.Random] = {}
        self._counts: dict[int, TokenCounts] = {}

    @torch.no_grad()
    def sample(self, logits: torch.Tensor, seqs: list[Sequence]) -> Sampled:
        """logits float32 [B, V], a row per sequence; they may be changed."""
        logits = logits[:, : self.vocab_limit]
        seen = self._look(logits)
        if seen is not None and self._settled(seen, seqs):
            return Sampled([token if ok else None for token, _, ok in seen], [None] * len(seqs))
        if seen is None:
            finite = logits.sum(-1).isfinite()
        else:
            finite = torch.tensor([ok for _, _, ok in seen], device=logits.device)
        if len(self._absent):
            seen = None  # of what is changed now
            self._absent = self._absent.to(logits.device)
            logits.index_fill_(1, self._absent, -torch.inf)
        raw: dict[int, torch.Tensor] = {}
        for row, seq in enumerate(seqs):
            edits = _edits(seq)
            if seq.params.logprobs is not None:
                raw[row] = logits[row].clone() if edits else logits[row]
            if edits:
                seen = None
                self._edit(logits[row], seq)
        chosen = torch.where(finite, self._choose(logits, seqs, seen), -1).tolist()
        logprobs: list[TokenLogprob | None] = [None] * len(seqs)
        for row, own in raw.items():
            if chosen[row] >= 0:
                logprobs[row] = _logprob(own, chosen[row], seqs[row].params.logprobs or 0)
        return Sampled([None if token < 0 else token for token in chosen], logprobs)

    def _look(self, logits: torch.Tensor) -> list[Seen] | None:
        """Each row as the backend sees it in one pass, or None where it has none."""
        return None if self._backend is None else self._backend.likeliest(logits)

    def _settled(self, seen: list[Seen], seqs: list[Sequence]) -> bool:
        """Whether these are the tokens already: the likeliest of rows that nothing changes."""
        return self._absent_ids.isdisjoint(token for token, _, _ in seen) and all(map(_plain, seqs))

    def _choose(self, logits: torch.Tensor, seqs: list[Sequence], seen: list[Seen] | None) -> torch.Tensor:
        """The likeliest token of greedy rows, a drawn one of the others -> int64 [B]."""
        drawn = [i for i, seq in enumerate(seqs) if not seq.params.greedy]
        if not drawn:
            return logits.argmax(-1)
        tokens = logits.new_empty(len(seqs), dtype=torch.int64)
        greedy = [i for i, seq in enumerate(seqs) if seq.params.greedy]
        if greedy:
            tokens[greedy] = logits[greedy].argmax(-1)
        # One by one on a CPU, where a row's temporaries stay in its cache; together where a launch costs more.
        together = 1 if logits.device.type == "cpu" else len(drawn)
        for start in range(0, len(drawn), together):
            rows = drawn[start : start + together]
            uniforms = [self._random(seqs[i]).random() for i in rows]
            if len(rows) == 1 and self._backend is not None:
                i = rows[0]
                found = seen[i : i + 1] if seen is not None else self._look(logits[i : i + 1])
                largest = found[0][1] if found else math.nan
                token = _draw_one(self._backend, logits[i], largest, seqs[i].params, uniforms[0])
                if token is not None:
                    tokens[i] = token
                    continue
            tokens[rows] = draw(logits[rows], [seqs[i].params for i in rows], uniforms)
        return tokens

    def forget(self, seq: Sequence) -> None:
        """A finished sequence needs no state."""
        self._randoms.pop(seq.seq_id, None)
        self._counts.pop(seq.seq_id, None)

    def _random(self, seq: Sequence) -> random.Random:
        source = self._randoms.get(seq.seq_id)
        if source is None:
            seed = seq.params.seed
            number = secrets.randbits(64) if seed is None else (seed + seq.index) % 2**64
            source = self._randoms[seq.seq_id] = random.Random(number)
        return source

    def _edit(self, row: torch.Tensor, seq: Sequence) -> None:
        """logit_bias, penalties and the ban on stopping early, in place on one row [V]."""
        params, limit = seq.params, row.shape[0]
        if params.logit_bias:
            items = [(token, value) for token, value in params.logit_bias.items() if token < limit]
            ids = torch.tensor([token for token, _ in items], dtype=torch.int64, device=row.device)
            row.index_add_(0, ids, torch.tensor([v for _, v in items], dtype=row.dtype, device=row.device))
        if _penalises(params):
            counts = self._counts.get(seq.seq_id)
            if counts is None:
                counts = self._counts[seq.seq_id] = TokenCounts(limit, row.device)
            counts.penalise(row, seq)
        if seq.banned_until_min and seq.num_output < params.min_tokens:
            banned = [token for token in seq.banned_until_min if token < limit]
            row[torch.tensor(banned, dtype=torch.int64, device=row.device)] = -torch.inf


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _plain(seq: Sequence) -> bool:
    """Whether its token is the likeliest one, and nothing else is asked."""
    return seq.params.greedy and seq.params.logprobs is None and not _edits(seq)


def _edits(seq: Sequence) -> bool:
    params = seq.params
    return (
        bool(params.logit_bias)
        or _penalises(params)
        or (params.min_tokens > seq.num_output and bool(seq.banned_until_min))
    )


class TokenCounts:
    """The distinct tokens of a sequence and how often each was written: grown by what is new since last time.

    ``limit``: a prompt may hold ids from here on, the padding of the embedding; they have no logit to change.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self._limit = limit
        self._place: dict[int, int] = {}
        self._read = 0
        self._ids = torch.zeros(0, dtype=torch.int64, device=device)
        self._written = torch.zeros(0, device=device)

    def penalise(self, row: torch.Tensor, seq: Sequence) -> None:
        """Change the logits [V] of the tokens seen so far, in place.

        Repetition divides a positive logit and multiplies a negative one, for tokens of prompt or output;
        presence and frequency are subtracted for tokens of the output, once and per occurrence.
        """
        self._catch_up(seq)
        params = seq.params
        used = len(self._place)
        ids, written = self._ids[:used], self._written[:used]
        values = row[ids]
        penalty = params.repetition_penalty
        if penalty != 1:
            values = torch.where(values > 0, values / penalty, values * penalty)
        values = values - (written > 0) * params.presence_penalty - written * params.frequency_penalty
        # Divided by a tiny penalty, several could be infinite, and no draw could tell them apart.
        row[ids] = values.clamp(max=torch.finfo(values.dtype).max)

    def _catch_up(self, seq: Sequence) -> None:
        new = seq.token_ids[self._read :]
        fresh = dict.fromkeys(t for t in new if t < self._limit and t not in self._place)
        if fresh:
            start = len(self._place)
            self._place.update((token, start + i) for i, token in enumerate(fresh))
            self._reserve(len(self._place))
            self._ids[start : len(self._place)] = torch.tensor(list(fresh), device=self._ids.device)
        output = seq.token_ids[max(self._read, seq.prompt_len) :]
        written = [self._place[t] for t in output if t < self._limit]
        if written:
            places = torch.tensor(written, device=self._ids.device)
            self._written.index_add_(0, places, torch.ones(len(written), device=self._ids.device))
        self._read = len(seq.token_ids)

    def _reserve(self, size: int) -> None:
        if size > self._ids.shape[0]:
            more = max(256, 2 * size) - self._ids.shape[0]
            self._ids = torch.cat((self._ids, self._ids.new_zeros(more)))
            self._written = torch.cat((self._written, self._written.new_zeros(more)))


def draw(logits: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> torch.Tensor:
    """One token per row -> int64 [B]. logits float32 [B, V]; ``uniforms`` in [0, 1).

    The kept tokens' probabilities are summed in the order of their ids, and the token where the sum passes
    the row's uniform is taken: a last-bit difference in the logits can hardly change it, a neighbour in the
    batch not at all.
    """
    device = logits.device
    heat = torch.tensor([max(p.temperature, 1e-8) for p in params], device=device).unsqueeze(1)
    # The largest becomes 0 first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(heat)
    target = torch.tensor(uniforms, dtype=torch.float64, device=device).unsqueeze(1)
    vocab = logits.shape[1]
    # A row's tokens must not depend on its neighbours, not even which of two equal ones is kept: rows are
    # looked at together only where they need as many of their likeliest tokens.
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(params):
        wanted = p.top_k or (_FIRST_SORTED if p.top_p < 1 else vocab)
        groups.setdefault(min(wanted, vocab), []).append(i)
    chosen = torch.empty(len(params), dtype=torch.int64, device=device)
    for width, rows in groups.items():
        limits = [params[i] for i in rows]
        every = len(rows) == len(params)
        some, goal = (scaled, target) if every else (scaled[rows], target[rows])
        if all(p.top_k == 0 and p.top_p == 1 for p in limits):
            chosen[rows] = _at(some, limits, goal).squeeze(1)
        else:
            chosen[rows] = _draw_likeliest(some, limits, goal, width)
    return chosen


def _at(scaled: torch.Tensor, params: list[SamplingParams], target: torch.Tensor) -> torch.Tensor:
    """Where the running sum of each row's softmax, after min_p, passes ``target`` [B, 1] of the whole
    -> int64 [B, 1]. The largest of ``scaled`` is 0."""
    if any(p.min_p for p in params):
        floor = torch.tensor([p.min_p for p in params], device=scaled.device).log().unsqueeze(1)
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    total = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    whole = total[:, -1:]
    # A product rounded up to the whole would point behind the last token.
    target = torch.minimum(target * whole, whole.nextafter(torch.zeros_like(whole)))
    # Of a row with NaN, whose token nobody asks for, the place may lie anywhere.
    return torch.searchsorted(total, target, right=True).clamp_(max=scaled.shape[1] - 1)


def _draw_likeliest(
    scaled: torch.Tensor, params: list[SamplingParams], target: torch.Tensor, width: int
) -> torch.Tensor:
    """`draw` for rows that top_k or top_p cut: only the ``width`` likeliest are looked at, or more where top_p
    reaches further."""
    kept, ids, enough = _keep(scaled, params, width)
    ids, order = ids.sort(dim=-1)
    chosen = ids.gather(1, _at(kept.gather(1, order), params, target)).squeeze(1)
    rows = [i for i, ok in enumerate(enough) if not ok]
    if rows:
        wider = min(scaled.shape[1], 32 * width)
        chosen[rows] = _draw_likeliest(scaled[rows], [params[i] for i in rows], target[rows], wider)
    return chosen


def _keep(
    scaled: torch.Tensor, params: list[SamplingParams], width: int
) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """The ``width`` likeliest of each row, those that top_k and then top_p drop at -inf, and their ids; and for
    each row whether that is all there is to keep."""
    best, ids = scaled.topk(width, dim=-1)
    kept, _, enough = _cut(best, params, scaled.shape[1], lambda: scaled.logsumexp(-1, keepdim=True))
    return kept, ids, enough


def _cut(
    best: torch.Tensor, params: list[SamplingParams], vocab: int, whole_row: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """``best`` [B, width], the likeliest of ``vocab`` tokens as they fall, with those dropped at -inf; the mass before
    each, [B, width] float64; and for each row whether that is all there is to keep. ``whole_row``: the logsumexp of
    each row [B, 1]."""
    device, width = best.device, best.shape[1]
    ks = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=device).unsqueeze(1)
    rank = torch.arange(width, device=device).unsqueeze(0)
    best = best.masked_fill(rank >= ks, -torch.inf)
    # The mass top_p is a share of: of the k kept by top_k, or of the whole row.
    whole = best.logsumexp(-1, keepdim=True)
    if not all(p.top_k for p in params):
        whole = torch.where(ks < vocab, whole, whole_row())
    probs = (best - whole).exp()
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device).unsqueeze(1)
    dropped = (before >= top_p) & (top_p < 1) & (rank > 0)
    enough: list[bool] = (dropped[:, -1] | (ks.squeeze(1) <= width)).tolist()
    return best.masked_fill(dropped, -torch.inf), before, enough


def _draw_one(
    backend: Backend, row: torch.Tensor, largest: float, params: SamplingParams, uniform: float
) -> int | None:
    """`draw` for one row [V] from what the backend finds; None where it cannot tell, above all where the cut falls
    between equal values, of which topk's choice counts."""
    vocab = row.shape[0]
    width = min(params.top_k or _FIRST_SORTED, vocab)
    if (params.top_k == 0 and params.top_p == 1) or not math.isfinite(largest):
        return None
    more = min(width + 1, vocab)
    found = backend.top(row, largest, max(params.temperature, 1e-8), more, params.top_k == 0)
    if found is None:
        return None
    values, ids, whole = found
    best, ids = values[:, :width], ids[:, :width]
    kept, before, enough = _cut(best, [params], vocab, lambda: torch.tensor([[whole]]))
    if not enough[0]:
        return None
    if params.top_p < 1 and bool(((before - params.top_p).abs() < _SUMS_DIFFER).any()):
        return None
    count = int(kept.isfinite().sum())
    if count < more and bool(values[0, count - 1] == values[0, count]):
        return None
    ids, order = ids.sort(dim=-1)
    target = torch.tensor([[uniform]], dtype=torch.float64)
    return int(ids.gather(1, _at(kept.gather(1, order), [params], target)))


def _logprob(raw: torch.Tensor, chosen: int, alternatives: int) -> TokenLogprob:
    """Log-probabilities of the model itself, before any bias, penalty or temperature. raw [V]."""
    values, ids = raw.topk(min(alternatives, raw.shape[0]))
    whole = float(raw.logsumexp(-1))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    top = {token: value - whole for token, value in pairs if value > -torch.inf}
    return TokenLogprob(chosen, float(raw[chosen]) - whole, top)
