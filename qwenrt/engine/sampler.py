"""From logits to tokens: penalties, truncation, and a draw that depends on nothing but the request.

The order: ids past the real vocabulary cut off; log-probabilities taken for who asked; logit_bias;
repetition, presence and frequency penalties; ids banned before min_tokens; then the likeliest token, or
temperature, top_k, top_p, min_p and a draw.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass

import torch

from qwenrt.engine.sequence import Sequence
from qwenrt.outputs import TokenLogprob
from qwenrt.sampling_params import SamplingParams

# How many of the likeliest tokens are sorted first; the whole vocabulary only where they hold less than top_p.
_FIRST_SORTED = 1024


@dataclass
class Sampled:
    """One step's outcome, in the order of the rows. A token is None where its logits were not finite."""

    token_ids: list[int | None]
    logprobs: list[TokenLogprob | None]


class Sampler:
    """Keeps what each sequence's sampling needs between steps: its random numbers and its token counts.

    ``vocab_limit``: ids from here on are padding of the embedding and never drawn.
    """

    def __init__(self, vocab_limit: int | None = None) -> None:
        self.vocab_limit = vocab_limit
        self._randoms: dict[int, random.Random] = {}
        self._counts: dict[int, TokenCounts] = {}

    @torch.no_grad()
    def sample(self, logits: torch.Tensor, seqs: list[Sequence]) -> Sampled:
        """logits float32 [B, V], a row per sequence; they may be changed."""
        logits = logits[:, : self.vocab_limit]
        finite = logits.sum(-1).isfinite()
        wants_logprobs = [i for i, seq in enumerate(seqs) if seq.params.logprobs is not None]
        raw = logits[wants_logprobs] if wants_logprobs else None
        for row, seq in enumerate(seqs):
            if _edits(seq):
                self._edit(logits[row], seq)
        tokens = logits.argmax(-1)
        drawn = [i for i, seq in enumerate(seqs) if not seq.params.greedy]
        if drawn:
            params = [seqs[i].params for i in drawn]
            uniforms = [self._random(seqs[i]).random() for i in drawn]
            rows = logits if len(drawn) == len(seqs) else logits[drawn]
            tokens[drawn] = draw(rows, params, uniforms)
        chosen = torch.where(finite, tokens, -1).tolist()
        logprobs: list[TokenLogprob | None] = [None] * len(seqs)
        if raw is not None:
            reported = [chosen[i] for i in wants_logprobs]
            alternatives = [seqs[i].params.logprobs or 0 for i in wants_logprobs]
            for i, one in zip(wants_logprobs, _logprobs(raw, reported, alternatives), strict=True):
                logprobs[i] = one
        return Sampled([None if token < 0 else token for token in chosen], logprobs)

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
        row[ids] = values

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
    scaled = (logits - logits.amax(-1, keepdim=True)) / heat
    floor = torch.zeros(len(params), 1, device=device) - torch.inf
    if any(p.top_k or p.top_p < 1 for p in params):
        floor = _top_k_top_p_floor(scaled, params)
    if any(p.min_p for p in params):
        floor = torch.maximum(
            floor, torch.tensor([p.min_p for p in params], device=device).log().unsqueeze(1)
        )
    probs = scaled.masked_fill_(scaled < floor, -torch.inf).softmax(-1)
    total = probs.cumsum(-1, dtype=torch.float64)
    whole = total[:, -1:]
    target = torch.tensor(uniforms, dtype=torch.float64, device=device).unsqueeze(1) * whole
    # A product rounded up to the whole would point behind the last token.
    target = torch.minimum(target, whole.nextafter(torch.zeros_like(whole)))
    return torch.searchsorted(total, target, right=True).squeeze(1)


def _top_k_top_p_floor(scaled: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The smallest scaled logit that top_k and then top_p keep in each row -> [B, 1]."""
    vocab = scaled.shape[1]
    top_ks = [min(p.top_k, vocab) if p.top_k else vocab for p in params]
    bounded = [k for k in top_ks if k < vocab]
    width = max(bounded, default=1)
    if any(p.top_p < 1 and k > width for p, k in zip(params, top_ks, strict=True)):
        width = min(vocab, max(width, _FIRST_SORTED))
    while True:
        floor, enough = _floor_within(scaled, params, top_ks, width)
        if enough:
            return floor
        width = vocab


def _floor_within(
    scaled: torch.Tensor, params: list[SamplingParams], top_ks: list[int], width: int
) -> tuple[torch.Tensor, bool]:
    """The floor found among the ``width`` likeliest, and whether they were enough to find it."""
    device, vocab = scaled.device, scaled.shape[1]
    best = scaled.topk(width, dim=-1).values
    ks = torch.tensor(top_ks, device=device).unsqueeze(1)
    rank = torch.arange(width, device=device).unsqueeze(0)
    within = best.masked_fill(rank >= ks, -torch.inf)
    # The mass top_p is a share of: of the k kept by top_k, or of the whole row.
    whole = torch.where(ks < vocab, within.logsumexp(-1, keepdim=True), scaled.logsumexp(-1, keepdim=True))
    probs = (within - whole).exp()
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device).unsqueeze(1)
    kept = (((before < top_p) | (top_p >= 1)) & (rank < ks)).sum(-1, keepdim=True).clamp_(min=1)
    unlimited = (ks >= vocab) & (top_p >= 1)
    floor = best.gather(1, kept - 1).masked_fill(unlimited, -torch.inf)
    enough = width == vocab or not bool(((kept == width) & (ks > width) & ~unlimited).any())
    return floor, enough


def _logprobs(raw: torch.Tensor, chosen: list[int], alternatives: list[int]) -> list[TokenLogprob | None]:
    """Log-probabilities of the model itself, before any bias, penalty or temperature. raw [R, V]."""
    whole = raw.logsumexp(-1)
    safe = torch.tensor([max(token, 0) for token in chosen], device=raw.device)
    own = (raw.gather(1, safe.unsqueeze(1)).squeeze(1) - whole).tolist()
    width = min(max(alternatives), raw.shape[1])
    values, ids = raw.topk(width, dim=-1)
    top_values, top_ids = (values - whole.unsqueeze(1)).tolist(), ids.tolist()
    return [
        TokenLogprob(token, own[i], dict(zip(top_ids[i][:count], top_values[i][:count], strict=True)))
        if token >= 0
        else None
        for i, (token, count) in enumerate(zip(chosen, alternatives, strict=True))
    ]
