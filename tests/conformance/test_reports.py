"""docs/devices.md says what the reports say, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwenrt.conformance import __main__ as table
from scripts import render_devices


def test_the_document_is_up_to_date() -> None:
    text = render_devices.DOCUMENT.read_text(encoding="utf-8")
    assert text == render_devices.render(), "run python scripts/render_devices.py"


def report(how: dict[str, str], rows: list[tuple[str, str, int]], **facts: Any) -> dict[str, Any]:
    made = [{"op": op, "served": {served: ["x"]}, "wrong": ["a case"] * wrong} for op, served, wrong in rows]
    known = {"kernels": "k", "packages": {"torch": "2.11.0"}, "date": "2026-12-01T00:00:00+00:00"}
    counted = {"cases": len(rows), "wrong": sum(wrong for *_, wrong in rows)}
    return {"kind": "conformance", **how, **known, "commit": None, **counted, "rows": made} | facts


def test_each_word_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"backend": "cuda", "device": "cuda", "card": {"name": "A Card"}}
    measured = report(
        {"how": "measured"},
        [("linear", "own kernel", 0), ("rotary", "definition", 0), ("choose", "own", 2)],
        **card,
    )
    played = report(
        {"how": "simulated", "by": "an interpreter"},
        [("linear", "own kernel", 0), ("rotary", "definition", 0)],
        backend="npu",
        device="npu",
        card=None,
        processor="A Processor",
    )
    for name, value in (("a", measured), ("b", played)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    monkeypatch.setattr(render_devices, "REPORTS", tmp_path)
    text = render_devices.render()
    assert "| op | A Card | A Processor (simulated) | CPU | Hygon DCU |" in text
    assert "| `linear` | measured | simulated | not measured | not measured |" in text
    assert "| `rotary` | definition | definition | not measured | not measured |" in text
    assert "| `choose` | **wrong in 2** | not measured |" in text
    assert "A Processor (played by an interpreter)" in text and "Not measured on any accelerator" in text


def test_a_report_has_the_facts_of_its_machine(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert table.main(["--op", "rotary", "--json", str(path), "--simulated", "a test"]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["how"], found["by"], found["backend"], found["wrong"]) == ("simulated", "a test", "cpu", 0)
    assert found["packages"]["torch"] and found["rows"][0]["op"] == "rotary"
