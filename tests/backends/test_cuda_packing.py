"""Codes by rows: what goes in comes out, whatever the form; a file's are checked before a kernel trusts them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qwenrt.backends.cuda import packing
from qwenrt.backends.cuda.overrides import TritonBackend
from qwenrt.conformance.weights import FORMS, Form, random_weight
from qwenrt.ops.types import CanonicalWeight, Packed
from qwenrt.ops.weights import dequantize, with_codes

CPU = torch.device("cpu")
CODED = [form for form in FORMS if form.bits in (4, 8)]


def weight_of(form: Form, n: int = 7, k: int = 200) -> CanonicalWeight:
    return with_codes(
        random_weight(form, n, k, torch.float32, torch.Generator().manual_seed(1), bias=True).canonical
    )


@pytest.mark.parametrize("form", CODED, ids=str)
def test_codes_come_back_as_they_were(form: Form) -> None:
    weight = weight_of(form)
    packed = packing.pack(weight, torch.float32, CPU)
    if packed is None:
        assert weight.group_size % packing.GROUPS[0], "a group of 8 can be served"
        return
    back = packing.unpack(packed)
    assert weight.codes is not None and back.codes is not None
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(dequantize(back, torch.float64), dequantize(weight, torch.float64))
    assert packing.why_not_restored(packed) is None


def test_a_word_has_eight_inputs_of_one_output_neighbours_in_its_halves() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(16, 1).repeat(1, 2)
    codes[:, 1] = 15 - codes[:, 1]
    scales, zeros = torch.ones(2, 2), torch.full((2, 2), 8, dtype=torch.int16)
    weight = CanonicalWeight(codes=codes, scales=scales, zeros=zeros, bits=4, group_size=8)
    packed = packing.pack(weight, torch.float32, CPU)
    assert packed is not None
    words = [[int(word) & 0xFFFFFFFF for word in row] for row in packed.data["words"]]
    assert words == [[0x75316420, 0xFDB9ECA8], [0x8ACE9BDF, 0x02461357]]
    assert packed.data["zero"] == 8 and "zeros" not in packed.data


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_rows_of_a_linear_are_linears(rows: int) -> None:
    packed = packing.pack(weight_of(CODED[0]), torch.float32, CPU)
    assert packed is not None
    parts = packing.in_rows(packed, rows)
    assert [part.out_features for part in parts[:-1]] == [rows] * (len(parts) - 1)
    whole = torch.cat([dequantize(packing.unpack(part)) for part in parts])
    assert torch.equal(whole, dequantize(packing.unpack(packed)))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("words", lambda x: x[:, :-1], "is not"),
        ("words", lambda x: x.long(), "dtype"),
        ("scales", lambda x: x.t(), "is not"),
        ("zeros", lambda x: None, "not one of"),
        ("perm", lambda x: torch.full((200,), 200, dtype=torch.int32), "inputs that there are not"),
        ("perm", lambda x: torch.zeros(3, dtype=torch.int32), "is not"),
    ],
)
def test_a_kept_file_that_does_not_fit_is_refused(name: str, change: object, why: str) -> None:
    packed = packing.pack(weight_of(CODED[0]), torch.float32, CPU)
    assert packed is not None
    changed = change(packed.data[name])  # type: ignore[operator]
    packed.data[name] = changed
    if changed is None:
        del packed.data[name]
    assert why in (packing.why_not_restored(packed) or "")


def test_without_triton_everything_is_as_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenrt.backends.cuda import overrides

    backend = TritonBackend(CPU)
    backend.configure(kernels="off")
    assert "switched off" in (backend.provides("triton") or "")
    packed = backend.pack_linear(weight_of(CODED[0]), torch.float32)
    assert packed.kind == "w4a16" and backend.packing_id() == "torch torch-v1 torch"
    foreign = dataclasses.replace(packed, kind="rows4")
    assert backend.restore_packed(foreign) is not None
    monkeypatch.setattr(overrides, "missing_triton", lambda: "no Triton")
    assert TritonBackend(CPU).provides("triton") == "no Triton"
    assert isinstance(packed, Packed)
