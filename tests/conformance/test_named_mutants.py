"""The mistakes that were made in kernels elsewhere, each by name: the table finds every one on any device, without
kernels of the CPU's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import native
from qwenrt.conformance.run import chosen, run
from qwenrt.conformance.subjects import DEFINITION, Subject
from qwenrt.ops.steps import DecodePlan, LayerKV, StepPlan
from qwenrt.ops.types import CanonicalWeight, Experts, LoraSpan, Packed

CPU = torch.device("cpu")
T = torch.Tensor


def lengths(plan: StepPlan, change: Callable[[int, int], int]) -> StepPlan:
    lens = [change(q, n) for q, n in zip(plan.q_lens, plan.kv_lens, strict=True)]
    return dataclasses.replace(plan, kv_lens=lens)


class FlippedMask(Backend):
    """Each query sees one key of its future."""

    @native()
    def decode_attention(self, q: T, kv: LayerKV, plan: DecodePlan, scale: float, window: int = 0) -> T:
        later = dataclasses.replace(plan, position=plan.position + 1)
        return super().decode_attention(q, kv, later, scale, window)


class LengthOffByOne(Backend):
    @native()
    def attention(
        self, q: T, k: T, v: T, kv: LayerKV | None, plan: StepPlan, scale: float, window: int = 0
    ) -> T:
        return super().attention(q, k, v, kv, lengths(plan, lambda q, n: max(q, n - 1)), scale, window)


class NotCausal(Backend):
    @native()
    def attention(
        self, q: T, k: T, v: T, kv: LayerKV | None, plan: StepPlan, scale: float, window: int = 0
    ) -> T:
        out = super().attention(q, k, v, kv, plan, scale, window)
        if kv is None or not plan.q_lens or max(plan.q_lens) < 2 or kv.quantized:
            return out
        at = 0
        for n in plan.q_lens:  # the first query of each sequence sees what the last one sees
            out[at : at + (n > 1)] = out[at + n - 1 : at + n] if n > 1 else out[at:at]
            at += n
        return out


class ZeroPlusOneForgotten(Backend):
    def pack_linear(self, weight: CanonicalWeight, dtype: torch.dtype) -> Packed:
        if weight.zeros is not None:
            weight = dataclasses.replace(weight, zeros=weight.zeros - 1)
        return super().pack_linear(weight, dtype)


class WrongRotaryHalf(Backend):
    @native()
    def rotary(self, x: T, cos: T, sin: T) -> T:
        dim = cos.shape[-1]
        pairs = x[..., :dim].unflatten(-1, (2, dim // 2)).transpose(-1, -2).flatten(-2)
        return torch.cat((super().rotary(pairs, cos, sin), x[..., dim:]), dim=-1)


class StaleSlot(Backend):
    """The last token of a step is not stored."""

    @native()
    def store_kv(self, k: T, v: T, kv: LayerKV, slots: T) -> None:
        super().store_kv(k[:-1], v[:-1], kv, slots[:-1])


class GateAndUpSwapped(Backend):
    @native()
    def silu_and_mul(self, gate_up: T) -> T:
        return super().silu_and_mul(gate_up.roll(gate_up.shape[-1] // 2, -1))


class LogNIgnored(Backend):
    @native()
    def rotary_store_kv(
        self, qkv: T, heads: Any, norms: Any, cos: T, sin: T, q_scale: Any, *rest: Any
    ) -> Any:
        return super().rotary_store_kv(qkv, heads, norms, cos, sin, None, *rest)


class LastRowOfATile(Backend):
    """Outputs behind the last whole tile of 16 are not written."""

    @native()
    def linear(self, x: T, w: Packed) -> T:
        y = super().linear(x, w).clone()
        y[:, y.shape[1] // 16 * 16 :] = 0
        return y


class ExpertsOutOfOrder(Backend):
    """Each token's experts are the right ones, with each other's weights."""

    @native()
    def norm_moe_add(self, x: T, norm: T, eps: float, w: Experts) -> T:
        order = [*range(1, len(w.down)), 0]
        moved = dataclasses.replace(w, gate_up=[w.gate_up[i] for i in order], down=[w.down[i] for i in order])
        return super().norm_moe_add(x, norm, eps, moved)


class AdapterOfAnotherToken(Backend):
    """Each adapter begins a token too early."""

    @native()
    def add_lora(self, y: T, x: T, spans: Sequence[LoraSpan], bias: T | None = None) -> T:
        early = [dataclasses.replace(span, first=max(0, span.first - 1)) for span in spans]
        return super().add_lora(y, x, early, bias)


class DoraScalesTheBias(Backend):
    @native()
    def add_lora(self, y: T, x: T, spans: Sequence[LoraSpan], bias: T | None = None) -> T:
        return super().add_lora(y, x, spans, None)


MUTANTS: list[tuple[type[Backend], str]] = [
    (FlippedMask, "decode_attention"),
    (NotCausal, "attention"),
    (LengthOffByOne, "attention"),
    (ZeroPlusOneForgotten, "linear"),
    (WrongRotaryHalf, "rotary"),
    (StaleSlot, "store_kv"),
    (GateAndUpSwapped, "silu_and_mul"),
    (LogNIgnored, "rotary_store_kv"),
    (LastRowOfATile, "linear"),
    (ExpertsOutOfOrder, "norm_moe_add"),
    (AdapterOfAnotherToken, "add_lora"),
    (DoraScalesTheBias, "add_lora"),
]


@pytest.mark.parametrize(("mutant", "op"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_table_finds_it(mutant: type[Backend], op: str) -> None:
    subjects = [Subject(DEFINITION, Backend(CPU)), Subject("mutant", mutant(CPU))]
    todo = ((case, here) for case, here in chosen(subjects, ops=[op]) if here[0].name == "mutant")
    assert any(not outcome.finding.ok for outcome in run(todo))
