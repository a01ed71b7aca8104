"""Builds csrc/ into the package when there is a C++ compiler, and installs without it otherwise; and writes what a
package index shows of the README.

Everything else about the package stands in pyproject.toml. No torch and no Python headers are needed: the
library has a plain C interface and is loaded through ctypes, so one build serves every Python and every
torch.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, TextIO

from setuptools import Command, Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).resolve().parent
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
AMX = [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
NEON = ["-fno-schedule-insns"]  # gcc's first scheduling has more values alive than there are registers
# Machine -> its instruction sets and their flags, each for CPUs that run those before it as well. A set has a folder in
# csrc/isa/, and its flags reach the files of that folder alone: all other code runs before the CPU was asked.
SETS = {
    "x86_64": {"avx2": AVX2, "avx512": AVX512, "amx": AMX},
    "aarch64": {"neon": NEON, "neondot": [*NEON, "-march=armv8.2-a+dotprod"]},
}
# Its results are those of torch bit for bit, which has no products fused with sums.
UNFUSED = "quantize_group.cpp"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY = Path("qwenrt", "backends", "cpu", f"_qwenrt_cpu{SUFFIX}")
# Beside the library, where it is missing: why, in a line. pip shows nothing of an installation that succeeds.
NOT_BUILT = "_not_built.txt"
ADDRESS = "QWENRT_REPOSITORY"  # environment variable of a build: where the source is published, https://...


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, else the first one on the PATH."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        try:
            return shlex.split(chosen)
        except ValueError:  # quotes that do not close: running it names it
            return [chosen]
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def build_kernels(
    target: Path,
    source: Path = ROOT / "csrc",
    lost: dict[str, str] | None = None,
    compiled: Callable[[], object] = lambda: None,
) -> str | None:
    """Compile csrc/ to ``target``; None when it worked, else why not in one line. Never raises, leaves no
    part file.

    An instruction set that the compiler does not know costs that set alone; ``lost`` then says why, by its name.
    ``compiled`` is called after each file, from several threads.
    """
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            lost = {} if lost is None else lost
            command = [*compiler, *FLAGS]
            objects = compile_sources(command, source, Path(scratch), machine(), lost, compiled)
            library = Path(scratch, target.name)
            _run([*compiler, "-shared", "-pthread", *objects, "-o", str(library)])
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                shutil.copy(library, partial)
                os.replace(partial, target)  # a process that has the old library mapped keeps it
            finally:
                partial.unlink(missing_ok=True)
    except (OSError, subprocess.SubprocessError) as error:
        return _one_line(error, compiler)
    return None


def machine() -> str:
    """The key of SETS for the machine that runs this, else its own name."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def sources(root: Path, instructions: str = "") -> list[Path]:
    """The files of ``root`` that are compiled for an instruction set; without one, those that any CPU runs."""
    if instructions:
        return sorted((root / "isa" / instructions).glob("*.cpp"))
    folders = [path for path in root.iterdir() if path.is_dir() and path.name not in ("isa", "tests")]
    return sorted(file for folder in (*folders, root / "isa" / "scalar") for file in folder.glob("*.cpp"))


def compile_sources(
    command: list[str],
    source: Path,
    into: Path,
    machine: str,
    lost: dict[str, str],
    compiled: Callable[[], object] = lambda: None,
) -> list[str]:
    """Objects of all of ``source`` that this machine and compiler can have; -DQWENRT_WITH_... tells the rest which."""
    objects: list[str] = []
    have: list[str] = []

    def units(instructions: str, flags: list[str]) -> list[str]:
        def compile_one(file: Path) -> str:
            unit = into / ".".join((*file.relative_to(source).with_suffix("").parts, "o"))
            unfused = ["-ffp-contract=off"] if file.name == UNFUSED else []
            _run([*command, *flags, *unfused, f"-I{source}", "-c", str(file), "-o", str(unit)])
            compiled()
            return str(unit)

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as compilers:
            return list(compilers.map(compile_one, sources(source, instructions)))

    for name, flags in SETS.get(machine, {}).items():
        try:
            objects += units(name, flags)
        except subprocess.CalledProcessError as error:
            lost[name] = _one_line(error, command)
            break  # the sets after it build on it
        have.append(f"-DQWENRT_WITH_{name.upper()}")
    return objects + units("", have)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=600)


def _one_line(error: Exception, compiler: list[str]) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        output = error.stderr.strip().splitlines() or [f"exit status {error.returncode}, no message"]
        cause = next((line for line in output if "error" in line.lower()), output[0])
    elif isinstance(error, subprocess.TimeoutExpired):
        cause = f"not done in {error.timeout:.0f} s"
    else:
        cause = str(error)
    return f"{compiler[0]} failed ({cause.strip()[:200]})"


def build_or_say_why(target: Path, unless_current: bool = False) -> bool:
    """build_kernels, with lines for the reader of the installation's output; the last one says how it ended. Where it
    failed, a note beside ``target`` says why to those who load the package. ``unless_current``: not where the library
    is newer than all that it is made from."""
    if unless_current and _current(target):
        _say(f"the CPU kernels are there already ({target.name})")
        return True
    lost: dict[str, str] = {}
    note = target.with_name(NOT_BUILT)
    compiler, started = find_compiler(), time.monotonic()
    files = len(sources(ROOT / "csrc")) + sum(
        len(sources(ROOT / "csrc", instructions)) for instructions in SETS.get(machine(), {})
    )
    if compiler is not None:
        _say(f"compiling the CPU kernels with {compiler[0]} ({files} files)")
    reason = build_kernels(target, lost=lost, compiled=_Counted(files).one_more)
    if reason is None:
        note.unlink(missing_ok=True)
        _say(f"built the CPU kernels ({target.name}) in {time.monotonic() - started:.0f} s")
        for name, why in lost.items():
            _say(f"without those for {name}: {why}")
    else:
        _say(f"the CPU kernels were not built: {reason}. Plain torch serves the CPU instead.", sys.stderr)
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n", encoding="utf-8")
    return reason is None


def _current(target: Path) -> bool:
    made_from = [
        Path(__file__),
        *(file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cpp", ".h")),
    ]
    return target.is_file() and target.stat().st_mtime > max(file.stat().st_mtime for file in made_from)


class _Counted:
    """Says after every eighth of the files how many are compiled."""

    def __init__(self, files: int) -> None:
        self._files, self._done, self._lock = files, 0, threading.Lock()

    def one_more(self) -> None:
        with self._lock:
            self._done += 1
            if self._done * 8 // self._files > (self._done - 1) * 8 // self._files:
                _say(f"compiled {self._done} of {self._files} files")


def _say(line: str, where: TextIO | None = None) -> None:
    print(f"qwenrt: {line}", file=where, flush=True)  # pip and scripts/set_up.py read it as it comes


class BuildKernels(Command):
    """`python setup.py build_kernels`: compile csrc/ into this source tree."""

    description = "compile csrc/ into this source tree"
    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        """Nothing to choose."""

    def finalize_options(self) -> None:
        """Nothing to check."""

    def run(self) -> None:
        if not build_or_say_why(ROOT / LIBRARY):
            raise SystemExit(1)


class BuildPy(build_py):
    """Puts the library beside the modules: into the build folder, or into the source tree of an editable
    install."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            build_or_say_why(ROOT / LIBRARY, unless_current=True)
        elif not build_or_say_why(Path(self.build_lib, LIBRARY)):
            Path(self.build_lib, LIBRARY).unlink(missing_ok=True)  # one of an earlier build, copied as data
        else:
            Path(self.build_lib, LIBRARY.parent, NOT_BUILT).unlink(missing_ok=True)


class Develop(develop):
    """The editable install of old versions of pip."""

    def run(self) -> None:  # type: ignore[override]
        build_or_say_why(ROOT / LIBRARY)
        super().run()


class PlatformDistribution(Distribution):
    """A wheel with the library is for one platform, one without it for any."""

    def has_ext_modules(self) -> bool:
        return find_compiler() is not None


commands: dict[str, type] = {"build_kernels": BuildKernels, "build_py": BuildPy, "develop": Develop}

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = None

if bdist_wheel is not None:

    class BdistWheel(bdist_wheel):
        """Tags the wheel after what is in it: py3-none-<platform> with the library, py3-none-any without."""

        def get_tag(self) -> tuple[str, str, str]:
            with_library = (Path(self.bdist_dir or "") / LIBRARY).exists() or (
                Path(self.get_finalized_command("build").build_lib) / LIBRARY
            ).exists()
            if not with_library:
                return "py3", "none", "any"
            return "py3", "none", super().get_tag()[2]

    commands["bdist_wheel"] = BdistWheel


def readme_for_an_index(text: str, address: str) -> str:
    """The README where its neighbours are not beside it, as on PyPI: links to files lead to ``address``, where the
    source is published, or, without one, are the words that they stood under, with the file's name."""

    def elsewhere(link: re.Match[str]) -> str:
        words, target = link.groups()
        if re.match(r"https?://|#", target):
            return link.group()
        if address:
            kind = "tree" if (ROOT / target.split("#")[0]).is_dir() else "blob"
            return f"[{words}]({address}/{kind}/main/{target})"
        return words if words == target else f"{words} (`{target}`)"

    return re.sub(r"(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)", elsewhere, text)


def address_of_the_source() -> str:
    """Where the source is published, "" where nobody said so."""
    address = os.environ.get(ADDRESS, "").strip().rstrip("/").removesuffix(".git")
    if address and not re.fullmatch(r"https://[\w./~-]+", address):
        raise SystemExit(f"{ADDRESS} is {address!r}: it must be an https:// address of a repository.")
    return address


def index_page() -> dict[str, object]:
    """What of an index's page depends on ADDRESS: arguments of `setup`."""
    address = address_of_the_source()
    text = readme_for_an_index((ROOT / "README.md").read_text(encoding="utf-8"), address)
    pages = {
        "Source": "",
        "Documentation": "/tree/main/docs",
        "Changelog": "/blob/main/CHANGELOG.md",
        "Issues": "/issues",
    }
    return {
        "long_description": text,
        "long_description_content_type": "text/markdown",
        "project_urls": {name: address + path for name, path in pages.items()} if address else {},
    }


if __name__ == "__main__":
    setup(cmdclass=commands, distclass=PlatformDistribution, **index_page())
