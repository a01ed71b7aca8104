"""What the default run tries is enough to find every wrong kernel of the list."""

from __future__ import annotations

from typing import Any

import pytest

from qwenrt.backends.cpu.kernels import Kernels
from qwenrt.conformance.cached import NO_CACHE, AttentionCase, CacheCase
from qwenrt.conformance.case import Case, Checker
from qwenrt.conformance.cases import LARGE
from qwenrt.conformance.linears import NOT_FINITE, LinearCase
from qwenrt.conformance.run import chosen
from qwenrt.conformance.subjects import DEFINITION, Subject, at_hand
from tests.backends.delta_mutants import DELTA_MUTANTS
from tests.backends.mutants import MUTANTS, Mutant
from tests.kernel_sets import KERNELS, needs_kernels

pytestmark = needs_kernels

CHECKERS: dict[str, Checker] = {}  # the definitions are computed once for all mutants


@pytest.fixture
def subjects() -> list[Subject]:
    return at_hand("cpu")


def could_meet(case: Case, mutant: Mutant) -> bool:
    """Whether a case calls the kernel at all, with what the mutant is written for: blocks of 16,
    results that are numbers and have several columns."""
    if isinstance(case, CacheCase):
        return case.block_size == 16
    if isinstance(case, AttentionCase):
        return case.block_size == 16 and case.cache != NO_CACHE and bool(case.lens)
    if not isinstance(case, LinearCase):
        return True
    if case.shape == (1, 1) or (case.values == NOT_FINITE and "infinity" not in mutant.name):
        return False
    if "12" in mutant.method:
        return case.shape == LARGE and case.form.name == "stored bfloat16"
    if mutant.method in ("pack", "repack"):
        return case.form.bits < 16 and case.form.words == (mutant.method == "repack")
    return (case.form.bits < 16) == (mutant.method == "quant_linear")


@pytest.mark.parametrize("mutant", [*MUTANTS, *DELTA_MUTANTS], ids=lambda mutant: mutant.name)
def test_a_wrong_kernel_is_found(
    mutant: Mutant, subjects: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "12" in mutant.method and not KERNELS.serves12:
        pytest.skip("nothing here gains from 12 bits")
    right, met = getattr(Kernels, mutant.method), []

    def wrong(self: Kernels, *args: Any) -> Any:
        met.append(self)
        return mutant.wrong(right.__get__(self), *args)

    monkeypatch.setattr(Kernels, mutant.method, wrong)
    ops = ("linear", "pack_linear") if mutant.op == "linear" else (mutant.op,)
    for case, (subject,) in chosen(subjects, ops=ops):
        if subject.name == DEFINITION or not could_meet(case, mutant):
            continue
        if case.id not in CHECKERS:
            CHECKERS[case.id] = case.checker()
        if CHECKERS[case.id].check(subject).complaints:
            break
    else:
        pytest.fail("no case of the default run finds it" if met else "no case of the default run calls it")
