"""Choosing tokens from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenrt.conformance.case import Case, Checker, generator
from qwenrt.conformance.compare import Finding
from qwenrt.conformance.subjects import Subject
from qwenrt.ops import reference
from qwenrt.ops.steps import Draw, DrawTensors, Vocabulary

UNIFORMS = (0.0, 0.02, 0.3, 0.55, 0.8, 0.97, 0.9999999)
GREEDY, FLAT, STEEP, STEPPED = "greedy", "flat", "steep", "stepped"


@dataclass(frozen=True)
class ChoosingCase(Case):
    """``rows``: the largest of all kinds of rows; or drawing from rows that are flat, steep, or have few different
    values, so that cuts fall between equal ones. ``gaps``: every third id has no token."""

    rows: str = GREEDY
    vocab: int = 2011
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 0.7
    gaps: bool = False

    @property
    def kind(self) -> str:
        return self.rows

    def checker(self) -> Checker:
        return ChoiceChecker(self)


class ChoiceChecker:
    """The very tokens of reference.choose, which sorts as many as there are."""

    def __init__(self, case: ChoosingCase) -> None:
        size, source = case.vocab, generator(case)
        self.vocabulary = Vocabulary(size, frozenset(range(0, size, 3)) if case.gaps else frozenset())
        if case.rows == GREEDY:
            self.logits = torch.randn(7, size + 3, generator=source)
            self.logits[0, 0], self.logits[1, size - 1], self.logits[:, size:] = 9.0, 9.0, 99.0
            self.logits[2, size // 3] = self.logits[2, size // 2] = 9.0
            self.logits[3, size // 2], self.logits[4, size - 1], self.logits[5, 0] = (
                torch.inf,
                torch.nan,
                -torch.inf,
            )
            self.draws = [Draw()] * len(self.logits)
        else:
            row = torch.randn(size + 3, generator=source) * {FLAT: 0.3, STEEP: 3.0, STEPPED: 2.0}[case.rows]
            row = row.round() if case.rows == STEPPED else row
            self.logits = row.repeat(len(UNIFORMS), 1)
            rule = (case.temperature, case.top_k, case.top_p, case.min_p)
            self.draws = [Draw(*rule, uniform) for uniform in UNIFORMS]
        self.wanted = reference.choose(
            self.logits[:, :size],
            DrawTensors.of(self.draws, self.logits.device),
            max(draw.width(size) for draw in self.draws),
            self.vocabulary.unused_on(self.logits.device),
        )

    def check(self, subject: Subject) -> Finding:
        own = subject.backend.overrides("choose")
        finding = Finding(served=[("choose", own, "" if own else "torch's own")])
        for rows in (slice(None), slice(1, 2)):
            logits, wanted = self.logits[rows].to(subject.device), self.wanted[rows]
            got = subject.backend.choose(logits, self.draws[rows], self.vocabulary)
            finding.expect(
                got.dtype == torch.int64 and got.shape == wanted.shape, f"{got.dtype} {list(got.shape)}"
            )
            finding.expect(got.tolist() == wanted.tolist(), f"tokens {got.tolist()}, not {wanted.tolist()}")
        return finding
