"""The C++ tests of csrc/tests: on this machine, under sanitizers, and for instruction sets it lacks.

What is marked slow takes minutes; `make csrc-check` runs all of it and says what is missing here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qwenrt.backends.cpu import kernels
from tests.csrc.conftest import FLAGS, ROOT, SANITIZED, TESTS, link, run

AARCH64 = "aarch64-linux-gnu-g++"
SIMDE = ("/usr/include/simde/x86/avx512.h", "/usr/local/include/simde/x86/avx512.h")
Objects = Callable[..., list[str]]
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 only")


@pytest.mark.parametrize("test", ["linear", "layer", "forward"])
def test_the_built_library(compiler: list[str], tmp_path: Path, test: str) -> None:
    """The library as it serves, with every instruction set that this CPU runs."""
    try:
        sets = kernels.Kernels().isas
    except kernels.KernelsUnavailable as reason:
        pytest.skip(str(reason))
    library = [str(kernels.LIBRARY), f"-Wl,-rpath,{kernels.LIBRARY.parent}"]
    said = run([str(link([*compiler, "-O1", "-Wall", "-Wextra"], test, library, tmp_path)), "40"])
    assert said.endswith(f"{' '.join(sets)}: ok\n")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_no_unit_of_a_set_has_a_function_that_others_could_get(
    compiler: list[str], setup_module: ModuleType, tmp_path: Path
) -> None:
    """Of equal inline functions the linker keeps one: a set's could end up in code that any CPU runs."""
    root, unit = ROOT / "csrc", str(tmp_path / "unit.o")
    for name, flags in setup_module.SETS.get(setup_module.machine(), {}).items():
        for file in setup_module.sources(root, name):
            done = subprocess.run([*compiler, *FLAGS, *flags, "-O0", "-g0", "-c", str(file), "-o", unit])
            if done.returncode:
                pytest.skip(f"the compiler does not know {name}")
            symbols = subprocess.run(["nm", "-C", unit], capture_output=True, text=True, check=True).stdout
            assert not [line for line in symbols.splitlines() if " W " in line or " u " in line], file


@pytest.mark.slow
def test_portable_code_under_address_and_undefined_sanitizers(
    compiler: list[str], setup_module: ModuleType, tmp_path: Path, all_objects: Objects
) -> None:
    command = [*compiler, *SANITIZED, "-O0"]  # half the time to compile
    sanitized_or_skip(command, tmp_path)
    setup_module.SETS.clear()
    objects = all_objects(command, "")
    assert run([str(link(command, "linear", objects, tmp_path)), "8"]) == "linears: scalar: ok\n"
    assert run([str(link(command, "forward", objects, tmp_path))]) == "forwards: scalar: ok\n"
    assert run([str(link(command, "pool", objects, tmp_path)), "50"]) == "pool: ok\n"


def test_the_thread_pool_under_the_thread_sanitizer(compiler: list[str], tmp_path: Path) -> None:
    command = [*compiler, "-O1", "-fsanitize=thread"]
    sanitized_or_skip(command, tmp_path)
    program = link(command, "pool", [str(ROOT / "csrc" / "pool" / "thread_pool.cpp")], tmp_path)
    assert run([str(program)]) == "pool: ok\n"
    # all threads on one processor: whoever waits must let the others work
    if hasattr(os, "sched_getaffinity"):
        assert run([str(program), "50"], cpus={min(os.sched_getaffinity(0))}) == "pool: ok\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_set_here_under_sanitizers(
    compiler: list[str], setup_module: ModuleType, tmp_path: Path, all_objects: Objects
) -> None:
    sanitized_or_skip([*compiler, *SANITIZED], tmp_path)
    objects = all_objects([*compiler, *SANITIZED], setup_module.machine())
    for test in ("linear", "layer", "forward", "pool"):
        assert run([str(link([*compiler, *SANITIZED], test, objects, tmp_path))]).endswith(": ok\n")


@pytest.mark.slow
def test_portable_code_under_the_thread_sanitizer(
    compiler: list[str], setup_module: ModuleType, tmp_path: Path, all_objects: Objects
) -> None:
    command = [*compiler, "-O1", "-fsanitize=thread"]
    sanitized_or_skip(command, tmp_path)
    setup_module.SETS.clear()
    objects = all_objects(command, "")
    for test in ("linear", "layer", "forward"):
        assert run([str(link(command, test, objects, tmp_path))]) == f"{test}s: scalar: ok\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_neon_under_emulation(tmp_path: Path, all_objects: Objects) -> None:
    """With dot products, and on an ARMv8 that has none."""
    emulator = next(filter(None, map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static"))), None)
    if shutil.which(AARCH64) is None or emulator is None:
        pytest.skip(f"needs {AARCH64} and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    objects = all_objects([AARCH64, "-O2"], "aarch64")
    for test, effort in (("linear", "30"), ("layer", "4"), ("forward", "3")):
        program = str(link([AARCH64, "-O1", "-static"], test, objects, tmp_path))
        for cpu, sets in (("max", "neondot neon scalar"), ("cortex-a57", "neon scalar")):
            assert run([emulator, "-cpu", cpu, program, effort]) == f"{test}s: {sets}: ok\n"


@x86
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_avx512_and_amx_through_portable_intrinsics(
    compiler: list[str], setup_module: ModuleType, tmp_path: Path, all_objects: Objects
) -> None:
    """The AVX-512 unit compiled with SIMDe's intrinsics, AMX's with plain C++ in their place: their arithmetic, not the
    instructions themselves. Where the CPU has these, test_the_built_library runs them.
    """
    if not any(Path(header).exists() for header in SIMDE):
        pytest.skip("needs SIMDe (Debian: libsimde-dev)")
    if "avx2" not in kernels.Kernels().isas:
        pytest.skip("the AVX-512 set shares AVX2's kernels, which this CPU lacks")
    for name in ("avx512", "amx"):
        setup_module.SETS["x86_64"][name] = [f"-I{TESTS / 'simde'}"]
    command = [*compiler, "-O1", "-D__builtin_cpu_supports(name)=1", "-DQWENRT_EMULATED_AMX"]
    program = link(command, "linear", all_objects(command, "x86_64"), tmp_path)
    assert run([str(program), "60"]) == "linears: amx avx512vnni avx2 scalar: ok\n"


def sanitized_or_skip(command: list[str], tmp_path: Path) -> None:
    """Skips where the compiler has no sanitizers' libraries."""
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    made = subprocess.run([*command, *FLAGS, str(empty), "-o", str(tmp_path / "empty")], capture_output=True)
    if made.returncode or subprocess.run([str(tmp_path / "empty")], capture_output=True).returncode:
        pytest.skip("no sanitizers here")
