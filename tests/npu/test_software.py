"""What doctor reads of an Ascend machine, whole or half-installed, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwenrt.backends.ascend import software
from qwenrt.cli import doctor, machine


def tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / "usr/local/Ascend" / {"driver": "driver/version.info", "cann": "cann/version.cfg"}[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"torch-npu": "2.9.0", "torch": "2.9.0+cpu"}
    monkeypatch.setattr(software, "_package", versions.get)
    return versions


def test_a_pair_that_the_vendor_names_is_no_problem(installed: dict[str, str | None], tmp_path: Path) -> None:
    found = software.look(
        tree(tmp_path, driver="Version=25.2.0\n", cann="[toolkit]\nrunning_version=[8.5.0:8.5.0]\n")
    )
    assert (found.driver, found.cann, found.problems) == ("25.2.0", "8.5.0", [])


@pytest.mark.parametrize(
    ("versions", "files", "what"),
    [
        ({}, {"cann": "Version=8.1.RC1"}, "torch_npu 2.9.0 is made for CANN 8.5, and 8.1.RC1 is here"),
        ({}, {"cann": "8.5.0", "driver": "Version=24.1.rc3"}, "driver 24.1.rc3 is older than 25.0"),
        ({"torch": "2.10.0"}, {"cann": "8.5.0"}, "torch_npu 2.9.0 beside torch 2.10.0: it fits 2.9.0 alone"),
        ({}, {}, "no CANN in /usr/local/Ascend"),
        ({"torch-npu": None}, {"driver": "Version=25.2.0"}, "driver 25.2.0 is here, but not torch_npu"),
        ({"torch-npu": None}, {"driver": "\x00\xff nothing"}, ""),
    ],
)
def test_what_does_not_fit_is_said_with_what_to_do(
    versions: dict[str, str | None],
    files: dict[str, str],
    what: str,
    installed: dict[str, str | None],
    tmp_path: Path,
) -> None:
    installed.update(versions)
    problems = software.look(tree(tmp_path, **files)).problems
    assert [what in problem for problem, _ in problems] == ([True] if what else [])
    assert all(fix for _, fix in problems)


def test_doctor_reads_without_importing_torch() -> None:
    code = (
        "import sys\nfrom qwenrt.cli import doctor\nfound = doctor._ascend('npu', [])\n"
        "assert 'torch' not in sys.modules and 'torch_npu' in found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_doctor_leaves_machines_without_ascend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "drivers", lambda: ["NVIDIA"])
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor._ascend("cuda", []) is None
