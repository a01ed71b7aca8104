"""How the operators of torch_npu are called, beside what its releases declare."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenrt.backends.ascend import calls
from qwenrt.backends.ascend.soc import family_of

RELEASES = ("2.1.0.post12", "2.6.0", "2.9.0", "2.10.0", "2.13.0", "2.14.0")


def declared_by(release: str) -> dict[str, Any]:
    return {
        op: torch._C.parse_schema(f"npu::{schema}")
        for op, releases, schema in calls.known_schemas()
        if release in releases
    }


@pytest.mark.parametrize("release", RELEASES)
def test_every_call_fits_what_a_release_declares(release: str) -> None:
    declared = declared_by(release)
    assert set(declared) == set(map(calls.operator, calls.CALLS))
    assert calls.misfits(declared.get) == {}


@pytest.mark.parametrize(
    ("op", "schema", "why"),
    [
        ("npu_rms_norm", None, "torch_npu has no npu_rms_norm"),
        (
            "npu_rms_norm",
            "(Tensor input, Tensor gamma, float eps=1e-06) -> (Tensor, Tensor)",
            "has no argument epsilon",
        ),
        (
            "npu_rms_norm",
            "(Tensor input, Tensor gamma, float epsilon=1e-06) -> Tensor",
            "gives 1 results, not 2",
        ),
        (
            "npu_rms_norm",
            "(Tensor x, Tensor g, float epsilon, int mode) -> (Tensor, Tensor)",
            "wants an argument mode",
        ),
        ("npu_swiglu", "(Tensor input, str dim) -> Tensor", "wants dim as str, not int"),
        ("npu_swiglu", "(Tensor[] input, int dim=-1) -> Tensor", "takes List[Tensor] first, not Tensor"),
        ("npu_swiglu", "(*, Tensor input, int dim=-1) -> Tensor", "takes nothing first"),
        ("npu_swiglu", "(Tensor input, int dim=-1, bool new=False) -> Tensor", None),
    ],
)
def test_what_does_not_fit_is_named_with_its_reason(op: str, schema: str | None, why: str | None) -> None:
    declared = declared_by("2.13.0")
    declared[op] = None if schema is None else torch._C.parse_schema(f"npu::{op}{schema}")
    found = calls.misfits(declared.get)
    assert set(found) == ({op} if why else set())
    assert why is None or why in found[op]


def test_releases_are_told_by_their_schemas() -> None:
    newer = declared_by("2.13.0")["npu_rotary_mul"]
    assert calls.releases_with("npu_rotary_mul", newer) == ("2.10.0", "2.13.0", "2.14.0")
    unseen = torch._C.parse_schema("npu::npu_rotary_mul(Tensor input) -> Tensor")
    assert calls.releases_with("npu_rotary_mul", unseen) == ()


def test_the_family_is_told_by_number_since_names_mislead() -> None:
    # 104 calls itself Ascend910B and is a 910A
    names = {
        number: family_of(number).name for number in (99, 100, 104, 200, 205, 220, 225, 240, 250, 256, 260)
    }
    assert names == {
        **{99: "unknown", 100: "910A", 104: "910A", 200: "310P", 205: "310P", 220: "A2", 225: "A2"},
        **{240: "unknown", 250: "A3", 256: "A3", 260: "unknown"},
    }
