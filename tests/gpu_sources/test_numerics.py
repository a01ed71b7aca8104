"""Kernels in Triton beside their definitions, by its interpreter: on a CPU, one program at a time."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qwenrt.backends import selfcheck
from qwenrt.backends.cuda.overrides import TritonBackend
from qwenrt.backends.cuda.tables import Tile, Tiles
from qwenrt.conformance import cases
from qwenrt.conformance.case import Case
from qwenrt.conformance.run import chosen, run
from qwenrt.conformance.subjects import Subject
from qwenrt.ops import reference
from tests.gpu_sources.mutants import MUTANTS, Mutant

pytestmark = pytest.mark.gpu_sources
LINEARS = ("linear", "pack_linear", "norm_linear", "linear_add", "norm_gate_up_silu")
EXPERTS = ("norm_moe_add", "norm_moe_add_each")  # a program for each expert of each token: slow here
OPS = (
    *LINEARS,
    "rms_norm",
    "silu_and_mul",
    "rotary_store_kv",
    "decode_attention",
    "choose",
    "decode_delta_net",
)
# A program costs a fiftieth of a second whatever it does: one to three for most shapes, the last one not full.
_LARGE = Tile(512, 1024)
TILES = Tiles(
    dense=_LARGE,
    codes={4: _LARGE, 8: _LARGE},
    product={16: _LARGE, 32: _LARGE, 64: _LARGE},
    matrix=Tile(512, 512),
    experts={4: _LARGE, 8: _LARGE, 16: _LARGE},
    rows=1 << 15,
    keys=64,
    per_split=256,
    heads=16,
    vocabulary=1 << 14,
)


@pytest.fixture(scope="module")
def subject() -> Subject:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not here: make gpu-sources fetches it")
    from tests.gpu_sources import interpreter  # noqa: F401

    backend = TritonBackend(torch.device("cpu"))
    backend.tiles = TILES
    assert backend.provides("triton") is None
    return Subject("interpreted", backend)


def of(op: str, subject: Subject) -> list[Case]:
    return [case for case, _ in chosen([subject], ops=[op])]


def few(every: list[Case]) -> list[Case]:
    """One of each kind, of each dtype in turn."""
    kinds: dict[str, list[Case]] = {}
    for case in every:
        kinds.setdefault(case.kind, []).append(case)
    some = []
    for i, group in enumerate(kinds.values()):
        dtype = cases.DTYPES[i % len(cases.DTYPES)]
        some += [next((case for case in group if case.dtype == dtype), group[0])]
        some += [case for case in group if case.dtype != dtype][-1:] if len(kinds) < 8 else []
    return some


def wrong(todo: list[Case], subject: Subject) -> Iterator[str]:
    for outcome in run((case, [subject]) for case in todo):
        if not outcome.finding.ok:
            yield f"{outcome.case.id}: {outcome.why}"


@pytest.mark.parametrize("op", OPS)
def test_kernels_are_as_defined(op: str, subject: Subject) -> None:
    assert not list(wrong(few(of(op, subject)), subject))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("op", (*OPS, *EXPERTS))
def test_kernels_are_as_defined_wherever_two_values_meet(op: str, subject: Subject) -> None:
    assert not list(wrong(of(op, subject), subject))


def test_every_op_of_the_backend_is_looked_at(subject: Subject) -> None:
    from qwenrt.backends.binding import PRIMITIVES, SEAMS, WHOLES

    own = {op for op in (*PRIMITIVES, *SEAMS, *WHOLES) if subject.backend.overrides(op)}
    assert own <= {*OPS, *EXPERTS, "choose_rows"}


@pytest.mark.parametrize(
    "spoilt", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["right", "wrong"]
)
def test_the_self_check_at_load(
    spoilt: bool, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds nothing in right kernels, and of a wrong one all that it serves."""
    if spoilt:
        replace(next(m for m in MUTANTS if m.name == "the last row of a tile"), tmp_path, monkeypatch)
    backend = TritonBackend(torch.device("cpu"))
    backend.tiles = TILES
    linears = [(48, 64, 16, 0), (40, 64, 4, 32)]
    found = selfcheck.check(backend, torch.float32, (4, 2, 64), linears)
    assert set(found) == ({"linear", "norm_linear", "linear_add"} if spoilt else set()), found


@pytest.mark.parametrize(("experts", "top_k", "norm"), [(6, 2, True), (16, 5, False), (4, 4, True)])
def test_experts_are_chosen_as_defined(experts: int, top_k: int, norm: bool, subject: Subject) -> None:
    """By their numbers; of equal ones the first; and some in any case where logits are not finite."""
    from qwenrt.backends.cuda.kernels.experts import route

    logits = torch.randn(5, experts, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[3] = 1.0
    weights, chosen = reference.route(logits, top_k, norm)
    chosen, order = chosen.sort(-1)
    chosen[3] = torch.arange(top_k)
    got, share = route(logits, top_k, norm)
    assert torch.equal(got, chosen) and torch.equal(share, weights.gather(1, order).float())
    for value in (float("nan"), float("inf"), -float("inf")):
        got, share = route(logits.index_fill(1, torch.tensor([1]), value), top_k, norm)
        assert bool((got >= 0).all()) and bool((got < experts).all()) and bool((got.diff() > 0).all())
        assert bool(share.isnan().all()) == (value > 0 or value != value)


@pytest.mark.parametrize("more", [0, 100])
def test_every_number_is_read(more: int, subject: Subject) -> None:
    from qwenrt.backends.cuda.kernels import read

    x = torch.arange((1 << 17) + more, dtype=torch.int32) - (1 << 16)
    assert (int(read.read(x).sum()) - int(x.sum())) % (1 << 32) == 0, "sums wrap"


def mutated(mutant: Mutant, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A kernel file with one thing wrong."""
    spec = importlib.util.find_spec(f"qwenrt.backends.cuda.kernels.{mutant.module}")
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    assert text.count(mutant.right) >= 1, f"{mutant.right!r} is not in {mutant.module}.py: adapt the mutant"
    path = folder / f"{mutant.module}_mutated.py"
    path.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
    made = importlib.util.spec_from_file_location(path.stem, path)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    monkeypatch.setitem(sys.modules, path.stem, module)
    made.loader.exec_module(module)
    return module


def replace(mutant: Mutant, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenrt.backends.cuda import kernels

    importlib.import_module(f"qwenrt.backends.cuda.kernels.{mutant.module}")
    monkeypatch.setattr(kernels, mutant.module, mutated(mutant, folder, monkeypatch))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_wrong_kernel_is_found(
    mutant: Mutant, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(mutant, tmp_path, monkeypatch)
    todo = [case for case in of(mutant.op, subject) if mutant.shows(case)]
    assert todo
    assert next(wrong(todo, subject), None) is not None
