"""`make npu-check` where the wheel that it needs is not to be had."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.npu import check, wheels


def test_a_wheel_that_no_index_has_fails_only_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "torch-npu==2.99.0" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    asked = [str(tmp_path / "here"), "--releases", "2.99.0"]
    assert check.main([*asked, "--optional"]) == 0
    assert "torch_npu 2.99.0 was not tried: ERROR: No matching distribution found" in capsys.readouterr().out
    assert check.main(asked) == 1
    assert "wrong: 2.99.0" in capsys.readouterr().out
