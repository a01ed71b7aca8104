"""The report of a run: what each phase found, written again after each of them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DONE, FAILED, STOPPED, NOT_MEASURED = "done", "failed", "stopped", "not measured"


@dataclass
class Result:
    """Of one phase. ``figures``: numbers by name, with their unit in it; ``findings``: what is wrong; ``why``: of a
    state that is not "done"."""

    name: str
    state: str = NOT_MEASURED
    seconds: float = 0.0
    why: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)


def write(path: Path, value: Any) -> None:
    """As a whole, or not at all: whoever is killed meanwhile leaves what was there."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    beside.replace(path)


class Notes:
    """What a phase has found so far, in a file that its parent reads whenever the phase ends, or is ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.figures: dict[str, float] = {}
        self.findings: list[str] = []
        self.detail: dict[str, Any] = {}

    def keep(self) -> None:
        """Write down what there is."""
        write(self._path, {"figures": self.figures, "findings": self.findings, "detail": self.detail})

    def figure(self, name: str, value: float) -> None:
        self.figures[name] = value
        self.keep()

    def wrong(self, what: str) -> None:
        self.findings.append(what)
        self.keep()


def kept(path: Path) -> dict[str, Any]:
    """What a phase left, or nothing."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def as_json(results: list[Result], facts: dict[str, Any], budget_s: float) -> dict[str, Any]:
    phases = [dataclasses.asdict(result) for result in results]
    return {"kind": "gpu", **facts, "budget_s": budget_s, "phases": phases}


def printed(results: list[Result]) -> list[str]:
    """The table that is printed last."""
    lines = []
    for result in results:
        state = result.state + (f" ({result.why})" if result.why else "")
        lines.append(f"{result.name:<12} {result.seconds:6.1f} s  {state}")
        lines += [f"  {name:<44} {value:.4g}" for name, value in result.figures.items()]
        lines += [f"  WRONG: {finding}" for finding in result.findings]
    return lines
