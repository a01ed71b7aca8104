"""From logits to tokens: penalties, truncation, and a draw that depends on nothing but the request.

The order: ids past the real vocabulary cut off, those in its gaps ruled out; log-probabilities taken for who
asked; logit_bias; repetition, presence and frequency penalties; ids banned before min_tokens; then the
what a grammar rules out; then the likeliest token, or temperature, top_k, top_p, min_p and a draw (ops/reference.py,
`choose`). Rows that need only the last part are chosen where their logits are computed; here are the others.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import torch

from qwenrt.backends.base import Backend
from qwenrt.engine.constraint import Allowed
from qwenrt.engine.sequence import Sequence
from qwenrt.ops.steps import NOT_FINITE, Draw, Vocabulary
from qwenrt.outputs import TokenLogprob
from qwenrt.sampling_params import SamplingParams

_COLDEST = 1e-8  # a temperature below draws the likeliest token, so that float32's smallest numbers make no difference


@dataclass
class Sampled:
    """What the host chose, in the order of the rows. A token is None where its logits were not finite."""

    token_ids: list[int | None]
    logprobs: list[TokenLogprob | None]


class Sampler:
    """How each sequence's next token is chosen: by a Draw wherever that depends on its logits alone, else here.

    It keeps the token counts of sequences with penalties.
    """

    def __init__(self, vocabulary: Vocabulary, backend: Backend) -> None:
        self._vocabulary, self._backend = vocabulary, backend
        self._counts: dict[int, TokenCounts] = {}

    def draw_of(self, seq: Sequence, ahead: int = 0) -> Draw | None:
        """How its next token is chosen, or the one ``ahead`` of it; None where that takes more than its logits:
        `sample` does."""
        params = seq.params
        if params.logprobs is not None or _edits(seq):
            return None
        constraint = seq.constraint
        if constraint is not None and (seq.in_flight or not constraint.free):
            return None
        return _draw(seq, ahead)

    @torch.no_grad()
    def guess(self, logits: torch.Tensor, seqs: list[Sequence], aheads: list[int]) -> list[int]:
        """What each sequence's token, so many ``aheads`` of its next one, would be by other logits than the model's
        own (float32 [B, V]; they may be changed): by the number that it will be drawn by, and with bias and penalties
        as far as its text has come. NOT_FINITE as `choose` gives it."""
        for row, seq in enumerate(seqs):
            if _edits(seq):
                self._edit(logits[row, : self._vocabulary.size], seq)
        if any(_edits(seq) for seq in seqs):
            logits.clamp_(min=torch.finfo(logits.dtype).min)
        draws = [_draw(seq, ahead) for seq, ahead in zip(seqs, aheads, strict=True)]
        return self._backend.choose(logits, draws, self._vocabulary).tolist()

    @torch.no_grad()
    def sample(self, logits: torch.Tensor, seqs: list[Sequence]) -> Sampled:
        """logits float32 [B, V], a row per sequence; they may be changed."""
        logits = logits[:, : self._vocabulary.size]
        held = [row for row, seq in enumerate(seqs) if _only_held(seq)]
        if not held:
            return self._edited(logits, seqs)
        if len(held) == len(seqs):
            return Sampled(self._held(logits, seqs), [None] * len(seqs))
        others = [row for row in range(len(seqs)) if row not in held]
        found = self._edited(logits[others], [seqs[row] for row in others])
        tokens = dict(zip(others, found.token_ids, strict=True))
        tokens.update(zip(held, self._held(logits[held], [seqs[row] for row in held]), strict=True))
        logprobs = dict(zip(others, found.logprobs, strict=True))
        rows = range(len(seqs))
        return Sampled([tokens[row] for row in rows], [logprobs.get(row) for row in rows])

    def _held(self, logits: torch.Tensor, seqs: list[Sequence]) -> list[int | None]:
        """Tokens of rows that nothing but a grammar changes. Where it leaves few, only these are looked at."""
        tokens: list[int | None] = [None] * len(seqs)
        whole: list[int] = []
        for row, seq in enumerate(seqs):
            allowed = None if seq.constraint is None else seq.constraint.allowed()
            if allowed is not None and not allowed.but and self._backend.depth == 0:
                tokens[row] = self._among(logits[row], allowed.ids, seq)
                continue
            if allowed is not None:
                self._rule_out(logits[row], allowed)
            whole.append(row)
        if whole:
            rows = logits if len(whole) == len(seqs) else logits[whole]
            chosen = self._backend.choose(rows, [_draw(seqs[row]) for row in whole], self._vocabulary)
            for row, token in zip(whole, chosen.tolist(), strict=True):
                tokens[row] = None if token == NOT_FINITE else token
        return tokens

    def _among(self, row: torch.Tensor, ids: np.ndarray, seq: Sequence) -> int | None:
        """The token of one row [V] of which only ``ids`` are allowed. None where their logits are not finite."""
        if len(ids) == 1:
            return int(ids[0])
        values = row.index_select(0, self._backend.send(ids)).unsqueeze(0)
        place = int(self._backend.choose(values, [_draw(seq)], Vocabulary(len(ids))))
        return None if place == NOT_FINITE else int(ids[place])

    def _rule_out(self, row: torch.Tensor, allowed: Allowed) -> None:
        """Leave one row [V] the least number there is for all but the allowed tokens."""
        ids, least = self._backend.send(allowed.ids), torch.finfo(row.dtype).min
        if allowed.but:
            row.index_fill_(0, ids, least)
            return
        kept = row.index_select(0, ids)
        row.fill_(least).index_copy_(0, ids, kept)

    def _edited(self, logits: torch.Tensor, seqs: list[Sequence]) -> Sampled:
        """What was asked of rows [B, V'] whose logits are edited or reported."""
        finite = logits.isfinite().all(-1).tolist()
        unused = self._vocabulary.unused_on(logits.device)
        if unused is not None:
            logits.index_fill_(1, unused, -torch.inf)
        raw: dict[int, torch.Tensor] = {}
        for row, seq in enumerate(seqs):
            edits = _edits(seq)
            allowed = None if seq.constraint is None else seq.constraint.allowed()
            if seq.params.logprobs is not None:
                raw[row] = logits[row].clone() if edits or allowed is not None else logits[row]
            if edits:
                self._edit(logits[row], seq)
            if allowed is not None:
                self._rule_out(logits[row], allowed)
        good = [row for row, ok in enumerate(finite) if ok]
        tokens: list[int | None] = [None] * len(seqs)
        logprobs: list[TokenLogprob | None] = [None] * len(seqs)
        if good:
            # What was ruled out is the least there is, for `choose` refuses rows with infinities.
            rows = logits[good].clamp_(min=torch.finfo(logits.dtype).min)
            draws = [_draw(seqs[row]) for row in good]
            chosen = self._backend.choose(rows, draws, Vocabulary(self._vocabulary.size))
            for row, token in zip(good, chosen.tolist(), strict=True):
                tokens[row] = token
                if row in raw:
                    logprobs[row] = _logprob(raw[row], token, seqs[row].params.logprobs or 0)
        return Sampled(tokens, logprobs)

    def forget(self, seq: Sequence) -> None:
        """A finished sequence needs no state."""
        self._counts.pop(seq.seq_id, None)

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


def _only_held(seq: Sequence) -> bool:
    """Whether nothing but a grammar stands between its logits and its token."""
    return seq.constraint is not None and seq.params.logprobs is None and not _edits(seq)


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _edits(seq: Sequence) -> bool:
    params = seq.params
    return (
        bool(params.logit_bias)
        or _penalises(params)
        or (params.min_tokens > seq.num_known - seq.prompt_len and bool(seq.banned_until_min))
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


def _draw(seq: Sequence, ahead: int = 0) -> Draw:
    params = seq.params
    if params.temperature < _COLDEST:
        return Draw()
    uniform = uniform_at(seq.seed, seq.index, seq.num_known + ahead)
    return Draw(params.temperature, params.top_k, params.top_p, params.min_p, uniform)


def uniform_at(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) by which completion ``index`` of a request draws its token at ``position`` (the tokens
    before it): 53 bits of BLAKE2b over the three. It depends on nothing else, so it is known before the logits."""
    message = struct.pack("<QQQ", seed % 2**64, index, position)
    digest = hashlib.blake2b(message, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _logprob(raw: torch.Tensor, chosen: int, alternatives: int) -> TokenLogprob:
    """Log-probabilities of the model itself, before any bias, penalty or temperature. raw [V]."""
    values, ids = raw.topk(min(alternatives, raw.shape[0]))
    whole = float(raw.logsumexp(-1))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    top = {token: value - whole for token, value in pairs if value > -torch.inf}
    return TokenLogprob(chosen, float(raw[chosen]) - whole, top)
