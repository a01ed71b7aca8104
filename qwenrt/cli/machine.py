"""The machine as doctor and bench report it: system, processor, cores, memory, drivers of devices.

scripts/set_up.py loads this file by itself, before anything is installed: it imports nothing but Python's own."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

# Instruction sets that kernels for language models use, as Linux spells them.
_INSTRUCTION_SETS = frozenset(
    (
        *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni"),
        *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
        *("neon", "asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
    )
)

# Whose devices -> files that are there where their driver is.
DRIVERS = {
    "NVIDIA": ("/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1"),
    "AMD or DCU": ("/dev/kfd",),
    "Ascend": ("/dev/davinci_manager",),
}


def drivers() -> list[str]:
    """Whose devices have a driver here: keys of DRIVERS."""
    return [vendor for vendor, files in DRIVERS.items() if any(Path(file).exists() for file in files)]


def describe() -> dict[str, Any]:
    """System, processor, cores, instruction sets and memory, with None for what cannot be found out.

    ``cores_usable`` and the memory heed containers' limits.
    """
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    affinity = getattr(os, "sched_getaffinity", None)
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": info.get("model name") or info.get("Hardware") or platform.processor() or None,
        "cores": os.cpu_count(),
        "cores_allowed": len(affinity(0)) if affinity is not None else os.cpu_count(),
        "cores_usable": None,
        "instruction_sets": sorted(_INSTRUCTION_SETS & flags),
        "memory_free_bytes": None,
        "memory_total_bytes": None,
    }
    try:
        from qwenrt.loader.memory.device import host_resources

        resources = host_resources()
        found["cores_usable"] = resources.usable_cores()
        found["memory_free_bytes"], found["memory_total_bytes"] = resources.memory()
    except Exception:
        pass  # a system without the known interfaces
    return found


def in_words(found: dict[str, Any]) -> str:
    """What of `describe` goes beside a measurement."""
    return f"{found['processor'] or found['system']}, {found['cores_allowed']} logical cores"


def beside(path: str) -> Any:
    """A module of this package by its path, loaded by itself: the packages around it may import torch."""
    from importlib import util

    spec = util.spec_from_file_location(f"qwenrt_{Path(path).stem}", Path(__file__).parents[1] / path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def peak_rss_bytes() -> int | None:
    """The most memory this process has held at once, None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
