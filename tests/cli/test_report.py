"""doctor --report: one file, whatever its parts do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenrt.cli import main, report


def test_each_part_is_in_the_file_however_it_ended(tmp_path: Path) -> None:
    said: list[str] = []
    parts = {
        "prints": (("-c", "import json; print(json.dumps(['{device}']))"), 60.0),
        "warns": (("-c", "print('Warning: not set.'); print('{{}}')"), 60.0),
        "writes": (("-c", "open('{json}', 'w').write('[1]'); print('a table')"), 60.0),
        "crashes": (
            ("-c", "import os, sys; print('last words', file=sys.stderr, flush=True); os.abort()"),
            60.0,
        ),
        "hangs": (("-c", "import time; time.sleep(60)"), 0.5),
        "fails": (("-c", "import sys; print('no such device'); sys.exit(2)"), 60.0),
    }
    path = tmp_path / "report.json"
    assert report.write("npu", path, said.append, parts) is False
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["device"] == "npu" and list(found["parts"]) == list(parts)
    each = found["parts"]
    assert (
        each["prints"]["found"] == ["npu"] and each["warns"]["found"] == {} and each["writes"]["found"] == [1]
    )
    assert each["crashes"]["ended"] == "signal 6" and "last words" in each["crashes"]["said"]
    assert each["hangs"]["ended"] == "its time was over"
    assert each["fails"]["ended"] == "exit status 2" and "no such device" in each["fails"]["said"]
    assert len(said) == 2 * len(parts)


def test_doctor_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report.write, "__defaults__", ({"one": (("-c", "print(1)"), 60.0)},))
    path = tmp_path / "report.json"
    assert main(["doctor", "--device", "cpu", "--report", str(path)]) == 0
    assert "send it with an issue" in capsys.readouterr().out
    assert json.loads(path.read_text(encoding="utf-8"))["parts"]["one"]["found"] == 1
    assert main(["doctor", "--report", str(tmp_path / "none" / "report.json")]) != 0
