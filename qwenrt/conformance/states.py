"""Ops of linear attention: convolution, delta rule, gated norm, and all that is between a layer's linears."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from qwenrt.conformance.bounds import FLOAT32, Near, sums, unit
from qwenrt.conformance.case import Case, Checker, generator
from qwenrt.conformance.compare import CONTIGUOUS, Finding, Inputs, laid_out
from qwenrt.conformance.subjects import Subject
from qwenrt.ops.steps import DecodePlan, LayerState, StepPlan
from qwenrt.ops.types import DeltaWeights, Packed

_EPS = 1e-6
_L2_EPS = 1e-6


@dataclass(frozen=True)
class StatesCase(Case):
    """``heads``: (key heads, value heads, key_dim, value_dim). ``lens``: of each sequence how many tokens it has now
    and with its history. ``kept``: there are states, else every sequence begins and leaves nothing."""

    heads: tuple[int, int, int, int] = (2, 4, 16, 16)
    taps: int = 4
    tiled: bool = False
    lens: tuple[tuple[int, int], ...] = ((1, 1),)
    kept: bool = True
    layout: str = CONTIGUOUS

    @property
    def tokens(self) -> int:
        return sum(q_len for q_len, _ in self.lens)

    @property
    def channels(self) -> int:
        key_heads, value_heads, key_dim, value_dim = self.heads
        return 2 * key_heads * key_dim + value_heads * value_dim

    def checker(self) -> Checker:
        if self.op == "causal_conv":
            return ConvChecker(self)
        if self.op == "gated_delta":
            return DeltaChecker(self)
        return GatedNormChecker(self) if self.op == "gated_norm" else NetChecker(self)


class _States:
    """States with a history for those that have one; in all other places NaN, also of sequences that begin."""

    def __init__(self, case: StatesCase, source: torch.Generator) -> None:
        self.case, count = case, len(case.lens)
        self.slots = random.Random(count).sample(range(count + 2), count)
        _, value_heads, key_dim, value_dim = case.heads
        self.conv = torch.full((count + 2, case.taps - 1, case.channels), torch.nan, dtype=case.dtype)
        self.delta = torch.full((count + 2, value_heads, key_dim, value_dim), torch.nan)
        for slot, (q_len, kv_len) in zip(self.slots, case.lens, strict=True):
            if kv_len > q_len and case.kept:
                self.conv[slot] = torch.randn(self.conv.shape[1:], generator=source).to(case.dtype)
                self.delta[slot] = torch.randn(self.delta.shape[1:], generator=source)

    @property
    def plan(self) -> StepPlan:
        lens = [q for q, _ in self.case.lens], [n for _, n in self.case.lens]
        if not self.case.kept:
            return StepPlan(*lens)
        return StepPlan(*lens, block_table=[[] for _ in self.slots], state_slots=self.slots)

    def decode_plan(self, device: torch.device) -> DecodePlan:
        """Of sequences that have one token each; where their keys would be nothing asks."""
        none = torch.zeros(len(self.slots), 1, dtype=torch.int64, device=device)
        position = torch.tensor([n - 1 for _, n in self.case.lens], dtype=torch.int64, device=device)
        states = torch.tensor(self.slots, dtype=torch.int64, device=device)
        return DecodePlan(position, none, none[:, 0], states)

    def on(self, device: torch.device) -> LayerState | None:
        return LayerState(self.conv.to(device), self.delta.to(device)) if self.case.kept else None

    def each(self) -> Iterator[tuple[slice, int, torch.Tensor, torch.Tensor]]:
        """Of each sequence that has tokens: where they are, its slot, and its two states before, in float64."""
        start = 0
        for slot, (q_len, kv_len) in zip(self.slots, self.case.lens, strict=True):
            if q_len:
                conv, delta = self.conv[slot].double(), self.delta[slot].double()
                begins = kv_len == q_len or not self.case.kept
                kept = (
                    torch.zeros_like(conv) if begins else conv,
                    torch.zeros_like(delta) if begins else delta,
                )
                yield slice(start, start + q_len), slot, *kept
            start += q_len

    def unchanged(self, finding: Finding, state: LayerState, kept: list[int]) -> None:
        """Slots of nobody, and of those without tokens, hold what they held."""
        others = [slot for slot in range(len(self.conv)) if slot not in kept]
        finding.same("the convolution's inputs in another slot", state.conv.cpu()[others], self.conv[others])
        finding.same("a state in another slot", state.delta.cpu()[others], self.delta[others])


def _conv(
    case: StatesCase, states: _States, x: torch.Tensor, weight: torch.Tensor
) -> tuple[Near, dict[int, Any]]:
    """silu of the sums over the taps, and what each slot holds afterwards."""
    values, reach, after = [], [], {}
    for here, slot, before, _ in states.each():
        rows = torch.cat((before, x[here].double()))
        windows = rows.unfold(0, case.taps, 1)  # [T, C, taps]
        values.append((windows * weight.double().t()).sum(-1))
        reach.append((windows.abs() * weight.double().t().abs()).sum(-1))
        after[slot] = rows[len(rows) - case.taps + 1 :].to(case.dtype)
    if not values:
        return Near.exactly(x), after
    total, size = torch.cat(values), torch.cat(reach)
    value = F.silu(total)
    error = 1.1 * sums(case.taps) * size + (32 + 2 * total.abs()) * FLOAT32 * value.abs()
    return Near(value, error).rounded(2 * unit(case.dtype)), after


def _delta(
    case: StatesCase, states: _States, q: Near, k: Near, v: Near, beta: torch.Tensor, g: torch.Tensor
) -> tuple[Near, dict[int, Near]]:
    """The rule in float64, token by token, and how far a state in float32 may be from it: what sums over keys and over
    tokens round, and what its inputs are off by, beside the largest that the state was."""
    key_heads, value_heads, key_dim, _ = case.heads
    of_head = torch.arange(value_heads)
    of_head = of_head % key_heads if case.tiled else of_head // (value_heads // key_heads)
    unit_q, unit_k = (x.value * torch.rsqrt(x.value.square().sum(-1, keepdim=True) + _L2_EPS) for x in (q, k))
    off = torch.zeros(v.value.shape[:2], dtype=torch.float64)
    for x, index in ((q, of_head), (k, of_head), (v, torch.arange(value_heads))):
        off = off + (x.error.norm(dim=-1) / (x.value.norm(dim=-1) + 1e-12))[:, index]
    read, error, after = [], [], {}
    for here, slot, _, s in states.each():
        size = s.flatten(1).norm(dim=-1)
        wrong = torch.zeros_like(size)
        for t in range(here.start, here.stop):
            query, key = unit_q[t, of_head] * key_dim**-0.5, unit_k[t, of_head]
            s = s * g[t].double().exp()[:, None, None]
            d = beta[t].double()[:, None] * (v.value[t] - torch.einsum("hkv,hk->hv", s, key))
            s = s + key[:, :, None] * d[:, None, :]
            size = torch.maximum(size, s.flatten(1).norm(dim=-1))
            wrong = torch.maximum(wrong, off[t])
            read.append(torch.einsum("hkv,hk->hv", s, query))
            share = sums(key_dim) + sums(t - here.start + 1) + wrong
            error.append((share * size * query.norm(dim=-1))[:, None].expand_as(read[-1]))
        after[slot] = Near(s, (share * size)[:, None, None].expand_as(s))
    if not read:
        return v, after
    return Near(torch.stack(read), torch.stack(error)), after


def _gated_norm(o: Near, z: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> Near:
    """The norm rounded to the dtype; times the weight and silu(z) in float32, rounded again."""
    gate, gain = F.silu(z.double()), torch.rsqrt(o.value.square().mean(-1, keepdim=True) + _EPS)
    normed = o.value * gain
    value = normed * weight.double() * gate
    moved = (o.error + normed.abs() * o.error.square().mean(-1, keepdim=True).sqrt()) * gain
    error = moved * (weight.double() * gate).abs()
    error = error + (sums(o.value.shape[-1]) + (32 + 2 * z.double().abs()) * FLOAT32) * value.abs()
    return Near(value, error).rounded(3 * unit(dtype))


class _Checker(ABC):
    def __init__(self, case: StatesCase) -> None:
        self.case, self.source = case, generator(case)
        self.states = _States(case, self.source)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make the values, and what is wanted of them."""

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self.source).to(dtype or self.case.dtype)

    def taken(self, subject: Subject) -> tuple[Callable[..., Any], Finding]:
        finding = Finding()
        op, finding.served = subject.resolve(self.case.op, self.case.dtype)
        return op, finding


class ConvChecker(_Checker):
    def prepare(self) -> None:
        case = self.case
        self.x, self.weight = self.normal(case.tokens, case.channels), self.normal(case.taps, case.channels)
        self.wanted, self.after = _conv(case, self.states, self.x, self.weight)

    def check(self, subject: Subject) -> Finding:
        op, finding = self.taken(subject)
        x, weight = laid_out(self.x.to(subject.device), self.case.layout), self.weight.to(subject.device)
        kept, state = Inputs(x=x, weight=weight), self.states.on(subject.device)
        finding.near("the result", op(x, weight, state, self.states.plan), self.wanted, self.case.dtype)
        kept.unchanged(finding)
        if state is not None:
            for slot, inputs in self.after.items():
                finding.same("the convolution's inputs", state.conv[slot].cpu(), inputs)
            self.states.unchanged(finding, state, [*self.after])
        return finding


class DeltaChecker(_Checker):
    def prepare(self) -> None:
        case = self.case
        key_heads, value_heads, key_dim, value_dim = case.heads
        self.q, self.k = (self.normal(case.tokens, key_heads, key_dim) for _ in range(2))
        self.v = self.normal(case.tokens, value_heads, value_dim)
        self.beta = torch.rand(case.tokens, value_heads, generator=self.source)
        self.g = -torch.rand(case.tokens, value_heads, generator=self.source) * torch.logspace(
            -3, 1, value_heads
        )
        q, k, v = (Near.exactly(x) for x in (self.q, self.k, self.v))
        self.wanted, self.after = _delta(case, self.states, q, k, v, self.beta, self.g)

    def check(self, subject: Subject) -> Finding:
        op, finding = self.taken(subject)
        q, k, v = (laid_out(x.to(subject.device), self.case.layout) for x in (self.q, self.k, self.v))
        beta, g = self.beta.to(subject.device), self.g.to(subject.device)
        kept, state = Inputs(q=q, k=k, v=v, beta=beta, g=g), self.states.on(subject.device)
        o = op(q, k, v, beta, g, state, self.states.plan, self.case.tiled)
        finding.near("what is read", o, self.wanted, torch.float32)
        kept.unchanged(finding)
        if state is not None:
            for slot, near in self.after.items():
                finding.near("a state", state.delta[slot], near, torch.float32)
            self.states.unchanged(finding, state, [*self.after])
        return finding


class GatedNormChecker(_Checker):
    def prepare(self) -> None:
        case = self.case
        _, value_heads, _, value_dim = case.heads
        shape = (case.tokens, value_heads, value_dim)
        sizes = torch.logspace(-3, 6, max(1, case.tokens))[:, None, None]  # o leaves float16's range
        self.o = self.normal(*shape, dtype=torch.float32) * sizes[: case.tokens]
        self.z, self.weight = self.normal(*shape), self.normal(value_dim, dtype=torch.float32)
        self.wanted = _gated_norm(Near.exactly(self.o), self.z, self.weight, case.dtype)

    def check(self, subject: Subject) -> Finding:
        op, finding = self.taken(subject)
        o, z = (laid_out(x.to(subject.device), self.case.layout) for x in (self.o, self.z))
        weight = self.weight.to(subject.device)
        kept = Inputs(o=o, z=z, weight=weight)
        finding.near("the result", op(o, z, weight, _EPS), self.wanted, self.case.dtype)
        kept.unchanged(finding)
        return finding


class NetChecker(_Checker):
    """All of it, from what the linears give."""

    def prepare(self) -> None:
        case, source = self.case, self.source
        key_heads, value_heads, key_dim, value_dim = case.heads
        keys, values = key_heads * key_dim, value_heads * value_dim
        self.projected = self.normal(case.tokens, case.channels + values)
        self.rates = self.normal(case.tokens, 2 * value_heads)
        self.conv = self.normal(case.taps, case.channels)
        self.log_decay = torch.rand(value_heads, generator=source) * 6 - 4
        self.decay_bias, self.out_norm = (
            self.normal(n, dtype=torch.float32) for n in (value_heads, value_dim)
        )
        mixed, self.inputs = _conv(case, self.states, self.projected[:, : case.channels], self.conv)
        q, k, v = (
            Near(mixed.value[:, part].reshape(-1, *shape), mixed.error[:, part].reshape(-1, *shape))
            for part, shape in (
                (slice(keys), (key_heads, key_dim)),
                (slice(keys, 2 * keys), (key_heads, key_dim)),
                (slice(2 * keys, case.channels), (value_heads, value_dim)),
            )
        )
        b, a = self.rates.double().chunk(2, dim=-1)
        g = -self.log_decay.double().exp() * F.softplus(a + self.decay_bias.double())
        read, self.after = _delta(case, self.states, q, k, v, torch.sigmoid(b), g)
        z = self.projected[:, case.channels :].reshape(-1, value_heads, value_dim)
        near = _gated_norm(read, z, self.out_norm, case.dtype)
        self.wanted = Near(near.value.flatten(1), near.error.flatten(1))

    def check(self, subject: Subject) -> Finding:
        op, finding = self.taken(subject)
        case, device = self.case, subject.device
        projected = laid_out(self.projected.to(device), case.layout)
        rates = laid_out(self.rates.to(device), case.layout)
        own = {
            name: getattr(self, name).to(device) for name in ("conv", "log_decay", "decay_bias", "out_norm")
        }
        linear = cast("Packed", None)  # the seam lies between them
        weights = DeltaWeights(
            in_proj=linear, rates_proj=linear, out_proj=linear, **own, heads=case.heads, tiled=case.tiled
        )
        kept, state = Inputs(projected=projected, rates=rates, **own), self.states.on(device)
        decodes = case.op == "decode_delta_net"
        plan = self.states.decode_plan(device) if decodes else self.states.plan
        got = op(projected, rates, weights, _EPS, state, plan)
        finding.near("the result", got, self.wanted, case.dtype)
        kept.unchanged(finding)
        if state is not None:
            for slot, near in self.after.items():
                finding.same("the convolution's inputs", state.conv[slot].cpu(), self.inputs[slot])
                finding.near("a state", state.delta[slot], near, torch.float32)
            self.states.unchanged(finding, state, [*self.after])
        return finding
