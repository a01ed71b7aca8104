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
    monkeypatch.setattr(software, "_import_error", lambda timeout_s: None)
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


@pytest.mark.parametrize(
    ("code", "error", "fix"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file')", "libhccl.so", "set_env.sh"),
        ("raise ImportError('libatb.so: cannot open')", "libatb.so", "nnal"),
        (
            "raise RuntimeError('Two accelerators cannot be used at the same time')",
            "Two acc",
            "CPU build of torch",
        ),
        ("import os; os.kill(os.getpid(), 11)", "it ends the process (signal 11)", "set_env.sh"),
        ("import time; time.sleep(60)", "it takes longer than 1 s", "set_env.sh"),
    ],
)
def test_a_broken_import_is_a_finding_with_its_cause(
    code: str, error: str, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(software, "_package", {"torch-npu": "2.9.0", "torch": "2.9.0"}.get)
    monkeypatch.setattr(software, "_IMPORT", code)
    found = software.look(tree(tmp_path, cann="8.5.0"), timeout_s=1.0 if "sleep" in code else 60.0)
    assert error in (found.error or "")
    ((what, how),) = found.problems
    assert error in what and fix in how


def test_doctor_looks_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom qwenrt.cli import doctor\nproblems = []\n"
        "found = doctor._ascend('npu', problems)\n"
        "assert 'torch' not in sys.modules and 'torch_npu' in found\n"
        "import os\nassert os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] == '0'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_doctor_leaves_machines_without_ascend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "drivers", lambda: ["NVIDIA"])
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor._ascend("cuda", []) is None
