"""`make npu-check`: torch_npu's real wheel over a stand-in for CANN, in an environment of its own, for each processor.

`python -m tests.npu.check DIRECTORY`: the environment, the wheel and the libraries are kept there. Needs an index of
packages the first time (torch and torch_npu, some 250 MB), and a C compiler. Minutes on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.npu.cann import libraries

RELEASE = "2.13.0"  # of torch, and of torch_npu, which fits one torch
PACKAGES = ("numpy", "safetensors", "tiktoken", "huggingface-hub", "jinja2", "pyyaml", "pytest", "hypothesis")
# What is tried on each: all of it on one, what differs on the others.
PROCESSORS = {
    "Ascend910B1": "",
    "Ascend910_9391": "layer or schemas or launches",
    "Ascend310P3": "layer or gptq_int4 and not order or demo",
    "Ascend910A": "layer or gptq_int4 and not order or missing",
}
ROOT = Path(__file__).parents[2]


def main(directory: Path) -> int:
    python = _environment(directory)
    wheel = _wheel(directory, python)
    libraries.build(directory / "cann", wheel)
    bad = []
    for processor, chosen in PROCESSORS.items():
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(directory / "cann"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{wheel}",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "STAND_IN_DEVICES": "1",
            "STAND_IN_SOC": processor,
        }
        print(f"== {processor}", flush=True)
        command = [
            str(python),
            "-m",
            "pytest",
            "-q",
            "-m",
            "npu",
            "-p",
            "no:cacheprovider",
            "tests/npu/wheel",
        ]
        if subprocess.run(command + (["-k", chosen] if chosen else []), cwd=ROOT, env=environment).returncode:
            bad.append(processor)
    print(f"wrong on {', '.join(bad)}" if bad else f"all of {', '.join(PROCESSORS)} is as it should be")
    return int(bool(bad))


def _environment(directory: Path) -> Path:
    python = directory / "venv" / "bin" / "python"
    if not (directory / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
        packages = [f"torch=={RELEASE}", *PACKAGES]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        (directory / "complete").touch()
    return python


def _wheel(directory: Path, python: Path) -> Path:
    """The unpacked wheel, beside the environment: installed in it, it would take part in every import of torch."""
    unpacked = directory / f"torch_npu-{RELEASE}"
    if not unpacked.exists():
        options = ["--no-deps", "--only-binary", ":all:", "-d", str(directory)]
        subprocess.run(
            [str(python), "-m", "pip", "download", "-q", *options, f"torch-npu=={RELEASE}"], check=True
        )
        (found,) = directory.glob(f"torch_npu-{RELEASE}-*.whl")
        with zipfile.ZipFile(found) as archive:
            archive.extractall(unpacked)
        found.unlink()
    return unpacked


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/npu-check").resolve()))
