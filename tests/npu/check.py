"""`make npu-check`: torch_npu's real wheel over a stand-in for CANN, for each processor.

`python -m tests.npu.check DIRECTORY [--releases 2.9.0 ...] [--optional]`: by default the torch_npu that fits the torch
that is installed; with `--reports docs/reports` the conformance table of each processor in place of tests. Wheels and
libraries are kept in the directory. Needs an index of packages the first time (torch_npu: 45 MB; each other release's
torch: up to 900 MB), a C compiler and nm.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from tests.npu.cann import libraries
from tests.npu.wheels import Missing, other_torch, unpacked

# What is tried on each: all of it on one, what differs on the others.
PROCESSORS = {
    "Ascend910B1": "",
    "Ascend910_9391": "layer or schemas or launches",
    "Ascend310P3": "layer or nz or gptq_int4 and not order or demo",
    "Ascend910A": "layer or gptq_int4 and not order or missing",
}
ROOT = Path(__file__).parents[2]
_AT_ONCE = 2  # processes, of one thread each


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--releases", nargs="+", default=[_installed()], metavar="2.13.0")
    parser.add_argument("--optional", action="store_true", help="a wheel that no index has is no failure")
    parser.add_argument("--reports", type=Path, metavar="DIRECTORY", help="write reports for docs/devices.md")
    chosen = parser.parse_args(arguments)
    chosen.directory.mkdir(parents=True, exist_ok=True)
    bad = []
    for release in chosen.releases:
        try:
            environment = _environment(chosen.directory.resolve(), release)
            wrong = _wrong(release, environment, chosen.reports)
            bad += [f"{processor} with {release}" for processor in wrong]
        except Missing as error:
            print(f"torch_npu {release} was not tried: {error}", flush=True)
            if not chosen.optional:
                bad.append(release)
    print(f"wrong: {', '.join(bad)}" if bad else "all that was tried is as it should be")
    return int(bool(bad))


def _installed() -> str:
    return metadata.version("torch").partition("+")[0]


def _environment(directory: Path, release: str) -> dict[str, str]:
    """Of a process with this release of torch_npu, the torch that fits it, and the stand-in."""
    wheel = unpacked(directory, "torch-npu", release)
    libraries.build(directory / f"cann-{release}", wheel)
    paths, preloaded = [ROOT, wheel], ""
    if release != _installed():
        torch, preloaded = other_torch(directory, release)
        paths.insert(1, torch)
    return os.environ | {
        "LD_LIBRARY_PATH": str(directory / f"cann-{release}"),
        "LD_PRELOAD": preloaded,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        "STAND_IN_DEVICES": "1",
    }


def _wrong(release: str, environment: dict[str, str], reports: Path | None) -> list[str]:
    """The processors for which something is wrong."""

    def right(processor: str) -> bool:
        command = [sys.executable, "-m", "pytest", "-m", "npu", "-p", "no:cacheprovider", "tests/npu/wheel"]
        command += ["-k", PROCESSORS[processor]] if PROCESSORS[processor] else []
        if reports is not None:
            file = reports.resolve() / f"npu-{processor.lower()}-simulated.json"
            command = [sys.executable, "-m", "tests.npu.wheel.report", str(file)]
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env=environment | {"STAND_IN_SOC": processor}, capture_output=True, text=True
        )
        took = f"{time.monotonic() - began:.0f} s"
        print(f"== {processor}, torch_npu {release}, {took}\n{done.stdout}{done.stderr}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(PROCESSORS, pool.map(right, PROCESSORS), strict=True))
    return [processor for processor, fine in answers.items() if not fine]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
