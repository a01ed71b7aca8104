"""Proves the kernels for GPUs on a machine without one: in Triton's interpreter beside their definitions, and compiled
for NVIDIA's and AMD's GPUs. Fetches two versions of Triton (1.7 GB) into a cache, never into this environment.

    python scripts/gpu_sources.py [--full]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST, NEWEST = (
    "3.6.0",
    "3.9.0",
)  # of torch 2.11; the interpreter of the former does not work beside numpy 2.4
CACHE = Path(os.environ.get("QWENRT_TRITON_CACHE", Path.home() / ".cache" / "qwenrt-triton"))


def triton(version: str) -> Path:
    """A folder with that version alone, fetched where it is not there yet."""
    folder = CACHE / version
    if not (folder / "complete").exists():
        print(f"fetching Triton {version} into {folder} ...", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(folder), f"triton=={version}"], check=True)
        (folder / "complete").touch()
    return folder


def tests(version: str, file: str, marks: str) -> int:
    """One file of tests in a process of its own: Triton either interprets or compiles."""
    path = os.pathsep.join([str(ROOT), str(triton(version))])
    print(f"{file} with Triton {version}", flush=True)
    command = [sys.executable, "-m", "pytest", "-rs", "-m", marks, f"tests/gpu_sources/{file}"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every pair of values: most of an hour")
    marks = "gpu_sources" if parser.parse_args().full else "gpu_sources and not slow"
    codes = [tests(NEWEST, "test_numerics.py", marks)]
    codes += [tests(version, "test_compiled.py", marks) for version in (OLDEST, NEWEST)]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
