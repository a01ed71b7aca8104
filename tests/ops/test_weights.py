"""Canonical weights with their outputs in another order."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qwenrt.backends.selfcheck import random_weight
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize, pack_words, take_rows, with_codes

ROWS, COLUMNS = 24, 64


def made(form: str) -> CanonicalWeight:
    bias = torch.randn(ROWS)
    if form == "dense":
        return CanonicalWeight(dense=torch.randn(ROWS, COLUMNS), bias=bias)
    weight = dataclasses.replace(random_weight(ROWS, COLUMNS, int(form[-1]), 16, seed=1), bias=bias)
    assert weight.codes is not None
    if form.startswith("words"):
        words = pack_words(weight.codes, weight.bits)
        halves = (words[:, :8].contiguous(), words[:, 8:].contiguous())
        return dataclasses.replace(weight, codes=None, words=halves, num_inputs=COLUMNS)
    if form.startswith("offsets"):
        return dataclasses.replace(weight, zeros=None, offsets=torch.randn(COLUMNS // 16, ROWS))
    if form.startswith("perm"):
        return dataclasses.replace(weight, perm=torch.randperm(COLUMNS).int())
    return weight


@pytest.mark.parametrize("form", ["dense", "codes4", "codes8", "words4", "words8", "offsets4", "perm4"])
def test_rows_in_another_order_are_the_same_rows(form: str) -> None:
    weight, order = made(form), torch.randperm(ROWS).tolist()
    moved = take_rows(weight, order)
    assert weight.bias is not None and moved.bias is not None
    assert torch.equal(moved.bias, weight.bias[order])
    plain, other = (w if w.dense is not None else with_codes(w) for w in (weight, moved))
    assert torch.equal(dequantize(other), dequantize(plain)[order])
