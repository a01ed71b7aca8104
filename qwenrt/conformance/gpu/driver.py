"""Runs the phases one after the other, each in a process of its own with a limit, within a budget of seconds."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenrt.conformance.gpu import report
from qwenrt.conformance.gpu.report import DONE, FAILED, STOPPED, Result

_LEAST_S = 4.0  # less is not worth a start
_SAID = 400  # characters of what a process said last


@dataclass(frozen=True)
class Phase:
    """``seconds``: its limit; ``needs_gpu``: it means nothing on a CPU."""

    name: str
    seconds: float
    needs_gpu: bool = True


# Correctness before speed, and before all of it the numbers that every fraction hangs on, and what all others would
# compile one by one. Of what is right, first what no other proof shows: captures, early launches, races.
PHASES = (
    Phase("limits", 25),
    Phase("compile", 40),
    Phase("replays", 25),
    Phase("sanitizer", 15),
    Phase("ops", 60, needs_gpu=False),
    Phase("models", 40, needs_gpu=False),
    Phase("engine", 100),
    Phase("tuning", 45),
    Phase("engine, tuned", 50),
    Phase("linears", 25),
    Phase("peers", 50),
    Phase("profile", 25),
)


def run(
    phases: Sequence[Phase],
    out: Path,
    budget_s: float,
    device: str,
    facts: dict[str, Any],
    *,
    start: Callable[[Phase, float], tuple[int | None, str]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Result]:
    """All phases -> what each found. ``start``: runs one of them for so many seconds -> its exit status, None where it
    was ended, and what it said last; as a process unless given."""
    began = clock()
    results = [Result(phase.name, why="not reached") for phase in phases]
    on_cpu = device.partition(":")[0] == "cpu"
    start = start or (lambda phase, limit: _process(phase, limit, out, device))

    def save() -> None:
        report.write(out / "report.json", report.as_json(results, facts, budget_s))

    save()
    for result, phase in zip(results, phases, strict=True):
        left = budget_s - (clock() - began)
        if on_cpu and phase.needs_gpu:
            result.why = "it needs an accelerator"
        elif left < _LEAST_S:
            result.why = f"{max(0.0, left):.0f} of {budget_s:g} seconds were left"
        else:
            at = clock()
            notes_of(out).unlink(missing_ok=True)  # of a run before
            status, said = start(phase, min(phase.seconds, left))
            result.seconds = clock() - at
            found = report.kept(notes_of(out))
            notes_of(out).unlink(missing_ok=True)
            result.figures, result.findings = found.get("figures", {}), found.get("findings", [])
            result.detail = found.get("detail", {})
            result.state = DONE if status == 0 else STOPPED if status is None else FAILED
            result.why = "" if status == 0 else "its time was over" if status is None else said
        save()
    return results


def notes_of(out: Path) -> Path:
    """What the phase that is under way has found: one file for all of them, as who lends a device may give back few."""
    return out / "now.json"


def figures_of(out: Path, name: str) -> dict[str, float]:
    """What an earlier phase of this run has found, or nothing."""
    phases = report.kept(out / "report.json").get("phases", [])
    found = next((phase["figures"] for phase in phases if phase["name"] == name), None)
    return dict(found or {})


def _process(phase: Phase, limit_s: float, out: Path, device: str) -> tuple[int | None, str]:
    command = [sys.executable, "-m", "qwenrt.conformance.gpu", "--phase", phase.name]
    command += ["--out", str(out), "--device", device, "--until", f"{time.time() + limit_s:.1f}"]
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"---- {phase.name}\n")
        log.flush()
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.PIPE, text=True, errors="replace", timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            return None, ""
        log.write(done.stderr)
    return done.returncode, done.stderr.strip()[-_SAID:]
