"""Kernels in Gluon beside their definitions, by a shim that runs their own code on a CPU; and wrong ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenrt.backends.cuda.overrides import TritonBackend
from qwenrt.backends.cuda.tables import TILES, Warps
from qwenrt.conformance import linears
from qwenrt.conformance.linears import LinearCase
from qwenrt.conformance.run import run
from qwenrt.conformance.subjects import Subject
from qwenrt.conformance.weights import FORMS
from tests.gpu_sources.mutants import GLUON, Mutant
from tests.gpu_sources.test_numerics import mutated

pytestmark = pytest.mark.gpu_sources
OPS = ("linear", "norm_linear", "linear_add", "norm_gate_up_silu")
FORM = {form.name: form for form in FORMS}
NAMES = (
    *("dense", "int4 group 32", "int4 group 64", "int4 group 128", "int4 act-order", "int4 offsets"),
    *("int8 group 32", "int8 offsets", "int8 group 16"),
)
# The last rows of a program, units of inputs that a program's warps do not share evenly, one program and many.
SHAPES = ((48, 256), (34, 384), (96, 256))
WARPS = (Warps(1, 8), Warps(4, 1), Warps(2, 2))


class Streaming(TritonBackend):
    """The backend of devices that have Gluon, on a CPU."""

    gluon = True  # type: ignore[assignment]


@pytest.fixture(scope="module")
def shimmed() -> Iterator[Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not here: make gpu-sources fetches it")
    from tests.gpu_sources import interpreter, shim  # noqa: F401

    return shim


@pytest.fixture
def subject(shimmed: Any, monkeypatch: pytest.MonkeyPatch) -> Subject:
    from qwenrt.backends.cuda.kernels import stream

    monkeypatch.setattr(stream, "launch", shimmed.run)
    monkeypatch.setattr(linears, "TOKENS", (1, 9, 40))
    return Subject("shimmed", Streaming(torch.device("cpu")))


def cases(op: str) -> Iterator[tuple[LinearCase, Warps]]:
    """Every form with every dtype, the rest in turn."""
    values = (linears.NORMAL, linears.FAR_FROM_ZERO, linears.NOT_FINITE, linears.MASSIVE)
    for i, name in enumerate(NAMES):
        for j, dtype in enumerate((torch.bfloat16, torch.float16)):
            at = i + j
            wide = op == "linear_add" and dtype == torch.float16
            case = LinearCase(
                op=op, dtype=dtype, form=FORM[name], shape=SHAPES[at % 3], bias=at % 2 == 0,
                values=values[(i + 2 * j) % 4] if op == "linear" else linears.NORMAL, wide=wide,
            )  # fmt: skip
            yield case, WARPS[(at + at // 3) % 3]


def wrong(op: str, subject: Subject, names: tuple[str, ...] = NAMES) -> Iterator[str]:
    for case, warps in cases(op):
        if case.form.name not in names:
            continue
        subject.backend.tiles = replace(TILES, wide=warps, wide_from=0, rows=1 << 15)
        for outcome in run([(case, [subject])]):
            if not outcome.finding.ok:
                yield f"{outcome.case.id}: {outcome.why}"


@pytest.mark.parametrize("op", OPS)
def test_linears_are_as_defined(op: str, subject: Subject) -> None:
    assert not list(wrong(op, subject))


@pytest.mark.parametrize("mutant", GLUON, ids=lambda m: m.name)
def test_a_wrong_kernel_is_found(
    mutant: Mutant, subject: Subject, shimmed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenrt.backends.cuda import kernels

    module = mutated(mutant, tmp_path, monkeypatch)
    monkeypatch.setattr(module, "launch", shimmed.run)
    monkeypatch.setattr(kernels, "stream", module)
    assert next(wrong(mutant.op, subject), None) is not None
