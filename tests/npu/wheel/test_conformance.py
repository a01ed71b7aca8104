"""The conformance suite on the soft device: the backend is within its bounds, and every mutant is found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch

from qwenrt.backends import registry
from qwenrt.backends.base import Backend
from qwenrt.conformance.cached import FLOAT
from qwenrt.conformance.case import NORMAL, Case
from qwenrt.conformance.run import chosen, run
from qwenrt.conformance.subjects import DEFINITION, Subject
from tests.conformance.test_named_mutants import MUTANTS as NAMED
from tests.npu.operators import OPERATORS
from tests.npu.test_mutants import MUTANTS
from tests.npu.wheel.soft import Soft

# Of the conformance suite, by the op of the self-check that a wrong operator demotes.
_OPS = {"attention": ("attention", "decode_attention"), "experts": ("norm_moe_add_each",)}


# Ops that have code of their own here; the others are torch's, which a CPU computes.
_OWN = (
    "linear",
    "pack_linear",
    "norm_moe_add",
    "norm_moe_add_each",
    "rms_norm",
    "silu_and_mul",
    "rotary",
    "store_kv",
)
_OWN += ("attention", "decode_attention")


def of_npu(backend: Backend, ops: tuple[str, ...], *, full: bool = False) -> Any:
    subjects = [Subject(DEFINITION, Backend(torch.device("cpu"))), Subject("npu", backend)]
    todo = chosen(subjects[1:] if full else subjects, full=full, ops=ops)
    return ((case, here) for case, here in todo if here[0].name == "npu")


def usual(case: Case) -> bool:
    """What models ask of the operators most: numbers of half the width, all keys."""
    given = vars(case)
    return (
        case.dtype == torch.float16
        and given.get("window", 0) == 0
        and given.get("values", NORMAL) == NORMAL
        and given.get("block_size", 128) == 128
        and given.get("cache", FLOAT) == FLOAT
    )


@pytest.mark.parametrize("op", _OWN)
def test_an_op_is_as_defined(op: str) -> None:
    outcomes = list(run(of_npu(registry.create("npu"), (op,))))
    assert outcomes
    assert [f"{one.case.id}: {one.why}" for one in outcomes if not one.finding.ok] == []


def counts_of_the_next(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return right(*given, **named | {"group_list": named["group_list"].roll(1)})


def experts_of_the_next(right: Callable[..., Any], x: Any, weight: Any, **named: Any) -> Any:
    return right(x, [weight[0].roll(1, 0)], **named)


GROUPED = [("npu_grouped_matmul", wrong, {"experts"}) for wrong in (counts_of_the_next, experts_of_the_next)]


@pytest.mark.parametrize(
    ("op", "wrong", "demoted"), [*MUTANTS, *GROUPED], ids=lambda value: getattr(value, "__name__", "")
)
def test_a_wrong_operator_is_found(
    op: str, wrong: Callable[..., Any], demoted: set[str], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    backend = registry.create("npu")  # which is right when it is made
    monkeypatch.setitem(Soft.broken, op, lambda *given, **named: wrong(OPERATORS[op], *given, **named))
    ops = tuple(name for one in demoted for name in _OPS.get(one, (one,)))
    more = (one for one in of_npu(backend, ops, full=True) if usual(one[0]))
    assert any(not outcome.finding.ok for outcome in run(chain(of_npu(backend, ops), more)))


@pytest.mark.parametrize(("mutant", "op"), NAMED, ids=lambda value: getattr(value, "__name__", value))
def test_a_mistake_made_elsewhere_is_found(mutant: type[Backend], op: str) -> None:
    backend = mutant(torch.device("npu:0"))
    assert any(not outcome.finding.ok for outcome in run(of_npu(backend, (op,))))
