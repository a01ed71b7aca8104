"""Builds csrc/ into the package when there is a C++ compiler, and installs without it otherwise.

Everything else about the package stands in pyproject.toml. No torch and no Python headers are needed: the
library has a plain C interface and is loaded through ctypes, so one build serves every Python and every
torch.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

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
    target: Path, source: Path = ROOT / "csrc", lost: dict[str, str] | None = None
) -> str | None:
    """Compile csrc/ to ``target``; None when it worked, else why not in one line. Never raises, leaves no
    part file.

    An instruction set that the compiler does not know costs that set alone; ``lost`` then says why, by its name.
    """
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            objects = compile_sources(
                [*compiler, *FLAGS], source, Path(scratch), machine(), {} if lost is None else lost
            )
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
    command: list[str], source: Path, into: Path, machine: str, lost: dict[str, str]
) -> list[str]:
    """Objects of all of ``source`` that this machine and compiler can have; -DQWENRT_WITH_... tells the rest which."""
    objects: list[str] = []
    have: list[str] = []

    def units(instructions: str, flags: list[str]) -> list[str]:
        def compiled(file: Path) -> str:
            unit = into / ".".join((*file.relative_to(source).with_suffix("").parts, "o"))
            unfused = ["-ffp-contract=off"] if file.name == UNFUSED else []
            _run([*command, *flags, *unfused, f"-I{source}", "-c", str(file), "-o", str(unit)])
            return str(unit)

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as compilers:
            return list(compilers.map(compiled, sources(source, instructions)))

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


def build_or_say_why(target: Path) -> bool:
    """build_kernels, with one line for the reader of the installation's output."""
    lost: dict[str, str] = {}
    reason = build_kernels(target, lost=lost)
    if reason is None:
        print(f"qwenrt: built the CPU kernels ({target.name})")
        for name, why in lost.items():
            print(f"qwenrt: without those for {name}: {why}")
    else:
        what = f"qwenrt: the CPU kernels were not built: {reason}. Plain torch serves the CPU instead."
        print(what, file=sys.stderr)
    return reason is None


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
            build_or_say_why(ROOT / LIBRARY)
        elif not build_or_say_why(Path(self.build_lib, LIBRARY)):
            Path(self.build_lib, LIBRARY).unlink(missing_ok=True)  # one of an earlier build, copied as data


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

if __name__ == "__main__":
    setup(cmdclass=commands, distclass=PlatformDistribution)
