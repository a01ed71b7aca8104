"""What doctor reads of an Ascend machine, whole or half-installed, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwenrt.backends.ascend import software
from qwenrt.cli import imports, machine, npu

# As these files are on machines.
TOOLKIT = (
    "package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100R001C25SPC001B238\narch=aarch64\n"
)
CONFIG = "# version: 1.0\nruntime_running_version=[7.6.0.1.220:8.0.0]\ntoolkit_running_version=[7.6.0.1.220:8.0.0]\n"
PART = "Version=8.2.0.0.201\nversion_dir=8.2.RC1\ntimestamp=20250724_194044950\n"
DRIVER = "Version=25.2.0\nascendhal_version=7.35.23\naicpu_version=1.0\npackage_version=25.2.0\n"
FILES = {
    "driver": "driver/version.info",
    "cann": "cann/aarch64-linux/ascend_toolkit_install.info",
    "config": "ascend-toolkit/latest/version.cfg",
    "part": "ascend-toolkit/latest/toolkit/version.info",
}


def tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / "usr/local/Ascend" / FILES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"torch-npu": "2.9.0", "torch": "2.9.0+cpu"}
    monkeypatch.setattr(software, "_package", versions.get)
    return versions


def test_a_pair_that_the_vendor_names_is_no_problem(installed: dict[str, str | None], tmp_path: Path) -> None:
    found = software.look(tree(tmp_path, driver=DRIVER, cann=TOOLKIT))
    assert (found.driver, found.cann, found.problems) == ("25.2.0", "8.5.0", [])


@pytest.mark.parametrize(
    ("file", "text", "version"), [("config", CONFIG, "8.0.0"), ("part", PART, "8.2.RC1")]
)
def test_the_version_is_that_of_cann_and_not_of_a_part(
    file: str, text: str, version: str, installed: dict[str, str | None], tmp_path: Path
) -> None:
    assert software.look(tree(tmp_path, **{file: text})).cann == version


def test_a_machine_that_lacks_something_is_told_what(
    installed: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(**variables: str) -> str:
        return "\n".join(f"{what}: {fix}" for what, fix in software.look(tmp_path, variables).missing)

    def made(path: str) -> None:
        (tmp_path / path).mkdir(parents=True) if path.endswith("/") else (tmp_path / path).touch()

    assert "no CANN" in missing() and "no driver" in missing()
    elsewhere = tmp_path / "home/Ascend/cann-8.5.0"
    made("home/Ascend/cann-8.5.0/x86_64-linux/")
    (elsewhere / "x86_64-linux/ascend_toolkit_install.info").write_text(TOOLKIT, encoding="utf-8")
    home = {"ASCEND_HOME_PATH": str(elsewhere)}
    assert software.look(tmp_path, home).cann == "8.5.0"
    assert "not set up here (no ASCEND_OPP_PATH): source" in missing(**home)
    made("home/Ascend/cann-8.5.0/opp/")
    home["ASCEND_OPP_PATH"] = str(elsewhere / "opp")
    assert "no compiled operators: install its package" in missing(**home)
    made("home/Ascend/cann-8.5.0/opp/built-in/op_impl/ai_core/tbe/kernel/ascend910b/")
    assert "CANN" not in missing(**home).splitlines()[0]
    made("dev/")
    made("dev/davinci_manager")
    assert missing(**home).startswith("no card") and "--device /dev/davinci0" in missing(**home)
    made("dev/davinci3")
    assert missing(**home) == ""
    monkeypatch.setattr(software.os, "access", lambda path, mode: path.name != "davinci3")
    assert missing(**home).startswith("this user may not open /dev/davinci3: add the user to")
    assert "ASCEND_RT_VISIBLE_DEVICES='7' hides" in missing(**home, ASCEND_RT_VISIBLE_DEVICES="7")


@pytest.mark.parametrize(
    ("versions", "files", "what"),
    [
        (
            {},
            {"part": "Version=8.1.0.1\nversion_dir=8.1.RC1"},
            "torch_npu 2.9.0 is made for CANN 8.5, and 8.1.RC1 is here",
        ),
        ({}, {"cann": TOOLKIT, "driver": "Version=24.1.rc3"}, "driver 24.1.rc3 is older than 25.0"),
        ({"torch": "2.10.0"}, {"cann": TOOLKIT}, "torch_npu 2.9.0 beside torch 2.10.0: it fits 2.9.0 alone"),
        ({"torch-npu": None}, {"driver": DRIVER}, "driver 25.2.0 is here, but not torch_npu"),
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
        "import sys\nfrom qwenrt.cli import npu\nfound, _ = npu.installed('npu', [])\n"
        "assert 'torch' not in sys.modules and 'torch_npu' in found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_doctor_leaves_machines_without_ascend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "drivers", lambda: ["NVIDIA"])
    monkeypatch.setattr(imports, "installed", lambda package: None)
    assert npu.installed("cuda", []) == (None, [])
