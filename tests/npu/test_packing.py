"""Codes in the layout of npu_weight_quant_batchmatmul stand for exactly the matrix that they stood for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qwenrt.backends.ascend import packing
from qwenrt.backends.ascend.backend import A2Backend
from qwenrt.backends.ascend.older import A910Backend, P310Backend
from qwenrt.ops import reference
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize
from tests.npu import declared

CPU, HALF = torch.device("cpu"), torch.float16


def weight(
    bits: int, group: int, *, sym: bool = False, perm: bool = False, outputs: int = 24
) -> CanonicalWeight:
    source = torch.Generator().manual_seed(bits)
    inputs, middle = 256, 1 << bits - 1
    codes = torch.randint(0, 1 << bits, (inputs, outputs), dtype=torch.uint8, generator=source)
    scales = (torch.rand(-(-inputs // group), outputs, generator=source) / 64).half()
    zeros = torch.randint(0, (1 << bits) + 1, scales.shape, dtype=torch.int16, generator=source)
    zeros = torch.full_like(zeros, middle) if sym else zeros
    order = torch.randperm(inputs, generator=source).int() if perm else None
    bias = torch.linspace(-1, 1, outputs)
    return CanonicalWeight(
        codes=codes, scales=scales, zeros=zeros, bits=bits, group_size=group, perm=order, bias=bias
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("as_bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, 96, 256])
@pytest.mark.parametrize("sym", [True, False])
def test_the_matrix_is_the_same_to_the_bit(bits: int, as_bits: int, group: int, sym: bool) -> None:
    if bits > as_bits:
        pytest.skip("codes only become wider")
    canonical = weight(bits, group, sym=sym)
    packed = packing.pack(canonical, HALF, CPU, as_bits)
    assert (packed.data["offset"] is None) == sym
    assert torch.equal(packing.dequantize(packed, HALF), dequantize(canonical, HALF).t())
    assert packing.restore(packed) is None


def test_the_first_of_eight_outputs_lies_in_the_lowest_bits() -> None:
    # what torch_npu's own npu_convert_weight_to_int4pack makes of -8 .. 7
    canonical = CanonicalWeight(
        codes=torch.arange(16, dtype=torch.uint8).expand(32, 16),
        scales=torch.ones(1, 16).half(),
        zeros=torch.full((1, 16), 8, dtype=torch.int16),
        bits=4,
        group_size=32,
    )
    words = packing.pack(canonical, HALF, CPU, 4).data["weight"]
    assert [hex(word & 0xFFFFFFFF) for word in words[0].tolist()] == ["0xfedcba98", "0x76543210"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_those_of_the_definition(dtype: torch.dtype) -> None:
    backend = declared.backend(A2Backend, "A2")
    for canonical in (weight(4, 128, perm=True), weight(8, 256), weight(4, 32, sym=True)):
        scales = canonical.scales
        assert scales is not None
        exact = dataclasses.replace(canonical, scales=scales.to(dtype).half())
        packed = backend.pack_linear(exact, dtype)
        assert packed.kind in packing.KINDS.values()
        x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
        wanted = reference.linear(x.float(), reference.pack(exact, torch.float32, CPU))
        assert (backend.linear(x, packed).float() - wanted).abs().max() < 0.02 * wanted.abs().max()
        x.requires_grad_()
        backend.linear(x, packed).sum().backward()
        assert x.grad is not None and bool(x.grad.isfinite().all())


def test_a_matrix_too_wide_for_the_operator_becomes_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_MOST", 20)
    monkeypatch.setattr(packing, "_WIDE", 16)
    canonical = weight(4, 128)
    packed = packing.pack(canonical, HALF, CPU, 4)
    assert [part.out_features for part in packed.data["parts"]] == [16, 8]
    columns = [packing.dequantize(part, HALF) for part in packed.data["parts"]]
    assert torch.equal(torch.cat(columns, 1), dequantize(canonical, HALF).t())


def test_what_cannot_be_exact_is_left_to_the_definition_with_the_reason() -> None:
    fine = weight(4, 128)
    assert fine.scales is not None and fine.zeros is not None
    offsets = dataclasses.replace(fine, zeros=None, offsets=torch.zeros(2, 24))
    cases = {
        "no multiple of 32": weight(4, 20),
        "do not fill words": weight(4, 128, outputs=20),
        "scales that float16 does not hold": dataclasses.replace(
            fine, scales=fine.scales.float() * (1 + 2**-15)
        ),
        "offsets of float32": offsets,
    }
    backend = declared.backend(A2Backend, "A2")
    for why, canonical in cases.items():
        assert why in (packing.why_not(canonical, HALF) or "")
        assert backend.pack_linear(canonical, HALF).kind == "w4a16"
    assert 'dtype="float16"' in (packing.why_not(weight(8, 128), torch.bfloat16) or "")


def test_a_file_of_packed_weights_is_looked_at() -> None:
    packed = packing.pack(weight(4, 128), HALF, CPU, 4)
    packed.data["weight"] = packed.data["weight"][1:]
    assert "weight of a weight of kind npu_int4" in (packing.restore(packed) or "")


@pytest.mark.parametrize(
    ("family", "kernels", "kind"),
    [
        *(("310P", "auto", packing.NZ), ("310P", "plain", "dense"), ("310P", "off", "dense")),
        *(
            ("A2", "auto", "dense"),
            ("A2", "nz", packing.NZ),
            ("910A", "nz", "dense"),
            ("A2", "avx2", "dense"),
        ),
    ],
)
def test_dense_weights_are_in_nz_where_it_helps_or_is_asked_for(family: str, kernels: str, kind: str) -> None:
    backend = declared.backend({"A2": A2Backend, "310P": P310Backend, "910A": A910Backend}[family], family)
    backend.configure(kernels)
    dense = CanonicalWeight(dense=torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    packed = backend.pack_linear(dense, HALF)
    assert packed.kind == kind and backend.restore_packed(packed) is None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(HALF)
    wanted = reference.linear(x, reference.pack(dense, HALF, CPU))
    assert torch.equal(backend.linear(x, packed), wanted)
    x.requires_grad_()
    backend.linear(x, packed).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    for other in (dataclasses.replace(dense, shared=True), CanonicalWeight(dense=torch.ones(24, 64))):
        assert backend.pack_linear(other, HALF).kind == "dense"  # tied to the embedding; no whole tiles
    assert backend.overrides("linear") is False or (kernels == "off") == ("linear" in backend.demoted)
