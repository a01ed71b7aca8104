"""Operators that are wrong in one way each, as releases were: the self-check finds every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwenrt.backends import selfcheck
from qwenrt.backends.ascend.backend import A2Backend
from tests.npu import declared
from tests.npu.operators import OPERATORS


def lengths_off_by_one(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
    fewer = [
        max(1, length - 1) if length > named["actual_seq_lengths"][0] else length
        for length in named["actual_seq_lengths_kv"]
    ]
    return right(*given, **named | {"actual_seq_lengths_kv": fewer})


def cut_at_512(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
    shorter = [max(min(n, 512), given[0].shape[1]) for n in named["actual_seq_lengths_kv"]]
    return right(*given, **named | {"actual_seq_lengths_kv": shorter})


def first_table_for_all(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
    table = named["block_table"]
    return right(*given, **named | {"block_table": table.flip(1).contiguous()})


def scale_forgotten(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return right(*given, **named | {"scale": 1.0})


def average_of_values(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return right(*given, **named | {"scale": 0.0})


def other_mode(right: Callable[..., Any], x: Any, *given: Any, **named: Any) -> Any:
    even = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    return right(even, *given, **named)


def sine_of_the_other_sign(right: Callable[..., Any], x: Any, cos: Any, sin: Any, **named: Any) -> Any:
    return right(x, cos, -sin, **named)


def epsilon_forgotten(right: Callable[..., Any], x: Any, gamma: Any, epsilon: float = 0) -> Any:
    return right(x, gamma, 1e-12)


def gamma_forgotten(right: Callable[..., Any], x: Any, gamma: Any, epsilon: float = 0) -> Any:
    return right(x, torch.ones_like(gamma), epsilon)


def halves_swapped(right: Callable[..., Any], x: Any, dim: int = -1) -> Any:
    return right(torch.cat(x.chunk(2, dim)[::-1], dim), dim)


def beside_its_slot(right: Callable[..., Any], x: Any, indices: Any, updates: Any) -> Any:
    return right(x, indices ^ 1, updates)


def offset_forgotten(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return right(*given, **named | {"antiquant_offset": None})


def offset_of_the_other_sign(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
    offset = named["antiquant_offset"]
    return right(*given, **named | {"antiquant_offset": None if offset is None else -offset})


def outputs_in_another_order(
    right: Callable[..., Any], x: Any, weight: Any, *given: Any, **named: Any
) -> Any:
    turned = weight.view(torch.uint8).view(*weight.shape, weight.element_size()).flip(-1)
    return right(x, turned.contiguous().view(weight.dtype).view(weight.shape), *given, **named)


def bias_forgotten(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return right(*given, **named | {"bias": None})


FIA, ROTARY = "npu_fused_infer_attention_score", "npu_rotary_mul"
CODES = "npu_weight_quant_batchmatmul"
MUTANTS = [
    *((FIA, wrong, {"attention"}) for wrong in (lengths_off_by_one, first_table_for_all, scale_forgotten)),
    *((FIA, wrong, {"attention"}) for wrong in (average_of_values, cut_at_512)),
    *((ROTARY, wrong, {"rotary"}) for wrong in (other_mode, sine_of_the_other_sign)),
    *(("npu_rms_norm", wrong, {"rms_norm"}) for wrong in (gamma_forgotten,)),
    ("npu_swiglu", halves_swapped, {"silu_and_mul"}),
    ("npu_scatter_nd_update_", beside_its_slot, {"store_kv"}),
    *((CODES, wrong, {"linear"}) for wrong in (offset_forgotten, offset_of_the_other_sign, bias_forgotten)),
    (CODES, outputs_in_another_order, {"linear"}),
]


@pytest.mark.parametrize(
    ("op", "wrong", "demoted"), MUTANTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_wrong_operator_is_found(
    op: str, wrong: Callable[..., Any], demoted: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = declared.backend(A2Backend, "A2")
    right = OPERATORS[op]
    monkeypatch.setitem(OPERATORS, op, lambda *given, **named: wrong(right, *given, **named))
    linears = [(24, 256, 4, 128), (16, 64, 8, 64)] if op == CODES else []
    assert demoted <= set(selfcheck.check(backend, torch.float16, (4, 2, 64), linears, torch.float16))
