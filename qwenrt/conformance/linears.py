"""Linears, and the seams that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from qwenrt.backends.base import Backend
from qwenrt.conformance import bounds
from qwenrt.conformance.bounds import Near
from qwenrt.conformance.case import NORMAL, TOKENS, Case, Checker, generator
from qwenrt.conformance.compare import CONTIGUOUS, Finding, Inputs, laid_out, last_rows
from qwenrt.conformance.subjects import Subject
from qwenrt.conformance.weights import DENSE, Form, Weight, random_weight
from qwenrt.ops import reference
from qwenrt.ops.quantization import quantize_dense
from qwenrt.ops.types import Experts, Packed
from qwenrt.ops.weights import with_codes

DEFINED = Backend(torch.device("cpu"))
MASSIVE, FAR_FROM_ZERO, NOT_FINITE, OVERFLOWING = "massive", "far from zero", "not finite", "overflowing"
_EPS = 1e-6
_FEW = 8  # tokens of a step that decodes, here


@dataclass(frozen=True)
class LinearCase(Case):
    """``shape``: (outputs, inputs). ``wide``: the residual of linear_add is float32 beside narrower activations."""

    form: Form = DENSE
    shape: tuple[int, int] = (33, 96)
    bias: bool = False
    values: str = NORMAL
    layout: str = CONTIGUOUS
    wide: bool = False

    @property
    def kind(self) -> str:
        return self.form.name

    def checker(self) -> Checker:
        return PackChecker(self) if self.op == "pack_linear" else LinearChecker(self)


def inputs(case: LinearCase, source: torch.Generator) -> torch.Tensor:
    """Tokens [T, K] for all numbers of tokens: a call gets the last ones."""
    x = torch.randn(max(TOKENS), case.shape[1], generator=source)
    x *= torch.rand(len(x), 1, generator=source) + 0.1
    if case.values == MASSIVE:
        x[2::7, 0] = 700
    elif case.values == FAR_FROM_ZERO:
        x += 20
    elif case.values == OVERFLOWING:
        x = (x * 16384).clamp(-6e4, 6e4)
    elif case.values == NOT_FINITE:
        x[-1, -1], x[-33, 0], x[-16, case.shape[1] // 2] = torch.inf, -torch.inf, torch.nan
    return x.to(case.dtype)


class LinearChecker:
    """linear, norm_linear, linear_add and norm_gate_up_silu."""

    def __init__(self, case: LinearCase) -> None:
        self.case, source = case, generator(case)
        n, k = case.shape
        self.weight = random_weight(
            case.form, n, k, case.dtype, source, bias=case.bias, outliers=case.op == "linear"
        )
        self.x = inputs(case, source)
        self.norm = (torch.randn(k, generator=source) * 0.5 + 1).to(case.dtype)
        self.out_dtype = torch.float32 if case.wide else case.dtype
        self.residual = torch.randn(len(self.x), n, generator=source).to(self.out_dtype)

    @cached_property
    def defined(self) -> torch.Tensor:
        """The definition's result, float64, of all tokens."""
        return self.call(
            getattr(DEFINED, self.case.op),
            self.x.double(),
            self.norm.double(),
            self.residual.double(),
            self.weight.defined(),
        )

    def call(
        self, op: object, x: torch.Tensor, norm: torch.Tensor, residual: torch.Tensor, w: Packed
    ) -> torch.Tensor:
        arguments = {
            "linear": (x, w),
            "norm_linear": (x, norm, _EPS, w),
            "linear_add": (x, w, residual),
            "norm_gate_up_silu": (x, norm, _EPS, w),
        }[self.case.op]
        result: torch.Tensor = op(*arguments)  # type: ignore[operator]
        return result

    def near(self, rounding: float) -> Near:
        """The definition's result with what a backend may be off by."""
        op, dtype = self.case.op, self.case.dtype
        x = Near.exactly(self.x)
        if op.startswith("norm"):
            x = bounds.rms_norm(x, self.norm, _EPS, dtype)
        if self.case.wide:  # scaled down and up again, so that what becomes of it fits
            x = Near(x.value, x.error + 64 * bounds.floor(dtype))
        y = bounds.linear(x, self.weight, dtype, rounding)
        if self.case.wide:
            y = Near(y.value, y.error + 64 * bounds.floor(dtype))
        if op == "norm_gate_up_silu":
            y = bounds.silu_and_mul(y, dtype)
        if op == "linear_add":
            y = bounds.add(Near.exactly(self.residual), y, self.out_dtype)
        return Near(self.defined, y.error)

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        device = subject.device
        packed = self.weight.packed(subject.backend, case.dtype)
        op, finding.served = subject.resolve(case.op, case.dtype, kind=packed.kind)
        x, residual = (laid_out(t.to(device), case.layout) for t in (self.x, self.residual))
        norm = self.norm.to(device)
        kept = Inputs(x=x, residual=residual, norm=norm)
        wanted = self.near(subject.rounding)
        for tokens in TOKENS:
            got = self.call(op, last_rows(x, tokens), norm, last_rows(residual, tokens), packed)
            rows = torch.arange(len(x) - tokens, len(x))
            finding.near(f"{tokens} tokens", got, wanted.rows(rows), self.out_dtype)
        kept.unchanged(finding)
        if case.op == "linear" and case.values != NOT_FINITE:
            self.check_training(op, packed, device, finding)
        return finding

    def check_training(
        self, op: Callable[..., torch.Tensor], packed: Packed, device: torch.device, finding: Finding
    ) -> None:
        """The gradient of a frozen weight's input. Activations are not rounded then: the product is the exact one."""
        case, tokens = self.case, 3
        grad = torch.linspace(-1, 1, tokens * case.shape[0]).view(tokens, -1).to(case.dtype)
        with torch.enable_grad():
            given = last_rows(self.x, tokens).to(device).clone().requires_grad_()
            got = op(given, packed)
            (gradient,) = torch.autograd.grad(got, given, grad.to(device))
        rows = torch.arange(len(self.x) - tokens, len(self.x))
        finding.near("a result in training", got, self.near(0.0).rows(rows), case.dtype)
        size = grad.double().abs() @ self.weight.reach
        off = (bounds.sums(case.shape[0]) + 4 * bounds.unit(case.dtype)) * size
        finding.near("a gradient", gradient, Near(grad.double() @ self.weight.matrix, off), case.dtype)


class PackChecker:
    """pack_linear: tokens with one value each read the weights back, one by one. No sum hides a weight here."""

    def __init__(self, case: LinearCase) -> None:
        self.case = case
        self.weight = random_weight(
            case.form, *case.shape, case.dtype, generator(case), bias=case.bias, outliers=True
        )

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        packed = self.weight.packed(subject.backend, case.dtype)
        op, finding.served = subject.resolve("linear", case.dtype, kind=packed.kind)
        n, k = case.shape
        finding.expect(
            (packed.out_features, packed.in_features) == (n, k), "out_features or in_features are wrong"
        )
        got = op(torch.eye(k, dtype=case.dtype, device=subject.device), packed)
        bias = torch.zeros(n) if self.weight.bias is None else self.weight.bias
        value, sizes = self.weight.matrix.t() + bias, self.weight.reach.t() + bias.abs()
        wanted = Near(value, 3 * bounds.unit(case.dtype) * sizes + 8 * bounds.FLOAT32 * sizes)
        finding.near("a weight", got, wanted, case.dtype)
        return finding


# ---- experts


@dataclass(frozen=True)
class ExpertsCase(Case):
    """``sizes``: (hidden size, inner size of an expert, inner size of the shared one, 0: none)."""

    form: Form = DENSE
    experts: tuple[int, int] = (6, 2)
    sizes: tuple[int, int, int] = (48, 24, 0)
    norm_topk: bool = True
    layout: str = CONTIGUOUS
    wide: bool = False

    @property
    def kind(self) -> str:
        return self.form.name

    def checker(self) -> Checker:
        return ExpertsChecker(self)


class ExpertsChecker:
    def __init__(self, case: ExpertsCase) -> None:
        self.case, source = case, generator(case)
        hidden, inner, shared = case.sizes
        self.out_dtype = torch.float32 if case.wide else case.dtype

        def weight(n: int, k: int) -> Weight:
            return random_weight(case.form, n, k, case.dtype, source, bias=False)

        self.gate_up = [weight(2 * inner, hidden) for _ in range(case.experts[0])]
        self.down = [weight(hidden, inner) for _ in range(case.experts[0])]
        self.shared = (weight(2 * shared, hidden), weight(hidden, shared)) if shared else None
        self.shared_gate = (torch.randn(1, hidden, generator=source) * hidden**-0.5).to(case.dtype)
        self.router = (torch.randn(case.experts[0], hidden, generator=source) * 2 * hidden**-0.5).to(
            case.dtype
        )
        self.x = torch.randn(max(TOKENS), hidden, generator=source).to(self.out_dtype)
        self.norm = (torch.randn(hidden, generator=source) * 0.3 + 1).to(case.dtype)

    def packed(self, one: Callable[[Weight], Packed], device: torch.device, dtype: torch.dtype) -> Experts:
        return Experts(
            self.router.to(device, dtype),
            [one(w) for w in self.gate_up],
            [one(w) for w in self.down],
            self.case.experts[1],
            self.case.norm_topk,
            None if self.shared is None else (one(self.shared[0]), one(self.shared[1])),
            None if self.shared is None else self.shared_gate.to(device, dtype),
        )

    @cached_property
    def defined(self) -> torch.Tensor:
        packed = self.packed(Weight.defined, DEFINED.device, torch.float64)
        return DEFINED.norm_moe_add(self.x.double(), self.norm.double(), _EPS, packed)

    def _mlp(self, x: Near, gate_up: Weight, down: Weight, rounding: float) -> Near:
        dtype = self.case.dtype
        inner = bounds.silu_and_mul(bounds.linear(x, gate_up, dtype, rounding), dtype)
        if self.case.wide:
            inner = Near(inner.value, inner.error + 64 * bounds.floor(dtype))
        y = bounds.linear(inner, down, dtype, rounding)
        return Near(y.value, y.error + 64 * bounds.floor(dtype)) if self.case.wide else y

    def near(self, rounding: float) -> tuple[Near, torch.Tensor]:
        """The definition's result with what a backend may be off by, and the tokens whose experts are beyond doubt:
        where two are as likely, either may be chosen."""
        dtype, (_, top_k) = self.case.dtype, self.case.experts
        normed = bounds.rms_norm(Near.exactly(self.x), self.norm, _EPS, dtype)
        router = self.router.double()
        logits = bounds.linear(normed, Weight.dense(router), dtype, 0.0)
        scores = logits.value.sort(-1, descending=True).values
        doubt = logits.error.amax(-1)
        apart = scores[:, top_k - 1] - scores[:, top_k] if top_k < scores.shape[1] else doubt + 1
        weights, chosen = reference.route(normed.value @ router.t(), top_k, self.case.norm_topk)
        total = torch.zeros_like(normed.value)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            y = self._mlp(normed, gate_up, down, rounding)
            share = (weights * (chosen == expert)).sum(-1, keepdim=True)
            off = 4 * doubt[:, None] + 4 * bounds.unit(dtype)  # of the share: exp, its sum, and rounding
            total += share * (y.error + off * y.value.abs())
        if self.shared is not None:
            gate = bounds.linear(normed, Weight.dense(self.shared_gate), dtype, 0.0)
            y = self._mlp(normed, *self.shared, rounding)
            total += torch.sigmoid(gate.value) * (
                y.error + (gate.error + 4 * bounds.unit(dtype)) * y.value.abs()
            )
        total += (
            (top_k + 4) * bounds.unit(self.out_dtype) * (self.x.double().abs() + self.defined.abs() + total)
        )
        return Near(self.defined, total), apart > 2 * doubt

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        experts = self.packed(
            lambda weight: weight.packed(subject.backend, case.dtype), subject.device, case.dtype
        )
        kind = experts.gate_up[0].kind
        op, finding.served = subject.resolve(case.op, case.dtype, kind=kind)
        each = case.op == "norm_moe_add_each"
        why = experts.stack(subject.backend.stackable)  # as a model's are where steps are captured
        if each and why is not None:
            finding.served = [(case.op, False, why)]
            return finding
        x, norm = laid_out(self.x.to(subject.device), case.layout), self.norm.to(subject.device)
        kept = Inputs(x=x, norm=norm, router=experts.router)
        wanted, sure = self.near(subject.rounding)
        finding.expect(bool(sure.float().mean() > 0.1), "too few tokens are beyond doubt to tell")
        for tokens in (n for n in TOKENS if n <= _FEW or not each):
            got = op(last_rows(x, tokens), norm, _EPS, experts)
            finding.expect(len(got) == tokens, f"{tokens} tokens become {len(got)}")
            here = last_rows(sure, tokens)
            rows = torch.arange(len(x) - tokens, len(x))[here]
            finding.near(f"{tokens} tokens", got.cpu()[here], wanted.rows(rows), self.out_dtype)
        kept.unchanged(finding)
        return finding


# ---- rounding at load


@dataclass(frozen=True)
class RoundingCase(Case):
    """quantize_dense; ``rows``: a letter for what each row is: r random, z zeros, c constant, o one outlier, s values
    of all sizes, n none below zero."""

    bits: int = 4
    group: int = 32
    shape: tuple[int, int] = (33, 96)
    spread: float = 0.02
    rows: str = "rzcosn"

    @property
    def kind(self) -> str:
        return f"int{self.bits}"

    def checker(self) -> Checker:
        return RoundingChecker(self)


class RoundingChecker:
    """The bits of the definition: a kept file must not depend on who rounded."""

    def __init__(self, case: RoundingCase) -> None:
        self.case, source = case, generator(case)
        w = torch.randn(*case.shape, generator=source) * case.spread
        for row in range(len(w)):
            letter = case.rows[row % len(case.rows)]
            if letter == "z":
                w[row] = -0.0
            elif letter == "c":
                w[row] = -case.spread
            elif letter == "o":
                w[row, row % case.shape[1]] *= 1e3
            elif letter == "s":
                w[row] *= 10.0 ** torch.randint(-30, 1, (case.shape[1],), generator=source)
            elif letter == "n":
                w[row].abs_()
        self.weight = w.to(case.dtype)

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        finding.served = [
            ("quantize_dense", type(subject.backend).quantize_dense is not Backend.quantize_dense, "")
        ]
        if not bool(self.weight.isfinite().all()):
            return finding
        kept, bias = Inputs(weight=self.weight), torch.ones(case.shape[0])
        got = subject.backend.quantize_dense(self.weight, case.bits, case.group, bias, "a weight")
        for why in filter(
            None, [subject.backend.demoted.get("quantize_dense")]
        ):  # it looked itself, and then the definition served
            finding.complaints.append(why)
        wanted = quantize_dense(self.weight, case.bits, case.group, bias)
        got = with_codes(got)
        for part in ("codes", "scales", "zeros"):
            finding.same(part, getattr(got, part), getattr(wanted, part))
        finding.expect(got.bias is bias and got.group_size == wanted.group_size, "bias or group_size")
        kept.unchanged(finding)
        return finding
