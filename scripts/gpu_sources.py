"""Proves the kernels for GPUs on a machine without one: in Triton's interpreter beside their definitions, and compiled
for NVIDIA's and AMD's GPUs. Fetches two versions of Triton (1.7 GB) into a cache, never into this environment.

    python scripts/gpu_sources.py [--full] [--optional] [--reports]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of torch 2.11, and the newest. The interpreter of the former does not work beside numpy 2.4.
OLDEST, NEWEST = "3.6.0", "3.9.0"
CACHE = Path(os.environ.get("QWENRT_TRITON_CACHE", Path.home() / ".cache" / "qwenrt-triton"))
# In this order: in Triton's interpreter, Gluon by a shim, and what is compiled.
SIMULATED, COMPILED = (
    ("test_numerics.py", "test_gluon.py", "test_body.py", "test_races.py"),
    ("test_compiled.py", "test_compiled_gluon.py", "test_measuring.py"),
)
_PROCESSES = 2


class NoIndexError(Exception):
    """No package index is reached, it has no Triton for this Python, or its wheel could not be fetched."""


def triton(version: str) -> Path:
    """A folder with that version alone, fetched where it is not there yet."""
    folder = CACHE / version
    if not (folder / "complete").exists():
        print(f"fetching Triton {version} into {folder} ...", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        command += ["--retries", "2", "--target", str(folder), f"triton=={version}"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        print(done.stderr, end="", file=sys.stderr)
        if done.returncode:
            raise NoIndexError(f"no package index gave Triton {version}; pip ended with {done.returncode}")
        (folder / "complete").touch()
    return folder


def tests(version: str, files: tuple[str, ...], marks: str) -> int:
    """Some files of tests in processes of their own: Triton either interprets or compiles."""
    began = time.monotonic()
    command = [
        "pytest",
        "-rs",
        "-m",
        marks,
        "-n",
        str(_PROCESSES),
        "--dist",
        "worksteal",
    ]
    command += ["-W", "ignore::RuntimeWarning"]
    command += [f"tests/gpu_sources/{file}" for file in files]
    code = run(version, command)
    print(f"{', '.join(files)} with Triton {version}: {time.monotonic() - began:.0f} s", flush=True)
    return code


def run(version: str, arguments: list[str]) -> int:
    """A module of Python's with that Triton -> its exit status."""
    path = os.pathsep.join([str(ROOT), str(triton(version))])
    env = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(CACHE / "compiled")}
    env |= {"TRITON_DEFAULT_FP_FUSION": "1"}  # as it is by default up to 3.9
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=env).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every pair of values: most of an hour")
    help = "where no package index has a Triton, say so and end well"
    parser.add_argument("--optional", action="store_true", help=help)
    help = "write the reports of docs/devices.md that need no GPU anew, and nothing else"
    parser.add_argument("--reports", action="store_true", help=help)
    options = parser.parse_args()
    marks = "gpu_sources" if options.full else "gpu_sources and not slow"
    try:
        if options.reports:
            return run(NEWEST, ["tests.gpu_sources.report"])
        codes = [tests(NEWEST, SIMULATED, marks)]
        codes += [tests(version, COMPILED, marks) for version in (OLDEST, NEWEST)]
    except NoIndexError as error:
        print(error, file=sys.stderr)
        return 0 if options.optional else 1
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
