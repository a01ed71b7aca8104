"""The machine of a report: what was measured on what, and by which versions."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qwenrt.backends import registry
from qwenrt.errors import QwenrtError

_PACKAGES = ("torch", "triton", "triton-ascend", "torch-npu", "numpy")


def facts(device: str) -> dict[str, Any]:
    """Of a report on ``device``, ready for JSON. What cannot be found out is None, never a guess."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "qwenrt": sys.modules["qwenrt"].__version__,
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "build": {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "device": device,
    }
    try:
        backend = registry.create(device)
        found |= {"backend": backend.name, "kernels": backend.describe(), "card": _card(backend.device)}
    except QwenrtError as error:
        found |= {"backend": None, "kernels": str(error), "card": None}
    return found


def _card(device: torch.device) -> dict[str, Any] | None:
    """The accelerator, by its torch module; None for a CPU."""
    if device.type == "cpu":
        return None
    properties = torch.get_device_module(device).get_device_properties(device)
    names = (
        "name",
        "total_memory",
        "major",
        "minor",
        "gcnArchName",
        "multi_processor_count",
        "L2_cache_size",
    )
    return {name: value for name in names if (value := getattr(properties, name, None)) is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _commit() -> str | None:
    """Of a checkout; None for an installed package."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
