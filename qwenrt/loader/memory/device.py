"""The memory of a device as far as the system tells without torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import qwenrt.backends
from qwenrt.errors import CapacityError

_TIMEOUT_S = 10.0
TORCH_TAKES = 640 * 2**20  # bytes of address space; a build for the CPU alone, with one thread
_QUERY = ("--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits")


def device_memory(device: str, root: Path = Path("/")) -> tuple[int, int] | None:
    """(free, total) bytes of "cpu", "cuda", "cuda:1", "dcu", ...; None where it is not known."""
    name, _, index = device.partition(":")
    number = int(index) if index.isdecimal() else 0
    if name == "cpu":
        return _host_memory(root)
    if name == "cuda":
        return _nvidia_smi(number)
    return _sysfs(number, root) if name == "dcu" else None


def _host_memory(root: Path) -> tuple[int, int] | None:
    """As the CPU backend measures it."""
    resources = host_resources()
    try:
        free, total = resources.memory(root)
    except (AttributeError, OSError, ValueError):  # a system without any of the known interfaces
        return None
    return int(free), int(total)


def host_resources() -> Any:
    """The module of the CPU's backend, loaded by itself, as the package around it imports torch."""
    path = Path(qwenrt.backends.__file__).parent / "cpu" / "resources.py"
    spec = importlib.util.spec_from_file_location("qwenrt_cpu_resources", path)
    assert spec is not None and spec.loader is not None
    resources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(resources)
    return resources


def check_room_for_torch() -> None:
    """Raise CapacityError where this process's limits leave no room to import torch: its libraries do not raise, they
    print and end the process."""
    if "torch" in sys.modules:
        return
    for limit, used in host_resources().process_limits():
        if limit - used < TORCH_TAKES:
            raise CapacityError(
                "importing torch",
                f"this process may use {limit >> 20} MiB of address space or data (ulimit -v, ulimit -d), "
                f"{max(0, limit - used) >> 20} MiB of it are left, and torch alone takes about {TORCH_TAKES >> 20}",
                "Raise the limit; a model comes on top.",
            )


def _nvidia_smi(number: int) -> tuple[int, int] | None:
    """From nvidia-smi, which numbers devices in the order of the bus."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={number}", *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    fields = done.stdout.strip().split(",")
    if done.returncode != 0 or len(fields) != 2 or not all(field.strip().isdecimal() for field in fields):
        return None
    free, total = (int(field) * 2**20 for field in fields)
    return free, total


def _sysfs(number: int, root: Path) -> tuple[int, int] | None:
    """From the amdgpu driver and those derived from it."""
    cards = sorted((root / "sys/class/drm").glob("card[0-9]*/device/mem_info_vram_total"))
    try:
        total = int(cards[number].read_text(encoding="ascii"))
        used = int((cards[number].parent / "mem_info_vram_used").read_text(encoding="ascii"))
    except (OSError, ValueError, IndexError):
        return None
    return max(0, total - used), total
