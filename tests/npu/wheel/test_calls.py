"""Calls as this project makes them, beside schemas, Meta kernels and the host's checks of the real torch_npu."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from qwenrt.backends.ascend import calls, fused, int8_cache, packing
from qwenrt.backends.selfcheck import random_weight
from qwenrt.ops.steps import LayerKV, StepPlan
from qwenrt.ops.types import Experts, Packed

LAUNCHES = json.loads(Path(__file__).with_name("kernels.json").read_text(encoding="utf-8"))
RECORDED = "2.13."  # the release with which kernels.json was recorded
HALF = torch.float16


def test_schemas_are_those_that_are_known() -> None:
    assert calls.misfits() == {}
    for op in calls.CALLS:
        assert calls.releases_with(op, calls.installed(op)), op


def made(device: str) -> dict[str, Callable[[], Any]]:
    """Each operator as the backend calls it, with tensors on a device; what it computes is of no interest."""

    def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def coded(bits: int, group: int, dtype: torch.dtype) -> Packed:
        weight = dataclasses.replace(random_weight(64, 256, bits, group), bias=torch.ones(64))
        packed = packing.pack(weight, dtype, torch.device("cpu"), bits)
        packed.data = {name: None if x is None else x.to(device) for name, x in packed.data.items()}
        return packed

    def attention(q_lens: list[int], kv_lens: list[int], *, codes: bool = False) -> torch.Tensor:
        shape = (6, 128, 2, 64)
        kv = LayerKV(empty(*shape), empty(*shape))
        if codes:
            kv = int8_cache.signed_cache(shape, lambda size, of: empty(*size, dtype=of))
        tables = [[i, i + 1] for i in range(len(q_lens))]
        plan = StepPlan(q_lens, kv_lens, None, tables)
        mask = empty(2048, 2048, dtype=torch.bool)
        return fused.attention(empty(sum(q_lens), 4, 64), kv, plan, 0.125, mask)

    def experts(*, codes: bool) -> Callable[[], torch.Tensor]:
        if codes:
            one = coded(4, 128, HALF)
            one.bias = one.data["bias"] = None
            into, out = [one] * 4, [one] * 4
        else:
            into, out = ([Packed("dense", n, 32, {"weight": empty(n, 32)})] * 4 for n in (64, 32))
        w = Experts(empty(4, into[0].in_features), into, out, 2, True)
        assert w.stack(("dense", "npu_int4")) is None and fused.takes_grouped(w)
        x = empty(5, into[0].in_features)
        halved = fused.silu_and_mul if not codes else lambda y: empty(len(y), 256)
        return lambda: fused.experts(x, w, torch.float32, halved)

    bfloat16 = torch.bfloat16
    return {
        "rms_norm": lambda: fused.rms_norm(empty(7, 256), empty(256), 1e-6, None),
        "rms_norm wide": lambda: fused.rms_norm(empty(7, 256, dtype=torch.float32), empty(256), 1e-6, None),
        "rotary": lambda: fused.rotary(
            empty(7, 6, 128), *(empty(7, 128, dtype=torch.float32) for _ in range(2))
        ),
        "silu_and_mul": lambda: fused.silu_and_mul(empty(7, 512)),
        "store_kv": lambda: fused.store_kv(
            *(empty(3, 2, 64) for _ in range(2)),
            LayerKV(empty(6, 128, 2, 64), empty(6, 128, 2, 64)),
            empty(3, dtype=torch.int64),
        ),
        "int4 in groups": lambda: fused.linear(empty(7, 256), coded(4, 128, HALF)),
        "int8 in groups": lambda: fused.linear(empty(7, 256), coded(8, 64, HALF)),
        "int8 whole": lambda: fused.linear(empty(7, 256), coded(8, -1, HALF)),
        "int4 bfloat16": lambda: fused.linear(empty(7, 256, dtype=bfloat16), coded(4, 32, bfloat16)),
        "prompt": lambda: attention([200], [200]),
        "piece of a prompt": lambda: attention([60], [200]),
        "decoding": lambda: attention([1, 1, 1], [200, 3, 129]),
        "both": lambda: attention([1, 1, 30], [200, 3, 129]),
        "decoding over codes": lambda: attention([1, 1, 1], [200, 3, 129], codes=True),
        "piece of a prompt over codes": lambda: attention([60], [200], codes=True),
        "experts": experts(codes=False),
        "experts in int4": experts(codes=True),
    }


SHAPES = {
    **{"rms_norm": (7, 256), "rms_norm wide": (7, 256), "rotary": (7, 6, 128), "silu_and_mul": (7, 256)},
    **{
        "store_kv": None,
        "experts": (5, 32),
        "experts in int4": (5, 64),
        "prompt": (200, 4, 64),
        "piece of a prompt": (60, 4, 64),
    },
    **{"decoding": (3, 4, 64), "both": (32, 4, 64), "decoding over codes": (3, 4, 64)},
    "piece of a prompt over codes": (60, 4, 64),
}


@pytest.mark.parametrize("name", sorted(made("cpu")))
def test_meta_kernels_give_the_shapes_that_are_expected(name: str) -> None:
    with _disable_current_modes():
        out = made("meta")[name]()
    wanted = SHAPES.get(name, (7, 64))
    assert out is None if wanted is None else tuple(out.shape) == wanted


@contextmanager
def kernels() -> Iterator[list[str]]:
    """The names of CANN's operators that torch_npu launches meanwhile, its own checks before them included."""
    library, names = ctypes.CDLL("libopapi.so"), []
    with _disable_current_modes():
        torch.get_device_module("npu").synchronize()  # a thread of torch_npu's launches what was asked before
    told = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda name: names.append(name.decode()))
    library.stand_in_hook(told)
    try:
        with _disable_current_modes():
            yield names
            torch.get_device_module("npu").synchronize()
    finally:
        library.stand_in_hook(None)


@pytest.mark.parametrize("name", sorted(made("cpu")))
def test_what_torch_npu_launches(name: str, family: str) -> None:
    if family not in ("A2", "A3"):
        pytest.skip("other operators serve there")
    with _disable_current_modes():
        call = made("npu")[name]
    with kernels() as names:
        call()
    told = str if torch.__version__.startswith(RECORDED) else _plain
    assert [*map(told, names)] == [*map(told, LAUNCHES[name])]


def _plain(kernel: str) -> str:
    """Without what differs between releases: a kernel's version, and how a copy of another dtype is made."""
    return re.sub(r"V\d+$", "", kernel).replace("aclnnInplaceCopy", "aclnnCast")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (
            lambda n, e: n.npu_weight_quant_batchmatmul(
                e(7, 256), e(256, 8, dtype=torch.int32), e(3, 64), antiquant_group_size=100
            ),
            "group",
        ),
        (
            lambda n, e: n.npu_weight_quant_batchmatmul(
                e(7, 255), e(256, 8, dtype=torch.int32), e(2, 64), antiquant_group_size=128
            ),
            "K|dim",
        ),
        (
            lambda n, e: n.npu_rotary_mul(
                e(1, 7, 4, 128), e(1, 7, 1, 128), e(1, 7, 1, 128), rotary_mode="other"
            ),
            "mode",
        ),
        (lambda n, e: n.npu_rms_norm(e(7, 256), e(256), eps=1e-6), "eps"),
    ],
)
def test_torch_npu_itself_refuses_what_is_wrong(
    wrong: Callable[..., Any], complaint: str, family: str
) -> None:
    if family not in ("A2", "A3"):
        pytest.skip("looked at there")
    with _disable_current_modes(), pytest.raises(RuntimeError, match=complaint):
        wrong(torch.ops.npu, lambda *shape, dtype=HALF: torch.empty(*shape, dtype=dtype, device="npu"))


def test_weights_in_nz_are_really_that_and_results_are_not(family: str) -> None:
    """Without internal formats torch_npu gives the weight back as it was, with a warning at most."""
    if family not in ("A2", "310P"):
        pytest.skip("not kept in NZ there")
    with _disable_current_modes():
        torch.get_device_module("npu").config.allow_internal_format = False
        packed = packing.in_nz(
            Packed("dense", 64, 128, {"weight": torch.empty(64, 128, dtype=HALF, device="npu")})
        )
        x = torch.empty(3, 128, dtype=HALF, device="npu")
    with kernels() as names:
        y = fused.nz_linear(x, packed)
    weight = packed.data["weight"]
    with _disable_current_modes():
        formats = [int(torch.ops.npu.get_npu_format(one)) for one in (weight, y, packing.as_nd(weight))]
    assert formats == [29, 2, 2] and weight.shape == (64, 128)
    if family == "A2":  # on 310P releases differ in whether they have that kernel
        assert names == ["aclnnMatmulWeightNz"]
