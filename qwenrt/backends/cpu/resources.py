"""What this process may use of the machine: cores and memory, within affinity and its containers' limits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 of cgroups writes "no limit" as a number near 2**63


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may keep busy: those of its affinity mask, SMT siblings counted once, within
    cgroup quotas."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
    topology = root / "sys/devices/system/cpu"
    cores = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    quota = min(_cpu_quotas(root), default=float("inf"))
    return max(1, int(min(len(cores), quota)))


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """(free, total) bytes: the machine's, or those of the tightest limit of its memory cgroups and of this process
    (ulimit -v, ulimit -d). Page cache that can go counts as free."""
    free, total = _machine_memory(root)
    for limit, used in chain(_memory_limits(root), process_limits(root)):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return free, total


def _machine_memory(root: Path) -> tuple[int, int]:
    text = _read(root / "proc/meminfo")
    if text:
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        kib = {name: int(value.split()[0]) for name, value in fields.items() if value.split()}
        if "MemTotal" in kib:
            return kib.get("MemAvailable", kib.get("MemFree", 0)) << 10, kib["MemTotal"] << 10
    if sys.platform == "win32":
        return _windows_memory()
    page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total // 2
    return free * page, total * page


def _windows_memory() -> tuple[int, int]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("free", ctypes.c_uint64),
            ("rest", ctypes.c_uint64 * 5),
        )

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return int(status.free), int(status.total)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used without inactive page cache) of each memory cgroup above this process that has a limit."""
    files = (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for controller, limit_file, used_file, inactive in files:
        for group in _cgroups(root, controller):
            limit = _number(group / limit_file)
            if limit is None or limit >= _UNLIMITED:
                continue
            stat = dict(line.split() for line in (_read(group / "memory.stat") or "").splitlines())
            used = (_number(group / used_file) or 0) - int(stat.get(inactive, 0))
            yield limit, max(0, used)


def process_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """(limit, used) of this process's address space and of its writable memory, where they are limited."""
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = (_read(root / "proc/self/statm") or "").split()
    for name, field in (("RLIMIT_AS", 0), ("RLIMIT_DATA", 5)):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and limit >= 0:
            used = int(pages[field]) * resource.getpagesize() if len(pages) > field else 0
            yield limit, used


def _cpu_quotas(root: Path) -> Iterator[float]:
    for group in _cgroups(root, ""):
        quota, _, period = (_read(group / "cpu.max") or "max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            yield int(quota) / int(period)
    for group in _cgroups(root, "cpu"):
        limit, span = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if limit is not None and span and limit > 0:
            yield limit / span


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup of a version 1 controller ("" is version 2) and all above it."""
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller not in names.split(","):
            continue
        base = (
            mount
            if not controller
            else next((d for d in (mount / names, mount / controller) if d.is_dir()), mount)
        )
        group = base / path.strip("/")
        # Inside a container the path may be the host's and not exist here: then the mount is our own group.
        while group != base and base in group.parents:
            yield group
            group = group.parent
        yield base


def give_back_free_pages() -> None:
    """What was freed goes back to the system. glibc keeps free pages between blocks that are still in use: after a
    load these are the merge buffers of all layers."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _number(path: Path) -> int | None:
    text = _read(path)
    try:
        return int(text) if text else None
    except ValueError:  # "max"
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
