"""The minutes on a borrowed GPU, without one: phases in their order and limits, a report that survives, what is named
not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenrt.backends.cuda.tables import TILES
from qwenrt.backends.graphs import EagerGraphs
from qwenrt.conformance.gpu import __main__ as command
from qwenrt.conformance.gpu import driver, peers, phases, report, timing
from qwenrt.conformance.gpu.driver import PHASES, Phase
from qwenrt.conformance.gpu.report import Notes
from tests.capture import GraphBackend

CPU = torch.device("cpu")


class Clock:
    """Seconds, moved on by what is run."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def driven(
    out: Path, budget: float, takes: dict[str, float], device: str = "cuda", fails: str = ""
) -> tuple[list[report.Result], list[tuple[str, float]]]:
    """A run whose phases take so long; each leaves a figure and, if it ``fails``, an exit status."""
    clock, started = Clock(), list[tuple[str, float]]()

    def start(phase: Phase, limit: float) -> tuple[int | None, str]:
        started.append((phase.name, limit))
        notes = Notes(driver.notes_of(out))
        notes.figure("figure", 1.0)
        kept = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert [p["state"] for p in kept["phases"]].count("not measured") == len(takes) - len(started) + 1
        clock.now += min(limit, takes[phase.name])
        if phase.name == fails:
            return 1, "Killed"
        return (0 if takes[phase.name] <= limit else None), ""

    chosen = [Phase(name, 50, needs_gpu=name != "b") for name in takes]
    return driver.run(chosen, out, budget, device, {}, start=start, clock=clock), started


def test_phases_have_limits_and_the_report_is_kept_after_each(tmp_path: Path) -> None:
    results, started = driven(tmp_path, 130, {"a": 20, "b": 60, "c": 10, "d": 49, "e": 1})
    assert started == [("a", 50), ("b", 50), ("c", 50), ("d", 50)]
    states = [(result.name, result.state, result.why) for result in results]
    assert states == [
        ("a", "done", ""),
        ("b", "stopped", "its time was over"),
        ("c", "done", ""),
        ("d", "done", ""),
        ("e", "not measured", "1 of 130 seconds were left"),
    ]
    assert all(result.figures == {"figure": 1.0} for result in results[:4]), "what was found is kept"
    assert driver.figures_of(tmp_path, "a") == {"figure": 1.0} and driver.figures_of(tmp_path, "e") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], (
        "who lends a device gives few files back"
    )
    kept = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [phase["name"] for phase in kept["phases"]] == list("abcde") and kept["budget_s"] == 130


def test_a_phase_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    results, started = driven(tmp_path, 500, {"a": 5, "b": 5, "c": 5}, fails="a")
    assert (results[0].state, results[0].why, results[0].figures) == ("failed", "Killed", {"figure": 1.0})
    assert len(started) == 3 and results[2].state == "done"
    assert "WRONG" not in "\n".join(report.printed(results))


def test_on_a_cpu_what_needs_a_gpu_is_not_measured(tmp_path: Path) -> None:
    results, started = driven(tmp_path, 500, {"a": 5, "b": 5}, device="cpu")
    assert [name for name, _ in started] == ["b"]
    assert (results[0].state, results[0].why) == ("not measured", "it needs an accelerator")


def test_correctness_comes_before_speed() -> None:
    names = [phase.name for phase in PHASES]
    assert set(names) == set(phases.WORK)
    correct = ("replays", "sanitizer", "ops", "models")
    fast = ("engine", "tuning", "engine, tuned", "linears", "peers", "profile")
    assert names[2:] == [*correct, *fast]
    assert max(map(names.index, correct)) < min(map(names.index, fast))
    assert names[:2] == ["limits", "compile"], "what all others hang on, and what they would wait for"
    assert sum(phase.seconds for phase in PHASES) <= 500


def test_the_command_runs_end_to_end_without_a_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = ["--out", str(tmp_path), "--device", "cpu", "--budget", "8", "--only", "ops", "--only", "engine"]
    assert command.main(run) == 0
    said = capfd.readouterr().out
    assert "engine" in said and "not measured (it needs an accelerator)" in said
    kept = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert kept["kind"] == "gpu" and kept["backend"] == "cpu" and kept["packages"]["torch"]
    ops = kept["phases"][0]
    assert ops["state"] in ("done", "stopped") and not ops["findings"]
    assert command.main(["--out", str(tmp_path), "--device", "nothing"]) == 2


class Playing(GraphBackend):
    """A device whose body is run as it is."""

    def graphs(self) -> Any:
        return EagerGraphs()

    def stacks(self, parts: Any) -> Any:
        return super(GraphBackend, self).stacks(parts)


def test_replays_are_compared_with_the_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases.registry, "create", lambda device: Playing(CPU))
    monkeypatch.setattr(phases, "_REPLAYS", 6)
    notes = Notes(tmp_path / "notes.json")
    phases.replays(notes, "cuda", 60, tmp_path)
    assert not notes.findings and notes.figures == {"replays in float32": 6, "replays in bfloat16": 6}
    right, calls = torch.equal, []
    monkeypatch.setattr(torch, "equal", lambda a, b: calls.append(1) or (len(calls) != 2 and right(a, b)))
    phases.replays(notes, "cuda", 60, tmp_path)
    assert notes.findings == ["float32: 1 of 6 replays give other bits than the body"]


def test_the_built_in_model_is_looked_at_in_every_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ((0, 0.1, ""), (1, 0.3, "it is off"))
    found = [phases.selftest.Finding("as it is", text, error, 0.2, wrong) for text, error, wrong in texts]
    monkeypatch.setattr(phases.selftest, "compare", lambda *_, **__: iter(found))
    notes = Notes(tmp_path / "notes.json")
    phases.models(notes, "cuda", 60, tmp_path)
    assert notes.findings[0] == "float32, as it is, text 1: it is off" and len(notes.findings) == 3
    assert notes.figures["bfloat16, as it is: error"] == 0.3


def test_speeds_are_beside_the_bandwidth_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"bandwidth, GB/s": 4000.0, "products of bfloat16, TFLOP/s": 500.0}
    report.write(tmp_path / "report.json", {"phases": [{"name": "limits", "figures": found}]})
    assert timing.measured_bandwidth(tmp_path) == 4e12 and timing.measured_products(tmp_path) == 5e14
    assert timing.measured_bandwidth(tmp_path / "x") == 0
    times = iter(
        [0.0, 1.0, 2.0, 2.5, 3.0, 10.4]
    )  # 1 s with captures, then 0.5 s for one token, 7.4 s with 64 more
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(times))

    cached = 2 * 24 * 16 * 128 * 2 * (1000 + 32)

    class Model:
        def generate(self, **asked: Any) -> None:
            assert len(asked["prompt_token_ids"]) == 1

        def stats(self) -> dict[str, Any]:
            return {"weight_bytes_per_token": 431.25e9 - cached}

    notes = Notes(tmp_path / "notes.json")
    load = phases.Load("Qwen-1_8B", prompt=1000)
    phases._speeds(notes, Model(), load, 4e12, 5e14)  # type: ignore[arg-type]
    name = "Qwen-1_8B bfloat16, 1 at 1000 tokens"
    assert notes.figures[f"{name}: prompt tokens/s"] == pytest.approx(2000)
    assert notes.figures[f"{name}: tokens/s"] == pytest.approx(64 / 6.9)
    assert notes.figures[f"{name}: weights and cache read, of the bandwidth"] == pytest.approx(1.0)
    linears = 24 * (4 * 2048 * 2048 + 3 * 2048 * 5504)
    share = 2 * linears * 1000 / 0.5 / 5e14
    assert notes.figures[f"{name}: a prompt's linears, of the rate of products"] == pytest.approx(share)


def test_without_a_triton_the_rest_is_measured(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.json")
    if timing._kernels(notes) is None:
        assert notes.detail["triton"].startswith("ModuleNotFoundError")


@pytest.mark.parametrize(
    ("said", "figure", "wrong"),
    [("0 hazards displayed", 0, 0), ("2 hazards displayed (2 errors, 0 warnings)", 2, 1), (None, None, 0)],
)
def test_hazards_of_a_sanitizer_are_counted(
    said: str | None, figure: int | None, wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program that stands in for it."""
    program = tmp_path / "compute-sanitizer"
    line = "Error: it does not run here" if said is None else f"========= RACECHECK SUMMARY: {said}"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    notes = Notes(tmp_path / "notes.json")
    phases.sanitizer(notes, "cuda", 10, tmp_path)
    assert notes.figures.get("hazards") == figure and len(notes.findings) == wrong
    assert line in (tmp_path / "sanitizer.txt").read_text()


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without Gluon or Triton, a machine without the programs and libraries beside which is measured."""
    monkeypatch.setattr(phases.shutil, "which", lambda _: None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    notes = Notes(tmp_path / "notes.json")
    for phase in (phases.sanitizer, phases.compile_all, phases.tune, phases.profile):
        phase(notes, "cpu", 10, tmp_path)
    peers.transformers(notes, CPU, 0.0)
    phases.early(notes, Playing(CPU))
    assert set(notes.detail) == {
        "compute-sanitizer",
        "triton",
        "tuning",
        "ncu",
        "transformers",
        "early launches",
    }
    assert not notes.findings and not notes.figures


def test_another_library_is_measured_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    model = SimpleNamespace(
        eval=lambda: model, generate=lambda ids, max_new_tokens, **_: asked.append(max_new_tokens)
    )
    maker = SimpleNamespace(from_config=lambda config, dtype: model)
    library = SimpleNamespace(Qwen2Config=lambda **_: None, AutoModelForCausalLM=maker, __version__="5.0")
    monkeypatch.setitem(sys.modules, "transformers", library)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = iter([0.0, 9.0, 10.0, 11.0, 12.0, 17.0])
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(times))
    notes = Notes(tmp_path / "notes.json")
    peers.transformers(notes, CPU, 16.0)
    assert asked == [33, 1, 33] and notes.figures["qwenrt's tokens beside transformers'"] == 2.0


def test_early_launches_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Playing(CPU)
    backend.gluon, backend.profile, backend.tiles = True, SimpleNamespace(pdl=True), TILES
    monkeypatch.setattr(phases, "_REPLAYS", 20)
    notes = Notes(tmp_path / "notes.json")
    phases.early(notes, backend)
    assert notes.figures == {"replays with early launches": 6} and not notes.findings
    assert backend.tiles is TILES
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    phases.early(notes, backend)
    assert notes.findings == ["6 of 6 replays with early launches give other bits"]
