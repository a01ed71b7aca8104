"""The table of ops itself: which cases there are, what they notice, and what is said of them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.backends import registry
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import native
from qwenrt.conformance import __main__ as command
from qwenrt.conformance import cases, pairwise
from qwenrt.conformance.compare import LAYOUTS, laid_out
from qwenrt.conformance.run import chosen, run, summarise
from qwenrt.conformance.subjects import DEFINITION, Subject, at_hand
from qwenrt.errors import BackendError
from qwenrt.ops import reference
from qwenrt.ops.steps import LayerKV, StepPlan
from qwenrt.ops.types import Packed

CPU = torch.device("cpu")


# ---- which cases


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_any_two_values_of_two_axes_meet(sizes: list[int]) -> None:
    axes = {f"axis {i}": range(size) for i, size in enumerate(sizes)}
    rows = pairwise.pairs(axes)
    assert rows == pairwise.pairs(axes)
    for a, b in itertools.combinations(axes, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(axes[a], axes[b]))
    assert all(set(row) == set(axes) for row in rows)
    longest = sorted(sizes)[-2:]
    assert len(rows) <= 3 * longest[0] * longest[-1]


def test_every_case_has_an_id_of_its_own() -> None:
    ids = [case.id for case, _ in cases.table()]
    assert len(set(ids)) == len(ids) > 30_000
    assert len({op.name for op in cases.OPS} ^ set(cases.names())) == 0


def test_the_selection_is_of_the_table_and_meets_every_backend() -> None:
    subjects = at_hand("cpu")
    every = {case.id for case, _ in cases.table()}
    selected = [(case, subject.name) for case, (subject,) in chosen(subjects)]
    assert {case.id for case, _ in selected} <= every
    for name in cases.names():
        met = {subject for case, subject in selected if case.op == name}
        linear = any(op.linear for op in cases.OPS if op.name == name)
        assert met == {s.name for s in subjects if linear or not s.linears_only}
    again = [(case.id, subject.name) for case, (subject,) in chosen(subjects)]
    assert again == [(case.id, subject) for case, subject in selected]


def test_values_follow_from_the_id() -> None:
    case, other = (case for case, _ in itertools.islice(cases.table(["rms_norm"]), 2))
    assert torch.equal(case.checker().x, case.checker().x)  # type: ignore[attr-defined]
    assert not torch.equal(case.checker().x, other.checker().x)  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_numbers(layout: str) -> None:
    x = torch.randn(5, 3, 8)
    assert torch.equal(laid_out(x, layout), x)
    assert laid_out(x, layout).is_contiguous() == (layout == "contiguous")


def test_it_needs_no_pytest() -> None:
    code = "import sys, qwenrt.conformance.__main__; print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "False", done.stderr


# ---- what they notice


def _writes(x: torch.Tensor) -> torch.Tensor:
    x += 1
    return x - 1


def _by_memory(x: torch.Tensor) -> torch.Tensor:
    """As a kernel reads that takes every tensor for contiguous."""
    return x.as_strided(x.shape, torch.empty(x.shape).stride())


def _norm(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda self, x, weight, eps: reference.rms_norm(change(x), weight, eps)


def _linear(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def linear(self: Backend, x: torch.Tensor, w: Packed) -> torch.Tensor:
        return change(reference.linear(x, w))

    return linear


def _scale_by_mass(self: Backend, q: Any, k: Any, v: Any, kv: LayerKV | None, *rest: Any) -> torch.Tensor:
    """Attention that looks at every slot, used or not."""
    result = reference.attention(q, k, v, kv, *rest)
    return result if kv is None or not len(q) else result + 0 * kv.v.float().sum().to(result.dtype)


def _stores_behind(self: Backend, k: Any, v: Any, kv: LayerKV, slots: torch.Tensor) -> None:
    """The next slot gets a copy as well."""
    reference.store_kv(k, v, kv, (slots + 1) % (kv.k.shape[0] * kv.k.shape[1]))
    reference.store_kv(k, v, kv, slots)


def _looks_ahead(
    self: Backend, q: Any, k: Any, v: Any, kv: Any, plan: StepPlan, scale: float, window: int = 0
) -> torch.Tensor:
    """A mask that is off by one."""
    return reference.attention(q.roll(-1, 0) if len(q) > 1 else q, k, v, kv, plan, scale, window)


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "writes to its input": ("rms_norm", _norm(_writes)),
    "takes tensors for contiguous": ("rms_norm", _norm(_by_memory)),
    "fails at no token": ("linear", _linear(lambda y: y if len(y) else y[0])),
    "answers in float32": ("rms_norm", lambda self, *args: reference.rms_norm(*args).float()),
    "answers NaN": ("linear", _linear(lambda y: y.masked_fill(y == y.amax(), torch.nan) if len(y) else y)),
    "hides infinity": ("linear", _linear(lambda y: y.nan_to_num(0, 0, 0))),
    "passes no gradient": ("linear", _linear(lambda y: y.detach())),
    "reads unused slots": ("attention", _scale_by_mass),
    "stores where it must not": ("store_kv", _stores_behind),
    "sees other queries": ("attention", _looks_ahead),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_broken_promise_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, override = WRONG[wrong]

    class Broken(Backend):
        name = "broken"

    setattr(Broken, op, native()(override))
    subject = Subject("broken", Broken(CPU))
    found = (outcome for outcome in run((case, [subject]) for case, _ in chosen([subject], ops=[op])))
    assert any(not outcome.finding.ok for outcome in found)


# ---- what is said


def test_what_limits_exclude_is_served_by_the_definition_and_the_reason_is_said() -> None:
    class Half(Backend):
        @native(dtypes=(torch.float32,))
        def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            return reference.rms_norm(x, weight, eps)

    subjects = [Subject(DEFINITION, Backend(CPU)), Subject("half", Half(CPU))]
    rows = {row.dtype: row for row in summarise(run(chosen(subjects, ops=["rms_norm"])))}
    assert rows["float32"].served["own"] == ["half"]
    assert rows["bfloat16"].served["definition: no bfloat16 kernel"] == ["half"]
    assert all(row.worst.error <= row.worst.bound and not row.wrong for row in rows.values())


def test_a_dtype_that_the_device_has_not_is_said_and_not_wrong() -> None:
    class Old(Backend):
        def check_dtype(self, dtype: torch.dtype) -> None:
            if dtype == torch.bfloat16:
                raise BackendError("dtype='bfloat16'", "not implemented", "Use float16.")

        def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            assert x.dtype != torch.bfloat16
            return reference.rotary(x, cos, sin)

    rows = {row.dtype: row for row in summarise(run(chosen([Subject("old", Old(CPU))], ops=["rotary"])))}
    assert rows["bfloat16"].served == {"definition: cpu has no bfloat16": ["old"]}
    assert not any(row.wrong for row in rows.values()) and rows["float16"].worst.error > 0


class AlwaysWrong(Backend):
    """As a plugin brings it."""

    name = "chip"

    @native()
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return reference.silu_and_mul(gate_up) * 1.1


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> str:
    point = metadata.EntryPoint("chip", f"{__name__}:AlwaysWrong", registry.PLUGIN_GROUP)
    monkeypatch.setattr(registry, "_plugins", lambda: {"chip": point})
    return "chip"


def test_the_command_prints_a_table_and_writes_it(
    tmp_path: Path, chip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    ops = ["--op", "silu_and_mul", "--op", "rotary"]
    assert command.main(["--device", chip, *ops, "--json", str(report)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("backends: definition, chip\n")
    (silu,) = [line for line in said.splitlines() if line.startswith("silu_and_mul") and "float32" in line]
    assert "WRONG in " in silu and silu.endswith(": chip")
    assert "WRONG  chip: silu_and_mul float32 width " in said and "is allowed" in said
    rows = json.loads(report.read_text())["rows"]
    assert {row["op"] for row in rows} == {"silu_and_mul", "rotary"}
    assert all(bool(row["wrong"]) == (row["op"] == "silu_and_mul") for row in rows)
    assert command.main(["--device", chip, "--op", "rotary"]) == 0


def test_a_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "abacus"]) == 2
    assert "device='abacus': no such backend" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("op", cases.names())
def test_every_combination(op: str) -> None:
    wrong = [
        f"{outcome.subject}: {outcome.case.id}: {outcome.why}"
        for outcome in run(chosen(at_hand("cpu"), full=True, ops=[op]))
        if not outcome.finding.ok
    ]
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong[:20])
