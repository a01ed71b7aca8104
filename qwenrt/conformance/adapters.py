"""What adapters add to a linear's outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenrt.conformance.bounds import FLOAT32, Near, sums, unit
from qwenrt.conformance.case import TOKENS, Case, Checker, generator
from qwenrt.conformance.compare import CONTIGUOUS, Finding, Inputs, laid_out, last_rows
from qwenrt.conformance.subjects import Subject
from qwenrt.ops.types import LoraPair, LoraSpan

PAIRS, DORA, BIASES = "pairs", "DoRA and biases", "biases alone"


@dataclass(frozen=True)
class LoraCase(Case):
    """``shape``: the linear's (outputs, inputs). ``adds``: what there is beside A and B, or in their place."""

    shape: tuple[int, int] = (33, 96)
    rank: int = 16
    adds: str = PAIRS
    layout: str = CONTIGUOUS

    def checker(self) -> Checker:
        return LoraChecker(self)


class LoraChecker:
    """Adapters and tokens of none, in turn; each has a pair for two parts of the outputs, none for those between."""

    def __init__(self, case: LoraCase) -> None:
        self.case, source = case, generator(case)
        n, k = case.shape
        self.x = torch.randn(max(TOKENS), k, generator=source).to(case.dtype)
        self.y = torch.randn(max(TOKENS), n, generator=source).to(case.dtype)
        self.bias = torch.randn(n, generator=source).to(case.dtype) if case.adds == DORA else None
        parts = [(0, n)] if n < 3 else [(0, n // 3), (n - n // 2, n // 2)]
        self.adapters = [
            tuple(_pair(case, *part, source, scale) for part in parts) for scale in (0.5, 0.5, 2.0)
        ]

    def spans(self, tokens: int, device: torch.device) -> list[LoraSpan]:
        """Of so many tokens: the first adapter has some, others none, the other two the rest but the last."""
        cuts = [tokens * i // 6 for i in range(7)]
        owners = (0, 1, None, 0, 2, 1)
        adapters = [tuple(_on(pair, device) for pair in pairs) for pairs in self.adapters]
        return [
            LoraSpan(adapters[owner], first, last)
            for owner, first, last in zip(owners, cuts, cuts[1:], strict=False)
            if owner is not None and first < last
        ]

    def wanted(self, tokens: int) -> Near:
        y, x = (last_rows(t, tokens).double() for t in (self.y, self.x))
        value, error = y.clone(), torch.zeros_like(y)
        for span in self.spans(tokens, torch.device("cpu")):
            for pair in span.pairs:
                here = slice(span.first, span.last), pair.rows
                value[here], error[here] = self._changed(y[here], x[span.first : span.last], pair)
        return Near(value, error)

    def _changed(
        self, own: torch.Tensor, x: torch.Tensor, pair: LoraPair
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 throughout, and rounded once."""
        a, b = pair.a.double(), pair.b.double()
        rank, columns = a.shape
        inner = x @ a.t()
        off = sums(columns) * (x.abs() @ a.abs().t())
        update, size = pair.scale * inner @ b.t(), pair.scale * (inner.abs() + off) @ b.abs().t()
        error = pair.scale * off @ b.abs().t() + sums(rank + 2) * size
        if pair.row_scale is not None:
            bias = torch.zeros(1) if self.bias is None else self.bias[pair.rows].double()
            factor = pair.row_scale.double()
            update = (factor - 1) * (own - bias) + factor * update
            terms = (factor - 1).abs() * (own.abs() + bias.abs()) + factor.abs() * size
            error = factor.abs() * error + 4 * FLOAT32 * terms
            size = terms
        value = own + update
        if pair.bias is not None:
            value, size = value + pair.bias.double(), size + pair.bias.double().abs()
        error = error + 4 * FLOAT32 * (own.abs() + size)
        return value, error + unit(self.case.dtype) * (value.abs() + error)

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        op, finding.served = subject.resolve("add_lora", case.dtype)
        x, y = (laid_out(t.to(subject.device), case.layout) for t in (self.x, self.y))
        bias = None if self.bias is None else self.bias.to(subject.device)
        kept = Inputs(x=x, y=y)
        for tokens in TOKENS:
            spans, own = self.spans(tokens, subject.device), last_rows(y, tokens)
            got, wanted = op(own, last_rows(x, tokens), spans, bias), self.wanted(tokens)
            finding.near(f"{tokens} tokens", got, wanted, case.dtype)
            exact = (wanted.error == 0).to(got.device)
            finding.same(f"what no pair is for of {tokens} tokens", got[exact], own[exact])
        kept.unchanged(finding)
        return finding


def _pair(case: LoraCase, first: int, rows: int, source: torch.Generator, scale: float) -> LoraPair:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    rank, full = 0 if case.adds == BIASES else case.rank, case.adds == DORA
    return LoraPair(
        draw(rank, case.shape[1]),
        draw(rank, rows).t(),  # as those that are loaded
        scale,
        first,
        row_scale=1 + draw(rows) / 4 if full else None,
        bias=draw(rows) if case.adds != PAIRS else None,
    )


def _on(pair: LoraPair, device: torch.device) -> LoraPair:
    row_scale, bias = (None if t is None else t.to(device) for t in (pair.row_scale, pair.bias))
    return LoraPair(pair.a.to(device), pair.b.to(device), pair.scale, pair.first, row_scale, bias)
