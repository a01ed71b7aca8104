"""Builds of csrc/ for the C++ tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "csrc" / "tests"
FLAGS = ["-std=c++17", "-g", "-pthread", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture
def setup_module() -> ModuleType:
    """setup.py, freshly executed: a test may change its tables."""
    spec = importlib.util.spec_from_file_location("qwenrt_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiler(setup_module: ModuleType) -> list[str]:
    found = setup_module.find_compiler()
    if found is None or shutil.which(found[0]) is None:
        pytest.skip("no C++ compiler here")
    return list(found)


@pytest.fixture
def all_objects(setup_module: ModuleType, tmp_path: Path) -> Callable[..., list[str]]:
    """(command, machine) -> objects of all of csrc/ for that machine; no instruction set may get lost."""

    def build(command: list[str], machine: str) -> list[str]:
        lost: dict[str, str] = {}
        objects = setup_module.compile_sources([*command, *FLAGS], ROOT / "csrc", tmp_path, machine, lost)
        assert not lost
        return list(objects)

    return build


def link(command: list[str], test: str, with_these: list[str], into: Path) -> Path:
    program = into / f"{test}_tests"
    done = subprocess.run(
        [*command, *FLAGS, str(TESTS / f"{test}_tests.cpp"), *with_these, "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[:2000]
    return program


def run(command: list[str], cpus: set[int] | None = None) -> str:
    """What the program says, kept to ``cpus``; fails with its last words where it fails."""

    def keep_to() -> None:
        if cpus is not None:
            os.sched_setaffinity(0, cpus)

    done = subprocess.run(command, capture_output=True, text=True, timeout=250, preexec_fn=keep_to)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
