"""Several processes on one card: each takes of what is free when it starts, and gives it back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODEL = Path(__file__).parents[2] / "golden" / "plain"
MEMORY = 1 << 30


class Neighbour:
    """A process of tests/npu/wheel/neighbour.py."""

    def __init__(self, count: Path) -> None:
        environment = os.environ | {"STAND_IN_SHARED": str(count), "STAND_IN_MEMORY": str(MEMORY)}
        command = [sys.executable, "-m", "tests.npu.wheel.neighbour", str(MODEL)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)

    def says(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(next(line for line in self.process.stdout if line.startswith("{")))
        return found

    def does(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()


def test_processes_on_one_card_share_its_memory(tmp_path: Path, family: str) -> None:
    if family != "A2":
        pytest.skip("tried there")
    count = tmp_path / "used"
    count.write_bytes(bytes(8))
    neighbours = [Neighbour(count)]
    try:
        first = neighbours[0].says()
        assert MEMORY * 0.9 < first["before"] <= MEMORY and first["tokens"] == 3
        neighbours.append(Neighbour(count))
        second = neighbours[1].says()
        assert first["free"] - MEMORY * 0.1 < second["before"] <= first["free"] and second["tokens"] == 3
        assert second["cache"] / first["cache"] == pytest.approx(second["before"] / first["before"], rel=0.1)
        neighbours[0].does("close")
        assert neighbours[0].says()["free"] >= second["free"] + first["cache"]
        neighbours[0].does("end")
        neighbours[0].process.wait(100)
        neighbours[1].does("close")
        assert neighbours[1].says()["free"] > MEMORY * 0.9
    finally:
        for neighbour in neighbours:
            neighbour.process.kill()
            neighbour.process.wait()
