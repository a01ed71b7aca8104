"""Choosing tokens from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenrt.conformance.bounds import FLOAT32, Near, sums
from qwenrt.conformance.case import Case, Checker, generator
from qwenrt.conformance.compare import Finding, Inputs
from qwenrt.conformance.subjects import Subject


@dataclass(frozen=True)
class ChoosingCase(Case):
    """``k``, ``temperature``: of top."""

    vocab: int = 2011
    k: int = 65
    temperature: float = 0.7

    def checker(self) -> Checker:
        return LikeliestChecker(self) if self.op == "likeliest" else TopChecker(self)


def _own(subject: Subject, op: str) -> list[tuple[str, bool, str]]:
    return [(op, subject.backend.overrides(op), "torch's own" if not subject.backend.overrides(op) else "")]


class LikeliestChecker:
    """Of equal ones the first; infinity and NaN are seen. The first of the largest, exactly."""

    def __init__(self, case: ChoosingCase) -> None:
        logits = torch.randn(7, case.vocab, generator=generator(case))
        size = case.vocab
        logits[0, 0], logits[1, size - 1] = 9.0, 9.0
        logits[2, size // 3] = logits[2, size // 2] = 9.0
        logits[3, size // 2], logits[4, size - 1], logits[5, 0] = torch.inf, torch.nan, -torch.inf
        self.logits = logits

    def check(self, subject: Subject) -> Finding:
        finding = Finding(served=_own(subject, "likeliest"))
        for logits in (self.logits, self.logits[1:2], self.logits[:0]):
            here = logits.to(subject.device)
            kept = Inputs(logits=here)
            found = subject.backend.likeliest(here)
            if found is None:
                continue
            finding.expect(len(found) == len(logits), f"{len(found)} tokens of {len(logits)} rows")
            for i, ((token, largest, finite), row) in enumerate(zip(found, logits)):
                numbers = row.nan_to_num(-torch.inf, torch.inf, -torch.inf)
                wanted = (int(numbers.argmax()), float(numbers.max()), bool(row.isfinite().all()))
                got = (token, largest, finite)
                finding.expect(got == wanted, f"row {i} of {len(logits)}: {got}, not {wanted}")
            kept.unchanged(finding)
        return finding


class TopChecker:
    """The k largest beside a temperature, falling, with ids that hold them; and the mass of all."""

    def __init__(self, case: ChoosingCase) -> None:
        self.case = case
        self.row = torch.randn(case.vocab, generator=generator(case))
        self.row[-1] = 4.5  # or nothing else counts
        scaled = (self.row.double() - self.row.max().double()) / case.temperature
        self.scaled = scaled
        self.k = min(case.k, case.vocab)
        self.wanted = Near(scaled.topk(self.k).values, scaled.topk(self.k).values.abs() * 4 * FLOAT32)

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding(served=_own(subject, "top"))
        row = self.row.to(subject.device)
        kept = Inputs(row=row)
        for with_whole in (True, False):
            found = subject.backend.top(row, float(row.max()), case.temperature, self.k, with_whole)
            if found is None:
                continue
            values, ids, whole = found
            finding.near("the largest", values[0], self.wanted, torch.float32)
            chosen = ids[0].cpu()
            finding.expect(len(set(chosen.tolist())) == self.k, "an id twice")
            inside = bool(((chosen >= 0) & (chosen < case.vocab)).all())
            finding.expect(inside, "an id out of range")
            if inside:
                finding.near("what ids hold", self.scaled[chosen].float(), self.wanted, torch.float32)
            if with_whole:
                mass = self.scaled.logsumexp(0)
                off = sums(case.vocab) + 8 * FLOAT32 * mass.abs()
                finding.near("the mass", torch.tensor(whole), Near(mass, off), torch.float32)
        kept.unchanged(finding)
        return finding
