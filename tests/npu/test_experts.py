"""Experts by the grouped operator, in numbers and in codes, beside the definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qwenrt.backends.ascend import calls, packing
from qwenrt.backends.ascend.backend import A2Backend
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.backends.selfcheck import random_weight, relative
from qwenrt.ops import reference
from qwenrt.ops.types import CanonicalWeight, Experts, stacked
from qwenrt.ops.weights import dequantize
from tests.npu import declared
from tests.npu.operators import OPERATORS

CPU, HALF = torch.device("cpu"), torch.float16
EXPERTS, WIDTH, INNER = 5, 128, 64


def weights(
    outputs: int, inputs: int, *, bits: int, group: int, order: bool, sym: bool
) -> list[CanonicalWeight]:
    made = []
    for seed in range(EXPERTS):
        weight = random_weight(outputs, inputs, bits, group, seed)
        if sym:
            weight = dataclasses.replace(weight, zeros=torch.full_like(weight.zeros, 1 << bits - 1))
        if order:
            perm = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed)).int()
            weight = dataclasses.replace(weight, perm=perm)
        made.append(weight)
    return made


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_stacked_codes_stand_for_exactly_the_matrices_of_the_experts(group: int, sym: bool) -> None:
    every = weights(INNER, WIDTH, bits=4, group=group, order=True, sym=sym)
    packed = [packing.pack(weight, HALF, CPU, 4) for weight in every]
    together = stacked(packed, A2Backend.stackable)
    assert together is not None and together.data["weight"].shape == (EXPERTS, WIDTH, INNER // 8)
    wanted = torch.stack([dequantize(dataclasses.replace(weight, perm=None), HALF).t() for weight in every])
    assert torch.equal(packing.dequantize(together, HALF), wanted)
    which, x = torch.tensor([4, 0, 4]), torch.randn(3, WIDTH).to(HALF)
    got = packing.linear_of_each(x, together, which)
    for row, expert in enumerate(which.tolist()):
        plain = reference.linear(x[row : row + 1], reference.pack(every[expert], HALF, CPU))
        assert relative(got[row : row + 1], plain) < 1e-2


@pytest.mark.parametrize(
    ("bits", "group", "order", "sym", "grouped"),
    [
        *((4, 32, False, False, True), (4, 64, True, True, True), (4, -1, False, True, True)),
        (8, 64, False, True, False),  # the operator takes int8 with one scale an output alone
        (16, 0, False, False, True),
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_tokens_get_what_their_experts_give_alone(
    bits: int, group: int, order: bool, sym: bool, grouped: bool, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, defined = declared.backend(A2Backend, "A2"), Backend(CPU)
    options = {"bits": bits, "group": group, "order": order, "sym": sym} if bits < 16 else None
    shapes = ((2 * INNER, WIDTH), (WIDTH, INNER))
    sides = [
        weights(*shape, **options) if options else [random_weight(*shape, 16, 0, e) for e in range(EXPERTS)]
        for shape in shapes
    ]
    source = torch.Generator().manual_seed(1)
    router = torch.randn(EXPERTS, WIDTH, generator=source).to(HALF)
    router[3] = -9  # chosen by no token, nearly
    x = torch.randn(7, WIDTH, generator=source).to(torch.float32 if wide else HALF)
    norm = torch.rand(WIDTH, generator=source).to(HALF)

    def packed(by: Backend) -> Experts:
        into, out = ([by.pack_linear(weight, HALF) for weight in side] for side in sides)
        return Experts(router, into, out, 2, True)

    called: list[dict[str, Any]] = []
    right = OPERATORS["npu_grouped_matmul"]

    def noted(*given: Any, **named: Any) -> Any:
        called.append(named)
        return right(*given, **named)

    monkeypatch.setitem(OPERATORS, "npu_grouped_matmul", noted)
    ours, wanted = packed(backend), defined.norm_moe_add(x, norm, 1e-6, packed(defined))
    assert (ours.stack(backend.stackable) is None) == grouped
    spec = OpSpec("norm_moe_add", "", HALF, kind=ours.gate_up[0].kind)
    assert (backend.why_not("norm_moe_add", spec) is None) == grouped
    for op in ("norm_moe_add", "norm_moe_add_each") if grouped else ("norm_moe_add",):
        assert relative(getattr(backend, op)(x, norm, 1e-6, ours), wanted) < 1e-2
    assert len(called) == (4 if grouped else 0)
    assert all(("antiquant_scale" in named) == (bits == 4) for named in called)


def test_a_torch_npu_that_takes_no_codes_there_is_named() -> None:
    backend = declared.backend(A2Backend, "A2")
    backend.misfits[calls.INT4_EXPERTS] = (
        "npu_grouped_matmul of this torch_npu has no argument antiquant_scale"
    )
    spec = OpSpec("norm_moe_add_each", "", HALF, kind="npu_int4")
    assert "antiquant_scale" in (backend.why_not("norm_moe_add_each", spec) or "")
    assert backend.why_not("norm_moe_add_each", dataclasses.replace(spec, kind="dense")) is None
