"""Guesses by the model's own head for them: what it makes of the hidden states that steps leave behind."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qwenrt.backends.stack import plan_of
from qwenrt.engine.launched import Span
from qwenrt.engine.sequence import Sequence, Status
from qwenrt.errors import ConfigError
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import NOT_FINITE, LayerKV, Step

_CHECK = (
    0.15  # what a step takes longer for each guess that it checks, beside what it reads more, of one token's
)
_SURE = 0.9  # a share of right guesses that is worth any cost
_HOPE = 0.1  # how much better than worth their cost a sequence's guesses are taken to be at first
_MEMORY = 8  # checks that say how often guesses are right
_REST = (32, 256)  # tokens of a rest after too few right ones, at first and at most
_ENOUGH = 32  # tokens that are read although nothing is guessed, so that states do not pile up

logger = logging.getLogger("qwenrt")


@dataclass
class _Reader:
    """How far the head has read one sequence, in an ``epoch`` of its cache: ``states`` [n, D] are those of its tokens
    from ``start`` on, which it has not read. How many it guesses adapts: ``many`` as were right and one more; none for
    ``rest`` tokens where the ``share`` of right ones, by the latest checks, is not worth what guesses cost."""

    epoch: int
    start: int
    share: float
    states: list[torch.Tensor] = field(default_factory=list)
    many: int = 1
    rest: int = _REST[0]
    pause_until: int = 0

    @property
    def count(self) -> int:
        return sum(map(len, self.states))


class MtpDrafts:
    """Up to ``most`` guesses for each sequence that asks, by the head of ``model`` over ``pages`` of its own, which
    sequences use by the block tables of their own cache.

    Of each token i the head wants the hidden state and token i + 1, and keeps key and value in the slot of token i. It
    reads what a step computed when the next one is scheduled: tokens are known by then. To guess further it goes on
    from its guess; what it writes then is written over when the tokens are there. ``choose``: chooses a guess from
    the head's logits as the token will be chosen from the model's, so that it is right most often
    (`Sampler.guess`). ``reach``: slots for tokens that may follow. Raises
    ConfigError where the model has no such head.
    """

    def __init__(
        self,
        model: Qwen,
        pages: LayerKV | None,
        most: int,
        *,
        choose: Callable[[torch.Tensor, list[Sequence], list[int]], list[int]],
        reach: Callable[[Sequence, int], int],
    ) -> None:
        if pages is None:
            found = "the model was built without its MTP head"
            raise ConfigError(f"draft_tokens={most}", found, 'Load it with draft="mtp", or set 0.')
        self._model, self._pages, self.most = model, pages, most
        self._choose, self._reach = choose, reach
        self._readers: dict[int, _Reader] = {}
        self._worth = min(_SURE, model.guess_cost + _CHECK)  # the share of right guesses that pays for them
        self._failed = False

    @torch.no_grad()
    def computed(self, stream: torch.Tensor | None, spans: list[Span]) -> None:
        """A step is done and its guesses are checked: take the hidden states of the tokens that stay. ``stream``: what
        left its layers."""
        if stream is None or self._failed:
            return
        hidden, row = self._model.final_norm(stream), 0
        for span in spans:
            seq, first = span.seq, row
            row += span.count
            if seq.status is not Status.RUNNING or seq.epoch != span.epoch:
                continue
            reader = self._readers.get(seq.seq_id)
            if reader is None or reader.epoch != span.epoch or reader.start + reader.count != span.start:
                share = self._worth + _HOPE if reader is None else reader.share
                reader = self._readers[seq.seq_id] = _Reader(span.epoch, span.start, share)
            reader.states.append(hidden[first : first + min(span.count, seq.num_computed - span.start)])

    def guess(self, asked: list[tuple[Sequence, int]], running: list[Sequence]) -> list[list[int]]:
        """Of each sequence up to so many tokens that may follow; of the others that are ``running`` what piled up is
        read. Where this fails nothing is guessed any more: an answer needs no guesses."""
        wanted = [self._may_guess(seq, most) for seq, most in asked]
        if self._failed:
            return [[] for _ in asked]
        try:
            return self._guess([(seq, most) for (seq, _), most in zip(asked, wanted, strict=True)], running)
        except Exception:
            logger.exception("the MTP head failed: nothing is guessed from here on")
            self._failed = True
            return [[] for _ in asked]

    def checked(self, seq: Sequence, guessed: int, right: int) -> None:
        """So many of its guesses were right."""
        reader = self._readers.get(seq.seq_id)
        if reader is None:
            return
        reader.many = min(self.most, right + 1)
        reader.share += (bool(right) - reader.share) / _MEMORY
        if reader.share >= self._worth:
            reader.rest = _REST[0]
            return
        reader.share = self._worth  # when it is tried again, one error is enough
        reader.pause_until = len(seq.token_ids) + reader.rest
        reader.rest = min(2 * reader.rest, _REST[1])

    def forget(self, seq: Sequence) -> None:
        """A finished sequence needs no state."""
        self._readers.pop(seq.seq_id, None)

    def _may_guess(self, seq: Sequence, most: int) -> int:
        reader = self._readers.get(seq.seq_id)
        if reader is None or reader.epoch != seq.epoch or len(seq.token_ids) < reader.pause_until:
            return 0
        if not reader.count or reader.start + reader.count != len(seq.token_ids) - 1:
            return 0
        return self._reach(seq, min(most, reader.many, self.most))

    @torch.no_grad()
    def _guess(self, asked: list[tuple[Sequence, int]], running: list[Sequence]) -> list[list[int]]:
        guesses: dict[int, list[int]] = {seq.seq_id: [] for seq, _ in asked}
        left = {seq.seq_id: most for seq, most in asked if most > 0}
        hidden, seqs = self._read([seq for seq in running if self._is_due(seq, left)])
        while True:
            going = [
                row
                for row, seq in enumerate(seqs)
                if len(guesses.get(seq.seq_id, ())) < left.get(seq.seq_id, 0)
            ]
            if not going:
                return list(guesses.values())
            hidden, seqs = hidden[going], [seqs[row] for row in going]
            aheads = [len(guesses[seq.seq_id]) for seq in seqs]
            chosen = self._choose(self._model.logits(hidden), seqs, aheads)
            for seq, token in zip(seqs, chosen, strict=True):
                if token == NOT_FINITE:
                    left[seq.seq_id] = 0
                else:
                    guesses[seq.seq_id].append(token)
            more = [row for row, seq in enumerate(seqs) if len(guesses[seq.seq_id]) < left[seq.seq_id]]
            hidden, seqs = hidden[more], [seqs[row] for row in more]
            if seqs:
                hidden = self._go_on(seqs, [guesses[seq.seq_id] for seq in seqs], hidden)

    def _is_due(self, seq: Sequence, left: dict[int, int]) -> bool:
        reader = self._readers.get(seq.seq_id)
        if reader is None or reader.epoch != seq.epoch or not reader.count:
            return False
        return seq.seq_id in left or reader.count >= _ENOUGH or seq.num_remaining > 1

    def _read(self, seqs: list[Sequence]) -> tuple[torch.Tensor, list[Sequence]]:
        """Read what these sequences have left -> what the head gives for the last token of each [B, D]."""
        if not seqs:
            return torch.empty(0), []
        states: list[torch.Tensor] = []
        counts: list[int] = []
        starts: list[int] = []
        for seq in seqs:
            reader = self._readers[seq.seq_id]
            counts.append(reader.count)
            starts.append(reader.start)
            states += reader.states
            reader.start, reader.states = reader.start + reader.count, []
        ids = [
            seq.token_ids[start + 1 : start + 1 + n]
            for seq, start, n in zip(seqs, starts, counts, strict=True)
        ]
        ends = [start + n for start, n in zip(starts, counts, strict=True)]
        y = self._run(seqs, counts, ends, [i for own in ids for i in own], torch.cat(states))
        last = torch.tensor(counts).cumsum(0) - 1
        return y[last.to(y.device)], seqs

    def _go_on(self, seqs: list[Sequence], guesses: list[list[int]], hidden: torch.Tensor) -> torch.Tensor:
        """One guess more of each, after those it has."""
        ends = [len(seq.token_ids) - 1 + len(own) for seq, own in zip(seqs, guesses, strict=True)]
        return self._run(seqs, [1] * len(seqs), ends, [own[-1] for own in guesses], hidden)

    def _run(
        self, seqs: list[Sequence], counts: list[int], ends: list[int], ids: list[int], hidden: torch.Tensor
    ) -> torch.Tensor:
        alphas, tables = [seq.ntk_alpha for seq in seqs], [seq.block_table for seq in seqs]
        step = Step(counts, ends, tables, alphas, ids)
        plan = plan_of(self._model.backend, step, self._pages.block_size)
        return self._model.guess(self._model.backend.send(ids), hidden, plan, alphas, self._pages)
