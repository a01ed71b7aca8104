"""Steps that are captured: for every kind of model the body keeps the rules and gives what the seams give; the
self-check finds what is wrong with the rooms around it; a capture that fails costs nothing but speed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenrt.backends import graphs
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import native
from qwenrt.backends.graphs import EagerGraphs, Graphs, GraphStack, RowTable
from qwenrt.backends.stack import SeamStack
from qwenrt.model import trial
from qwenrt.ops import reference
from qwenrt.ops.steps import FROM_BEFORE, Draw, Step
from tests.backends.test_selfcheck import MODELS, Model
from tests.capture import CaptureGuard, FakeGraphs, GraphBackend, NotCapturable
from tests.steps import step_of

CPU = torch.device("cpu")


def check(backend: Backend, model: Model, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    form = model.form
    kinds = trial.Kinds(lambda spec: form if spec.quantizable else (16, 128), model.stored, model.int8_cache)
    return trial.check(model.config, backend, dtype, kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_can_be_captured(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    backend = GraphBackend(CPU)
    with caplog.at_level(logging.WARNING):
        assert check(backend, MODELS[name], dtype) == {}
    assert not backend.demoted and "not captured" not in caplog.text


def small_stack(backend: Backend) -> tuple[GraphStack, SeamStack, trial._Weights]:
    kinds = trial.Kinds(lambda spec: (16, 128), torch.bfloat16, False)
    weights = trial._Weights(trial._small(MODELS["plain"].config), kinds)
    stacks = backend.stacks(trial._parts(weights.model(backend, torch.float32), False))
    captured, seams = stacks
    assert isinstance(captured, GraphStack) and isinstance(seams, SeamStack)
    return captured, seams, weights


# ---- what is wrong is found


def fed_by_the_row_before(right: Callable[..., Any], table: RowTable, step: Step, *rest: Any) -> None:
    right(table, step, *rest)
    ids = table._tensors.ids
    ids[: len(step.q_lens)] = ids[: len(step.q_lens)].roll(1)


def fed_by_what_is_there(
    right: Callable[..., Any], table: RowTable, step: Step, before: Any, rows: int, _: bool
) -> None:
    right(table, step, before, rows, True)


def with_spare(right: Callable[..., Any], table: RowTable, row: int) -> list[int]:
    return [0] * len(right(table, row))


def first_tables_stay(right: Callable[..., Any], table: RowTable, tables: list[list[int]]) -> None:
    right(table, [old or new for old, new in zip(table._tables, tables, strict=False)])


def grown_tables_stay(right: Callable[..., Any], table: RowTable, tables: list[list[int]]) -> None:
    kept = [
        old if old and new[: len(old)] == old else new
        for old, new in zip(table._tables, tables, strict=False)
    ]
    right(table, kept)


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a row fed by another's token": ("fill", fed_by_the_row_before),
    "a row fed by the step before the last": ("fill", fed_by_what_is_there),
    "a stale table row": ("_send_tables", first_tables_stay),
    "a new block unknown": ("_send_tables", grown_tables_stay),
    "padding rows that write": ("_spare_table", with_spare),
    "positions that stay": (
        "_send",
        lambda right, table, name, values: name == "position" or right(table, name, values),
    ),
    "draws of the step before": (
        "_send",
        lambda right, table, name, values: name == "top_k" or right(table, name, values),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_self_check_finds_wrong_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, wrong = MUTANTS[name]
    right = getattr(RowTable, method)
    monkeypatch.setattr(RowTable, method, lambda self, *args: wrong(right, self, *args))
    backend = GraphBackend(CPU)
    assert list(check(backend, MODELS["plain"])) == ["stacks"]
    assert len(backend.stacks(small_stack(GraphBackend(CPU))[0]._parts)) == 1, "the seams alone are left"


@pytest.mark.parametrize("op", ["decode_slots", "advance"])
def test_the_self_check_finds_a_wrong_body(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(reference, op)
    wrong = {
        "decode_slots": lambda table, position, size: right(table, position, size) ^ 1,
        "advance": lambda ids, position, tokens: right(ids, position, tokens.flip(0)),
    }[op]
    monkeypatch.setattr(graphs, "reference", SimpleNamespace(**{**vars(reference), op: wrong}))
    assert list(check(GraphBackend(CPU), MODELS["plain"])) == ["stacks"]


class OffByOne(GraphBackend):
    @native()
    def decode_attention(
        self, q: torch.Tensor, kv: Any, plan: Any, scale: float, window: int = 0
    ) -> torch.Tensor:
        plan = dataclasses.replace(plan, position=plan.position - 1)
        return super().decode_attention(q, kv, plan, scale, window)


class SecondChoice(GraphBackend):
    def choose_rows(self, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        return super().choose_rows(logits, *rest) ^ 1


@pytest.mark.parametrize(("backend", "op"), [(OffByOne, "decode_attention"), (SecondChoice, "choose_rows")])
def test_the_self_check_finds_a_wrong_op_of_the_body(backend: type[GraphBackend], op: str) -> None:
    assert list(check(backend(CPU), MODELS["plain"])) == [op]


class Counting(GraphBackend):
    chosen = 0

    def choose_rows(self, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        Counting.chosen += len(logits)
        return super().choose_rows(logits, *rest)


def test_a_captured_step_chooses_by_the_code_of_its_device() -> None:
    captured, _, _ = small_stack(Counting(CPU))
    step = step_of([3], [1], [1], [[4]])
    captured.run(step)
    Counting.chosen = 0
    captured.run(step)
    assert Counting.chosen == 1


# ---- what cannot be captured


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x + OUTSIDE,
        lambda x: bool((x > 0).any()),
    ],
)
def test_the_guard_refuses_what_cannot_be_captured(body: Callable[[torch.Tensor], Any]) -> None:
    x = torch.randn(4)
    with CaptureGuard([x]) as guard:
        y = (x * 2).view(2, 2)
    assert guard.count == 1 and y.shape == (2, 2)
    with pytest.raises(NotCapturable), CaptureGuard([x]):
        body(x)


OUTSIDE = torch.ones(4)


class Waiting(GraphBackend):
    """Attention that asks the device how long its sequences are."""

    def decode_attention(
        self, q: torch.Tensor, kv: Any, plan: Any, scale: float, window: int = 0
    ) -> torch.Tensor:
        assert int(plan.position.max()) >= 0
        return super().decode_attention(q, kv, plan, scale, window)


def test_where_a_capture_fails_the_seams_serve_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    captured, seams, _ = small_stack(Waiting(CPU))
    step = step_of([3], [1], [1], [[4]])
    assert captured.why_not(step) is None
    got = captured.run(step)
    assert got.served_by.name == "seams"
    assert "a capture failed: NotCapturable" in (captured.why_not(step) or "")
    assert caplog.text.count("not captured") == 1
    assert torch.equal(got.logits, seams.run(step).logits)


# ---- sizes


def test_a_graph_serves_all_that_fits_into_it_and_no_more() -> None:
    backend = GraphBackend(CPU)
    captured, seams, _ = small_stack(backend)
    fake = captured._graphs
    assert isinstance(fake, FakeGraphs)
    one, three = step_of([3], [1], [1], [[4]]), step_of([3, 4, 5], [1] * 3, [1] * 3, [[4], [5], [6]])
    for step in (one, three, one, step_of([3, 4], [1] * 2, [1] * 2, [[4], [5]]), three):
        outcome = captured.run(step)
        assert outcome.tokens() == seams.run(step).tokens()
    assert (fake.captures, fake.replays) == (3, 5)  # of 1, 2 and 4 rows
    drawn = Step([1], [1], [[4]], [1], [3], [0], [Draw(0.9, top_k=3, uniform=0.5)], [-1])
    assert captured.run(drawn).tokens() == seams.run(drawn).tokens() and fake.captures == 4
    assert captured.why_not(step_of([1, 2], [2], [2], [[4]])) == "a prompt is computed"
    five = step_of([1] * 5, [1] * 5, [1] * 5, [[i] for i in range(5)])
    assert captured.why_not(five) == "5 sequences, more than 4"


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_steady_step_sends_nothing_whatever_rows_are_free(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = GraphBackend(CPU)
    captured, _, _ = small_stack(backend)
    ones, tables, places = [1] * rows, [[i + 1] for i in range(rows)], list(range(rows))
    before = captured.run(step_of([3] * rows, ones, ones, tables))
    sent: list[Any] = []
    monkeypatch.setattr(backend, "send", lambda values: sent.append(values))
    for position in (2, 3, 4):
        fed, draws = [FROM_BEFORE] * rows, [Draw()] * rows
        before = captured.run(Step(ones, [position] * rows, tables, ones, fed, places, draws, places), before)
    assert not sent


@pytest.mark.parametrize("failing", range(1, 6))
def test_what_could_not_be_sent_is_sent_again(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = GraphBackend(CPU)
    captured, seams, _ = small_stack(backend)

    def step(position: int, temperature: float, top_k: int, uniform: float) -> Step:
        return Step([1], [position], [[4]], [1], [3], [0], [Draw(temperature, top_k, uniform=uniform)], [-1])

    captured.run(step(1, 0.5, 5, 0.5))
    captured.run(step(2, 0.5, 5, 0.5))
    calls, right = [], backend.send

    def send(values: Any) -> torch.Tensor:
        calls.append(values)
        if len(calls) == failing:
            raise MemoryError
        return right(values)

    monkeypatch.setattr(backend, "send", send)
    wanted = step(1, 5.0, 50, 0.99)
    with pytest.raises(MemoryError):
        captured.run(wanted)
    assert captured.run(wanted).tokens() == seams.run(wanted).tokens()


class TooSmall(Backend):
    def graphs(self) -> Graphs:
        return EagerGraphs()

    def decode_attention(self, *args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError


def test_a_body_that_is_run_as_it_is_fails_when_it_is_captured() -> None:
    captured, seams, _ = small_stack(TooSmall(CPU))
    assert captured.run(step_of([3], [1], [1], [[4]])).served_by is seams


def test_a_device_that_captures_nothing_still_waits_for_nothing() -> None:
    class Eager(Backend):
        def graphs(self) -> Graphs:
            return EagerGraphs()

    assert check(Eager(CPU), MODELS["experts"]) == {}
    assert Backend(CPU).graphs() is None and isinstance(Backend(torch.device("meta")).graphs(), EagerGraphs)
    assert (Backend(CPU).depth, Backend(torch.device("meta")).depth) == (0, 1)


class AtOnce(GraphBackend):
    """Layers at once, of one row."""

    calls = 0

    def decode_layers(self, network: Any) -> Any:
        def logits(x: torch.Tensor, rotary: Any, plan: Any, cache: Any) -> torch.Tensor:
            AtOnce.calls += 1
            result: torch.Tensor = network.logits(
                network.final_norm(network.run_layers(x, rotary, plan, cache))
            )
            return result

        return SimpleNamespace(most=1, logits=logits)


def test_layers_that_a_backend_computes_at_once_serve_the_rows_they_are_for() -> None:
    (captured, seams, _), calls = small_stack(AtOnce(CPU)), AtOnce.calls
    for step, served in (
        (step_of([3, 4], [1] * 2, [1] * 2, [[4], [5]]), False),
        (step_of([3], [1], [1], [[4]]), True),
    ):
        outcome = captured.run(step)
        assert torch.equal(outcome.logits, seams.run(step).logits)
        assert (AtOnce.calls > calls) == served
