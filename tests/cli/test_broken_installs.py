"""qwenrt doctor on installations that are broken: a torch that does not start, ends the process, or has no driver; it
says what is wrong and what to do, and never fails itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwenrt.backends.dcu import software
from qwenrt.cli import doctor, imports, npu

FAKE = """
import types
__version__, __file__ = {version!r}, __file__
version = types.SimpleNamespace(cuda="13.0", hip=None)
def get_num_threads(): return 1
class _Cuda:
    def is_available(self): return True
    def device_count(self): return 1
    def get_device_properties(self, index): raise RuntimeError("CUDA driver version is insufficient")
cuda = _Cuda()
"""


def examined(tmp_path: Path, source: str, *arguments: str, **variables: str) -> dict[str, Any]:
    """What doctor finds in a process whose torch is ``source``."""
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(source, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": path} | variables
    command = [sys.executable, "-m", "qwenrt", "doctor", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["backend"]["name"] is None and report["machine"]["memory_total_bytes"] > 2**20
    return report


@pytest.mark.parametrize(
    ("source", "said", "fix"),
    [
        (
            "raise ImportError('libgalaxyhip.so.5: cannot open shared object file')",
            "libgalaxyhip.so.5",
            "source /opt/dtk/env.sh",
        ),
        (
            "raise ImportError('libcudart.so.13: cannot open')",
            "libcudart",
            "pip install --force-reinstall torch",
        ),
        ("import os; os.abort()", "importing it ends the process by signal 6", "device vendor's build"),
        ("import os; os._exit(3)", "exit status 3", "device vendor's build"),
        ("raise ImportError('A module that was compiled using NumPy 1.x')", "NumPy 1.x", "numpy<2"),
    ],
)
def test_a_torch_that_does_not_start(tmp_path: Path, source: str, said: str, fix: str) -> None:
    report = examined(tmp_path, source, "--device", "cuda")
    assert said in report["torch"]["error"]
    (problem,) = (p for p in report["problems"] if "cannot be imported" in p["what"])
    assert said in problem["what"] and fix in problem["fix"]


def test_a_torch_that_only_an_extension_breaks_is_looked_at_without(tmp_path: Path) -> None:
    broken = (
        "import os\nif os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD') != '0':\n"
        "    raise RuntimeError('Failed to load the backend extension: torch_npu')\n"
    )
    report = examined(tmp_path, broken + FAKE.format(version="2.11.0+cpu"), "--device", "cuda")
    assert report["torch"]["error"] is None and report["torch"]["version"] == "2.11.0+cpu"
    (problem,) = (p for p in report["problems"] if "cannot be imported" in p["what"])
    assert "backend extension: torch_npu" in problem["what"]
    assert "until then TORCH_DEVICE_BACKEND_AUTOLOAD=0 makes torch" in problem["fix"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('libcudart.so.13: cannot open')", "--force-reinstall torch"),
        ("raise OSError('libgalaxyhip.so.5: cannot open')", "source /opt/dtk/env.sh"),
        (
            "cause = ImportError('libhccl.so: cannot open')\n"
            "raise RuntimeError('Failed to load the backend extension: torch_npu. You can') from cause",
            "set_env.sh.*Until then TORCH_DEVICE_BACKEND_AUTOLOAD=0",
        ),
    ],
)
def test_other_commands_say_it_in_a_line(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(source, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "qwenrt", "run", "demo", "Hello", "--device", "cpu"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert re.search(f"importing torch.*lib.*{said}.*qwenrt doctor", done.stderr), done.stderr


def test_the_line_that_says_what_it_is_is_told() -> None:
    code = (
        "time; raise Exception('ASCEND_HOME_PATH : /x does not exist.\\n[ERROR] 2026 ERR00005 PTA not found')"
    )
    said = imports.failure(code, dict(os.environ))
    assert said == "Exception: ASCEND_HOME_PATH : /x does not exist."
    assert "set_env.sh" in imports.cure("torch_npu", f"{said} Please run 'source set_env.sh' of CANN.")


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("ImportError: libhccl.so: cannot open shared object file", "set_env.sh"),
        ("ImportError: libascend_hal.so: cannot open shared object file", "the driver's"),
        ("ImportError: /x/torch_npu/lib/libtorch_npu.so: undefined symbol: _ZN5torch8autograd", "are mixed"),
        ("ImportError: /x/torch_npu/lib/libtorch_npu.so: undefined symbol: aclrtNew", "belong together"),
        ("RuntimeError: Two accelerators cannot be used at the same time", "CPU's build of torch"),
    ],
)
def test_each_way_that_torch_npu_is_broken_has_its_own_cure(said: str, fix: str) -> None:
    assert fix in imports.cure("torch_npu", said)


def test_a_driver_that_does_not_fit(tmp_path: Path) -> None:
    report = examined(tmp_path, FAKE.format(version="2.11.0+cu130"), "--device", "cuda")
    assert report["torch"]["version"] == "2.11.0+cu130" and report["torch"]["error"] is None
    assert any("CUDA driver version is insufficient" in p["what"] for p in report["problems"])


def test_an_import_that_hangs() -> None:
    code = "time; import time; time.sleep(60)"
    said = imports.failure(code, dict(os.environ), 0.2)
    assert said == "importing it takes more than 0.2 seconds"
    assert "try again" in imports.cure("torch", said)


def test_a_torch_of_another_vendor_on_a_dcu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_places", lambda: ["/opt/dtk-26.04"])
    monkeypatch.setattr(imports, "installed", {"torch": "2.11.0+cu130", "triton": "3.6.0"}.get)
    found: list[dict[str, str]] = []
    doctor._dcu_packages(found)
    assert [problem["what"].split(" ")[:2] for problem in found] == [
        ["torch", "2.11.0+cu130"],
        ["Triton", "3.6.0"],
    ]


@pytest.mark.parametrize(
    ("said", "deadly"),
    [
        (None, False),
        ("libhccl.so: no such file", False),
        ("importing it ends the process by signal 9", True),
    ],
)
def test_an_extension_that_would_end_the_process_is_left_alone(
    said: str | None, deadly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "installed", {"torch-npu": "2.13.0"}.get)
    monkeypatch.setattr(imports, "failure", lambda *_: said)
    found: list[dict[str, str]] = []
    assert npu.is_deadly(found) is deadly and len(found) == (said is not None)
