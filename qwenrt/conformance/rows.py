"""What works on each row by itself: norms, silu, rotation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwenrt.backends.base import Backend
from qwenrt.conformance import bounds
from qwenrt.conformance.bounds import Near
from qwenrt.conformance.case import NORMAL, TOKENS, Case, Checker, generator
from qwenrt.conformance.compare import CONTIGUOUS, TRANSPOSED, Finding, Inputs, laid_out, last_rows
from qwenrt.conformance.subjects import Subject

DEFINED = Backend(torch.device("cpu"))
ALL_SIZES, NOT_FINITE = "of all sizes", "not finite"
_EPS = 1e-6


@dataclass(frozen=True)
class RowsCase(Case):
    """``width``: elements of a row that goes in; of silu_and_mul and gate_output twice those that come out."""

    width: int = 96
    values: str = NORMAL
    layout: str = CONTIGUOUS

    def checker(self) -> Checker:
        checkers: dict[str, Callable[[RowsCase], Checker]] = {
            "rms_norm": NormChecker,
            "gate_output": GateChecker,
        }
        return checkers.get(self.op, SiluChecker)(self)


def _rows(case: RowsCase, source: torch.Generator) -> torch.Tensor:
    x = torch.randn(max(TOKENS), case.width, generator=source)
    if case.values == ALL_SIZES:  # from less than eps to what float16 can multiply
        x *= torch.logspace(-4, 1.5, len(x))[torch.randperm(len(x), generator=source), None]
    elif case.values == NOT_FINITE:
        x[-1, 0], x[-3, -1], x[-16, case.width // 2] = torch.inf, torch.nan, -torch.inf
    return x.to(case.dtype)


class NormChecker:
    def __init__(self, case: RowsCase) -> None:
        self.case, source = case, generator(case)
        self.x = _rows(case, source)
        self.weight = torch.randn(case.width, generator=source).to(case.dtype)
        self.wanted = bounds.rms_norm(Near.exactly(self.x), self.weight, _EPS, case.dtype)

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        op, finding.served = subject.resolve("rms_norm", case.dtype)
        x, weight = laid_out(self.x.to(subject.device), case.layout), self.weight.to(subject.device)
        kept = Inputs(x=x, weight=weight)
        for tokens in TOKENS:
            wanted = self.wanted.rows(torch.arange(len(x) - tokens, len(x)))
            finding.near(f"{tokens} tokens", op(last_rows(x, tokens), weight, _EPS), wanted, case.dtype)
        # as norms of heads have it: [T, H, hd]
        heads = x.view(-1, 2, case.width) if case.layout != TRANSPOSED else x[:, None]
        finding.near("rows of heads", op(heads, weight, _EPS).flatten(0, 1), self.wanted, case.dtype)
        kept.unchanged(finding)
        return finding


class SiluChecker:
    def __init__(self, case: RowsCase) -> None:
        self.case = case
        self.x = _rows(case, generator(case))
        near = bounds.silu_and_mul(Near.exactly(self.x), case.dtype)
        self.wanted = Near(DEFINED.silu_and_mul(self.x.double()), near.error)

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        op, finding.served = subject.resolve("silu_and_mul", case.dtype)
        x = laid_out(self.x.to(subject.device), case.layout)
        kept = Inputs(x=x)
        for tokens in TOKENS:
            wanted = self.wanted.rows(torch.arange(len(x) - tokens, len(x)))
            finding.near(f"{tokens} tokens", op(last_rows(x, tokens)), wanted, case.dtype)
        kept.unchanged(finding)
        return finding


class GateChecker:
    """Two heads, what each attended to with its gate behind it."""

    def __init__(self, case: RowsCase) -> None:
        self.case = case
        self.x = _rows(case, generator(case))
        self.wanted = bounds.gate_output(*_heads_and_gates(self.x.double()), case.dtype)

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        op, finding.served = subject.resolve("gate_output", case.dtype)
        x = laid_out(self.x.to(subject.device), case.layout)
        kept = Inputs(x=x)
        for tokens in TOKENS:
            wanted = self.wanted.rows(torch.arange(len(x) - tokens, len(x)))
            got = op(*_heads_and_gates(last_rows(x, tokens)))
            finding.near(f"{tokens} tokens", got, wanted, case.dtype)
        kept.unchanged(finding)
        return finding


def _heads_and_gates(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 4 hd] -> [T, 2, hd] each."""
    attended, gates = x.reshape(len(x), 2, 2, x.shape[1] // 4).unbind(2)
    return attended, gates


@dataclass(frozen=True)
class RotaryCase(Case):
    """``rotated``: how many of a head's channels turn; the rest passes."""

    heads: int = 4
    head_dim: int = 64
    half: bool = False
    layout: str = CONTIGUOUS

    @property
    def rotated(self) -> int:
        return self.head_dim // (2 if self.half else 1)

    def checker(self) -> Checker:
        return RotaryChecker(self)


def angles(tokens: int, rotated: int, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin float32 [T, rotated], both halves alike."""
    turns = (torch.rand(tokens, rotated // 2, generator=source) * 100).repeat(1, 2)
    return turns.cos(), turns.sin()


class RotaryChecker:
    def __init__(self, case: RotaryCase) -> None:
        self.case, source = case, generator(case)
        tokens = max(TOKENS)
        self.x = torch.randn(tokens, case.heads, case.head_dim, generator=source).to(case.dtype)
        self.cos, self.sin = angles(tokens, case.rotated, source)
        self.wanted = bounds.rotary(Near.exactly(self.x), self.cos, self.sin, case.dtype)

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        op, finding.served = subject.resolve("rotary", case.dtype, head_dim=case.head_dim)
        x = laid_out(self.x.to(subject.device), case.layout)
        cos, sin = self.cos.to(subject.device), self.sin.to(subject.device)
        kept = Inputs(x=x, cos=cos, sin=sin)
        for tokens in TOKENS:
            got = op(last_rows(x, tokens), last_rows(cos, tokens), last_rows(sin, tokens))
            wanted = self.wanted.rows(torch.arange(len(x) - tokens, len(x)))
            finding.near(f"{tokens} tokens", got, wanted, case.dtype)
        kept.unchanged(finding)
        return finding
