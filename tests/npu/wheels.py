"""Wheels of one release, unpacked beside the environment: installed in it, torch_npu would take part in each import.

Torch's wheel from PyPI wants NVIDIA's libraries, gigabytes that nothing here calls: each gets a stand-in that has the
names that torch looks for, and whose functions say that there is no device.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

_NVIDIA = re.compile(r"lib(cu|nv|nccl)")
_FUNCTIONS = re.compile("_?_?cu|nv|nccl")
_NO_DEVICE = 100  # cudaErrorNoDevice
# torch_npu's and CUDA's half of torch 2.14 both announce settings of the allocator, which may be done once.
_KEYS = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11Ev"
_KEYS_FOR_EACH = f"""#include <string>
#include <unordered_set>
extern "C" void *{_KEYS}() {{ return new std::unordered_set<std::string>; }}
"""


class Missing(Exception):
    """No index has the wheel."""


def unpacked(directory: Path, package: str, release: str) -> Path:
    """The directory of a wheel's files."""
    target = directory / f"{package}-{release}"
    if (target / "complete").exists():
        return target
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "-d", str(target)]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, f"{package}=={release}"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(target.glob("*.whl"))
    if done.returncode or not found:
        raise Missing((done.stderr.strip().splitlines() or ["pip says nothing"])[-1])
    with zipfile.ZipFile(found[0]) as archive:
        archive.extractall(target)
    found[0].unlink()
    (target / "complete").touch()
    return target


def other_torch(directory: Path, release: str) -> tuple[Path, str]:
    """Another torch than the environment's: the directory of its files, and what has to be loaded before it."""
    torch = unpacked(directory, "torch", release)
    libraries = torch / "torch" / "lib"
    if not (torch / "stand-ins").exists():
        _stand_in(libraries)
        (torch / "stand-ins").touch()
    keys = torch / "keys_for_each.so"
    if _KEYS not in _told("nm", "-D", str(libraries / "libc10.so")):
        return torch, ""
    if not keys.exists():
        compiled(keys, _KEYS_FOR_EACH, "c++")
    return torch, str(keys)


def _stand_in(libraries: Path) -> None:
    """Write NVIDIA's libraries, as far as those of torch need them to be loaded."""
    needed: set[str] = set()
    lacking: set[str] = set()
    had: set[str] = set()
    versions: dict[str, set[str]] = {}  # of symbols, by the library that has them
    for path in sorted(libraries.glob("*.so")):
        needed |= set(re.findall(r"NEEDED.*\[(.*)\]", _told("readelf", "-d", str(path))))
        for file, names in re.findall(
            r"File: (\S+) .*\n((?:.*Name: .*\n)+)", _told("readelf", "-V", str(path))
        ):
            versions.setdefault(file, set()).update(re.findall(r"Name: (\S+)", names))
        lacking |= undefined(path)
        had |= {line.split()[-1] for line in _told("nm", "-D", "--defined-only", str(path)).splitlines()}
    plain = sorted(name for name in lacking - had if "@" not in name and _FUNCTIONS.match(name))
    for name in filter(_NVIDIA.match, sorted(needed)):
        symbols = plain if name.startswith("libcudart") else []  # of which nothing says where they are
        script = ""
        for version in sorted(versions.get(name, ())):
            own = sorted(
                symbol.partition("@")[0] for symbol in lacking if symbol.partition("@")[2] == version
            )
            script += f"{version} {{ global: {' '.join(symbol + ';' for symbol in own)} }};\n"
            symbols = symbols + own
        (libraries / "versions.txt").write_text(script, encoding="utf-8")
        source = "\n".join(f"int {symbol}(void) {{ return {_NO_DEVICE}; }}" for symbol in symbols)
        flags = [f"-Wl,--version-script={libraries / 'versions.txt'}"] if script else []
        compiled(libraries / name, source or "int a_stand_in;", "c", *flags)


def undefined(library: Path) -> set[str]:
    """The symbols that a library wants of others, with their versions: "cudaFree@libcudart.so.12"."""
    lines = _told("nm", "-D", "--undefined-only", str(library)).splitlines()
    return {line.split()[-1] for line in lines}


def compiled(target: Path, source: str, language: str, *flags: str) -> None:
    """A shared library."""
    options = ["-O1", "-w", "-shared", "-fPIC", "-x", language, "-", f"-Wl,-soname,{target.name}", *flags]
    compiler = "c++" if language == "c++" else "cc"
    subprocess.run([compiler, *options, "-o", str(target)], input=source, text=True, check=True)


def _told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
