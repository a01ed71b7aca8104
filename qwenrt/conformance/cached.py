"""Ops that write and read the paged cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from qwenrt.backends.base import Backend
from qwenrt.conformance import bounds, steps
from qwenrt.conformance.bounds import Near
from qwenrt.conformance.case import TOKENS, Case, Checker, generator
from qwenrt.conformance.compare import CONTIGUOUS, Finding, Inputs, laid_out, last_rows
from qwenrt.conformance.rows import angles
from qwenrt.conformance.subjects import Subject
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, LayerKV, StepPlan

CPU = torch.device("cpu")
NO_CACHE, FLOAT, INT8, FITTED = "no cache", "float cache", "int8 cache", "fitted int8 cache"
_EPS = 1e-6


@dataclass(frozen=True)
class CacheCase(Case):
    """store_kv and rotary_store_kv. ``heads``: (H, KVH, hd). ``head_norms``, ``log_n``: what is done to queries and
    keys beside the rotation, of which ``half`` turns half of the channels."""

    cache: str = FLOAT
    heads: tuple[int, int, int] = (4, 2, 64)
    block_size: int = 16
    head_norms: bool = False
    log_n: bool = False
    half: bool = False
    layout: str = CONTIGUOUS

    @property
    def kind(self) -> str:
        return self.cache

    @property
    def int8(self) -> bool:
        return self.cache in (INT8, FITTED)

    def checker(self) -> Checker:
        return StoreChecker(self) if self.op == "store_kv" else RotaryStoreChecker(self)


def scattered(tokens: int, block_size: int, source: torch.Generator) -> tuple[list[int], int]:
    """Slots for so many tokens, in any order, and how many blocks there are. No slot is of the last block: what is
    written past the others is seen there."""
    blocks = -(-tokens // block_size) + 2
    slots = torch.randperm((blocks - 1) * block_size, generator=source)[:tokens].tolist()
    return slots, blocks


def check_side(finding: Finding, what: str, held: dict[str, torch.Tensor], side: str, x: Near) -> None:
    """Codes of x [T, KVH, hd], scale and zero of each row: they stand for what was stored, to half a step, and the step
    is a 255th of the row's range."""
    codes, scale, zero = (held[f"{side}{part}"].cpu().double() for part in ("", "_scale", "_zero"))
    if held[side].dtype == torch.int8:  # the other form of the same codes
        codes, zero = codes + 128, (zero - 128) * scale
        scale = scale.masked_fill((codes == 0).all(-1), 0.0)  # of a constant row it is any
    off = x.error.amax(-1) + 4 * bounds.FLOAT32 * x.value.abs().amax(-1)  # of the row's ends
    low, high = x.value.amin(-1), x.value.amax(-1)
    finding.near(f"{what}: zero", zero.float(), Near(low, off), torch.float32)
    step = (high - low) / 255
    finding.near(
        f"{what}: scale", scale.float(), Near(step, 2 * off / 255 + 4 * bounds.FLOAT32 * step), torch.float32
    )
    stands_for = codes * scale.unsqueeze(-1) + zero.unsqueeze(-1)
    allowed = x.error + (3 * off + 0.502 * step).unsqueeze(-1)
    finding.near(what, stands_for.float(), Near(x.value, allowed), torch.float32)


def check_cache(
    finding: Finding,
    kv: LayerKV,
    before: dict[str, torch.Tensor],
    slots: list[int],
    k: Near,
    v: torch.Tensor,
) -> None:
    """Each token's key and value are in its slot, and every other slot is as it was. A stored float key is rounded to
    the cache's dtype, a value is stored as it is."""
    after = steps.contents(kv)
    index = torch.tensor([i for i, slot in enumerate(slots) if slot >= 0], dtype=torch.int64)
    used = torch.tensor([slot for slot in slots if slot >= 0], dtype=torch.int64)
    others = torch.ones(len(after["k"]), dtype=torch.bool)
    others[used] = False
    for name, x in after.items():
        finding.same(f"{name} of another slot", x.cpu()[others], before[name].cpu()[others])
    held = {name: x.cpu()[used] for name, x in after.items()}
    tokens = f"of {len(slots)} tokens"
    if not len(index):
        return
    if kv.quantized:
        check_side(finding, f"keys stored {tokens}", held, "k", k.rows(index))
        check_side(finding, f"values stored {tokens}", held, "v", Near.exactly(v[index]))
    else:
        finding.near(f"keys stored {tokens}", held["k"], k.rows(index), held["k"].dtype)
        finding.same(f"values stored {tokens}", held["v"], v[index])


class StoreChecker:
    def __init__(self, case: CacheCase) -> None:
        self.case, source = case, generator(case)
        _, kv_heads, head_dim = case.heads
        shape = (max(TOKENS), kv_heads, head_dim)
        self.k, self.v = (torch.randn(shape, generator=source).to(case.dtype) for _ in range(2))
        self.k[-1, 0], self.v[-3] = -3.25, 0.0  # constant rows
        self.slots = {tokens: scattered(tokens, case.block_size, source) for tokens in TOKENS}

    def check(self, subject: Subject) -> Finding:
        case, finding = self.case, Finding()
        op, finding.served = subject.resolve("store_kv", case.dtype, head_dim=case.heads[2])
        k, v = (laid_out(x.to(subject.device), case.layout) for x in (self.k, self.v))
        kept = Inputs(k=k, v=v)
        for tokens, (slots, blocks) in self.slots.items():
            kv = steps.empty_cache(
                subject.backend, blocks, case.block_size, case.heads[1:], case.dtype, int8=case.int8
            )
            before = {name: x.clone() for name, x in steps.contents(kv).items()}
            here = steps.slots_tensor(subject.backend, slots)
            op(last_rows(k, tokens), last_rows(v, tokens), kv, here)
            now = Near.exactly(last_rows(self.k, tokens))
            check_cache(finding, kv, before, slots, now, last_rows(self.v, tokens))
        kept.unchanged(finding)
        return finding


class RotaryStoreChecker:
    def __init__(self, case: CacheCase) -> None:
        self.case, source = case, generator(case)
        num_heads, kv_heads, head_dim = case.heads
        tokens = max(TOKENS)
        width = (num_heads + 2 * kv_heads) * head_dim
        qkv = torch.randn(tokens, width, generator=source)
        qkv[-2] *= 1e-3  # as small as eps
        qkv[-3, -head_dim:] = -3.25  # all of a value alike
        self.qkv = qkv.to(case.dtype)
        weights = (1 + torch.randn(2, head_dim, generator=source)).to(case.dtype)
        self.norms = (weights[0], weights[1], _EPS) if case.head_norms else None
        self.cos, self.sin = angles(tokens, head_dim // (2 if case.half else 1), source)
        self.q_scale = torch.rand(tokens, generator=source) + 0.5 if case.log_n else None
        fit = torch.randn(2, kv_heads, head_dim, generator=source)
        self.fit = (fit[0], fit[1].exp2()) if case.cache == FITTED else None
        self.slots = {n: scattered(n, case.block_size, source) for n in TOKENS}

    @cached_property
    def near(self) -> tuple[Near, Near, torch.Tensor]:
        """Queries and keys of all tokens with what a backend may be off by, and values, which are only passed on."""
        case, (num_heads, kv_heads, head_dim) = self.case, self.case.heads
        rows = self.qkv.view(len(self.qkv), -1, head_dim)
        qk, v = rows.split_with_sizes((num_heads + kv_heads, kv_heads), dim=1)
        q, k = map(Near.exactly, qk.split_with_sizes((num_heads, kv_heads), dim=1))
        unit = bounds.unit(case.dtype)
        if self.norms is not None:
            q = bounds.rms_norm(q, self.norms[0], _EPS, case.dtype)
            k = bounds.rms_norm(k, self.norms[1], _EPS, case.dtype)
        q, k = (bounds.rotary(x, self.cos, self.sin, case.dtype) for x in (q, k))
        if self.q_scale is not None:
            by = self.q_scale[:, None, None]
            q = Near(q.value * by, q.error * by).rounded(2 * unit)
        if self.fit is not None:
            offset, factor = (x.double() for x in self.fit)
            by = factor.repeat_interleave(num_heads // kv_heads, 0)
            q = Near(q.value * by, q.error * by).rounded(2 * unit)
            off = k.error + 4 * bounds.FLOAT32 * (k.value.abs() + offset.abs())
            k = Near((k.value - offset) / factor, off / factor)
        return q, k, v

    @cached_property
    def defined(self) -> tuple[torch.Tensor, ...]:
        """Rotated queries, keys and values of all tokens, as the definition has them in float64."""
        case = self.case
        defined, slots = Backend(CPU), list(range(len(self.qkv)))
        norms = self.norms and (self.norms[0].double(), self.norms[1].double(), _EPS)
        args = (self.qkv.double(), case.heads, norms, self.cos, self.sin, self.q_scale)
        kv = None
        if self.fit is not None:
            kv = steps.empty_cache(
                defined, len(slots), 1, case.heads[1:], torch.float64, int8=True, fit=self.fit
            )
        plan = steps.to_slots(defined, slots, len(slots))
        return steps.rotate_and_store(defined.rotary_store_kv, args, kv, plan)

    def check(self, subject: Subject) -> Finding:
        case, finding, backend = self.case, Finding(), subject.backend
        op, finding.served = subject.resolve("rotary_store_kv", case.dtype, head_dim=case.heads[2])
        qkv = laid_out(self.qkv.to(subject.device), case.layout)
        cos, sin = self.cos.to(subject.device), self.sin.to(subject.device)
        q_scale = None if self.q_scale is None else self.q_scale.to(subject.device)
        norms = self.norms and (*(x.to(subject.device) for x in self.norms[:2]), _EPS)
        kept = Inputs(qkv=qkv, cos=cos, sin=sin, q_scale=q_scale)
        near_q, near_k, v = self.near
        wanted_q, wanted_k = (Near(x, n.error) for x, n in zip(self.defined, (near_q, near_k)))
        for tokens, (slots, blocks) in self.slots.items():
            turn = (last_rows(cos, tokens), last_rows(sin, tokens))
            log_n = None if q_scale is None else last_rows(q_scale, tokens)
            args = (last_rows(qkv, tokens), case.heads, norms, *turn, log_n)
            kv, before = None, {}
            plan = steps.without_cache([tokens])
            if case.cache != NO_CACHE:
                kv = steps.empty_cache(
                    backend, blocks, case.block_size, case.heads[1:], case.dtype, int8=case.int8, fit=self.fit
                )
                before = {name: x.clone() for name, x in steps.contents(kv).items()}
                plan = steps.to_slots(backend, slots, blocks)
            got = steps.rotate_and_store(op, args, kv, plan)
            rows = torch.arange(len(qkv) - tokens, len(qkv))
            now_q, now_k = wanted_q.rows(rows), wanted_k.rows(rows)
            k_dtype = torch.float32 if self.fit is not None else case.dtype
            finding.near(f"queries of {tokens} tokens", got[0], now_q, case.dtype)
            finding.near(f"keys of {tokens} tokens", got[1], now_k, k_dtype)
            finding.same(f"values of {tokens} tokens", got[2].cpu(), v[rows])
            if kv is not None:
                check_cache(finding, kv, before, slots, now_k, v[rows])
        kept.unchanged(finding)
        return finding


# ---- attention


@dataclass(frozen=True)
class AttentionCase(Case):
    """``lens``: of each sequence how many tokens it has now and in the cache. ``sharp``: scores so large that few keys
    have nearly all the weight. ``not_finite``: one query has NaN. ``both_ways``: each token sees all of its
    sequence."""

    cache: str = FLOAT
    heads: tuple[int, int, int] = (4, 2, 64)
    lens: tuple[tuple[int, int], ...] = ((1, 5),)
    window: int = 0
    block_size: int = 16
    sharp: bool = False
    not_finite: bool = False
    both_ways: bool = False
    layout: str = CONTIGUOUS

    @property
    def kind(self) -> str:
        return f"{self.cache}, window" if self.window else self.cache

    def checker(self) -> Checker:
        return AttentionChecker(self)


class AttentionChecker:
    """Every slot that belongs to no token holds NaN, whole blocks of them too."""

    def __init__(self, case: AttentionCase) -> None:
        self.case, source = case, generator(case)
        num_heads, kv_heads, head_dim = case.heads
        self.scale = head_dim**-0.5 * 1.1
        lens = case.lens if case.cache != NO_CACHE else tuple((q, q) for q, _ in case.lens)
        self.sequences = steps.Sequences(lens, case.block_size)
        self.slots = [slot for slots in self.sequences.slots() for slot in slots]
        q_lens, kv_lens = [q for q, _ in lens], [n for _, n in lens]
        self.q_lens = q_lens
        shape = (sum(kv_lens), kv_heads, head_dim)
        self.keys, self.values = (torch.randn(shape, generator=source).to(case.dtype) for _ in range(2))
        ends = torch.tensor(kv_lens).cumsum(0).tolist()
        now = [i for q, end in zip(q_lens, ends, strict=True) for i in range(end - q, end)]
        self.q = torch.randn(len(now), num_heads, head_dim, generator=source) * (4 if case.sharp else 1)
        if case.not_finite and len(now):
            self.q[-1, 0, 0] = torch.nan
        self.q = self.q.to(case.dtype)
        self.k, self.v = self.keys[now], self.values[now]

    def _defined(self, values: torch.Tensor) -> torch.Tensor:
        case, defined = self.case, Backend(CPU)
        q, k = self.q.double(), self.k.double()
        now = values if case.cache == NO_CACHE else self._now(values)
        if case.cache == NO_CACHE:
            plan = steps.without_cache(self.q_lens, causal=not case.both_ways)
            return steps.attend(reference.attention, (q, k, now), None, plan, self.scale, case.window)
        kv = self._cache(defined, torch.float64, values)
        plan = steps.over_cache(defined, self.sequences)
        return steps.attend(reference.attention, (q, k, now), kv, plan, self.scale, case.window)

    def _now(self, values: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([n for _, n in self.sequences.lens]).cumsum(0).tolist()
        return values[[i for q, end in zip(self.q_lens, ends) for i in range(end - q, end)]]

    def _cache(self, backend: Backend, dtype: torch.dtype, values: torch.Tensor) -> LayerKV:
        case = self.case
        kv = steps.empty_cache(
            backend,
            self.sequences.num_blocks,
            case.block_size,
            case.heads[1:],
            dtype,
            int8=case.cache == INT8,
        )
        steps.put(kv, self.keys.to(dtype), values.to(dtype), self.slots)
        return kv

    @cached_property
    def near(self) -> Near:
        """A weight of the softmax is off by what its score is, twice, and where weights are rounded for the second
        product, by that; errors of results add up with the sizes of values, which attention over them weighs."""
        case = self.case
        value = self._defined(self.values.double())
        spread = self._defined(self.values.double().abs()) + 1e-6
        scores = self.q.double().norm(dim=-1, keepdim=True)
        if len(self.keys):
            scores = scores * self.keys.double().norm(dim=-1).max() * self.scale
        apart = 3 if case.cache == INT8 else 1  # a kernel may add up codes and zeros of keys apart
        off = (16 + 4 * apart * scores) * bounds.FLOAT32
        if case.dtype != torch.float32:
            off = off + (4 + scores / 2) * bounds.unit(case.dtype)
        if case.cache == INT8 and len(self.keys):
            # Sizes have codes of their own, a step away at most. Codes and zeros of values may be added up apart too: a
            # value near zero is then a code and a zero that are far from it.
            largest, longest = self.values.double().abs().max(), max(n for _, n in self.sequences.lens)
            terms = min(longest, case.window or longest)
            return Near(value, off * (spread + largest / 255) + bounds.sums(terms) * 2 * largest)
        return Near(value, off * spread)

    def _rounded(self, near: Near) -> Near:
        """Where a backend's settings allow queries and weights to be rounded to 16 bits beside codes: 4 standard
        deviations of a score, and of what a row's weights, of the largest at most, take from values or add to them."""
        if not len(self.keys):
            return near
        sigma = 1 / (32767 * math.sqrt(12))
        longest = max(n for _, n in self.sequences.lens)
        terms = min(longest, self.case.window or longest)
        values = self.values.double().abs()
        lengths = self.keys.double().norm(dim=-1).max() * self.scale
        scores = 4 * sigma * self.q.double().abs().amax(-1, keepdim=True) * lengths
        spread = self._defined(values) + values.max() / 255
        weights = 4 * sigma * math.sqrt(terms) * values.max()
        return Near(near.value, near.error + 2 * scores * spread + weights)

    def check(self, subject: Subject) -> Finding:
        case, finding, backend = self.case, Finding(), subject.backend
        op, finding.served = subject.resolve(case.op, case.dtype, head_dim=case.heads[2])
        qkv = tuple(laid_out(x.to(subject.device), case.layout) for x in (self.q, self.k, self.v))
        kv, held = None, {}
        plan: StepPlan | DecodePlan = steps.without_cache(self.q_lens, causal=not case.both_ways)
        if case.cache != NO_CACHE:
            kv = self._cache(backend, case.dtype, self.values)
            held = steps.contents(kv)
            decodes = case.op == "decode_attention"
            plan = (steps.decode_plan if decodes else steps.over_cache)(backend, self.sequences)
        kept = Inputs(q=qkv[0], k=qkv[1], v=qkv[2], **{f"cache.{name}": x for name, x in held.items()})
        got, wanted = steps.attend(op, (qkv[0], qkv[1], qkv[2]), kv, plan, self.scale, case.window), self.near
        if subject.rounding and case.cache == INT8:
            wanted = self._rounded(wanted)
        # what becomes of that query is left open: torch's fused kernels give numbers
        if case.not_finite and len(got):
            got, value = got.clone(), wanted.value.clone()
            got[-1, 0] = value[-1, 0] = 0
            wanted = Near(value, wanted.error.nan_to_num())
        finding.near("the result", got, wanted, case.dtype)
        kept.unchanged(finding)
        return finding
