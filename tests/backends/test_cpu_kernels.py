"""The kernels of csrc/ where qwenrt.conformance does not look: layouts, threads, and every way of not having them."""

from __future__ import annotations

import ctypes.util
import dataclasses
import importlib.util
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.backends.cpu import CPUBackend, backend, kernel_status, kernels, library, resources
from qwenrt.backends.cpu.activations import Activations
from qwenrt.errors import BackendError
from qwenrt.ops import quantization, reference
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize
from tests.kernel_sets import KERNELS, SETS, needs_kernels

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
BUILT = KERNELS is not None
# Largest error, as a share of sum |x| |W|, that float32 sums in any order may have.
EXACT = 2e-6


def random_weight(
    n: int, k: int, bits: int, group_size: int, *, sym: bool = False, shuffle: bool = False, bias: bool = True
) -> CanonicalWeight:
    weight = quantization.quantize_dense(
        torch.randn(n, k), bits, group_size, bias=torch.randn(n) if bias else None, sym=sym
    )
    perm = torch.randperm(k).to(torch.int32) if shuffle else None
    scales = weight.scales
    assert scales is not None
    if scales.dtype == torch.float16 and float(torch.rand(())) < 0.5:
        # zeros of 4-bit codes have to lie beside them
        scales = (scales.view(torch.int16) ^ 1).view(torch.float16)
    return dataclasses.replace(weight, perm=perm, scales=scales)


def float64_linear(x: torch.Tensor, weight: CanonicalWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T + bias in float64, and the size that errors are measured by."""
    w = dequantize(weight, torch.float64)
    y, size = x.double() @ w.t(), x.double().abs() @ w.abs().t() + 1e-9
    return (y, size) if weight.bias is None else (y + weight.bias, size + weight.bias.abs())


def summed(x: torch.Tensor, weight: CanonicalWeight) -> torch.Tensor:
    """What the kernels add up for y = x W^T + bias, in sizes: codes and zeros are summed apart, so that it is
    sum |x| (code + zero) |scale| + |bias|, which may be far more than sum |x| |W| where they cancel."""
    assert weight.codes is not None and weight.scales is not None and weight.zeros is not None
    columns = x if weight.perm is None else x[:, weight.perm.long()]
    group = torch.arange(weight.in_features) // weight.group_size
    reach = (weight.codes + weight.zeros[group]).double() * weight.scales[group].double().abs()
    return columns.double().abs() @ reach + (0.0 if weight.bias is None else weight.bias.double().abs())


def assert_exact(y: torch.Tensor, x: torch.Tensor, weight: CanonicalWeight) -> None:
    wanted, size = float64_linear(x, weight)
    assert y.shape == wanted.shape and y.dtype == x.dtype
    if y.numel():
        assert float(((y.double() - wanted).abs() / size).max()) < EXACT


# ---- right answers


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_sums_that_cancel_part_between_sets_by_no_more_than_is_said(cpu: CPUBackend, bits: int) -> None:
    """Activations far from zero and massive ones. A float32 sum of n terms in any order is off by n 2^-24 of the sum of
    their sizes at most; sets sum in different orders, so two of them part by at most twice that."""
    x = torch.randn(9, 1300) + 50
    x[:, 650] *= 300
    x[::3, 325] *= 3000
    dense = torch.randn(24, 1300)
    if bits == 16:
        weight = CanonicalWeight(dense=dense.bfloat16())
        wanted, most = x.double() @ dense.bfloat16().double().t(), (1300 + 2) * 2.0**-24
        most = most * (x.double().abs() @ dense.bfloat16().double().abs().t())
    else:
        weight = quantization.quantize_dense(dense, bits, 128, bias=torch.randn(24))
        wanted, most = float64_linear(x, weight)[0], (128 + 11 + 4) * 2.0**-24 * summed(x, weight)
    results = []
    for isa in SETS:
        cpu.configure(isa, activations="exact")
        results.append(cpu.linear(x, cpu.pack_linear(weight, torch.float32)).double())
        assert bool(((results[-1] - wanted).abs() <= most).all()), isa
        assert bool(((results[-1] - results[0]).abs() <= 2 * most).all()), f"{isa} and {SETS[0]}"


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_threads_change_nothing(cpu: CPUBackend, bits: int) -> None:
    weight = random_weight(1000, 256, bits, 128, shuffle=True)
    x = torch.randn(5, 256)
    w = cpu.pack_linear(weight, torch.float32)
    y = cpu.linear(x, w)
    for threads in (1, 3):
        cpu.configure(num_threads=threads)
        assert torch.equal(cpu.linear(x, w), y)


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
def test_subnormal_and_extreme_float16_scales(cpu: CPUBackend, isa: str) -> None:
    cpu.configure(isa)
    weight = random_weight(8, 16, 4, 16, bias=False)
    scales = torch.tensor([6e-8, 1e-6, 6.1e-5, 1.0, 65504.0, -2.0, 0.0, 3e-5], dtype=torch.float16)
    weight = dataclasses.replace(weight, scales=scales[None])
    x = torch.randn(1, 16)
    assert_exact(cpu.linear(x, cpu.pack_linear(weight, torch.float32)), x, weight)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_16_bit_weights_stay_where_they_are(cpu: CPUBackend, dtype: torch.dtype) -> None:
    dense = torch.randn(9, 515).to(dtype)
    weight = CanonicalWeight(dense=dense, bias=torch.randn(9))
    w = cpu.pack_linear(weight, torch.float32)
    assert w.nbytes == 2 * 9 * 515 + 4 * 9
    assert w.data["weight"].data_ptr() == dense.data_ptr()
    assert cpu.pack_linear(weight, dtype).kind == "dense"


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("large", [(3e38,), (1e38, -1e38), (3e38, -3e38)])
def test_finite_activations_too_large_to_sum_follow_torch(
    cpu: CPUBackend, isa: str, large: tuple[float, ...]
) -> None:
    cpu.configure(isa)
    for bits in (4, 8):
        weight = random_weight(20, 64, bits, 32)
        x = torch.randn(2, 64)
        x[1, 3 : 3 + len(large)] = torch.tensor(large)
        y = cpu.linear(x, cpu.pack_linear(weight, torch.float32))
        wanted = x @ dequantize(weight, torch.float32).t() + weight.bias
        assert torch.allclose(y, wanted, rtol=1e-3, atol=1e-3, equal_nan=True)


# ---- threads and processes


@needs_kernels
def test_many_callers_at_once_get_their_own_answers(cpu: CPUBackend) -> None:
    weights = [random_weight(96, 128, bits, 64) for bits in (4, 8)]
    packed = [cpu.pack_linear(weight, torch.float32) for weight in weights]
    wrong: list[str] = []

    def call(seed: int) -> None:
        x = torch.randn(1 + seed % 5, 128, generator=torch.Generator().manual_seed(seed))
        for weight, w in zip(weights, packed, strict=True):
            wanted, size = float64_linear(x, weight)
            for _ in range(20):
                if float(((cpu.linear(x, w) - wanted).abs() / size).max()) > EXACT:
                    wrong.append(f"thread {seed}")

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_computes_with_workers_of_its_own(cpu: CPUBackend) -> None:
    assert cpu.kernels is not None
    w = cpu.pack_linear(random_weight(512, 1024, 4, 128), torch.float32)
    x = torch.randn(1, 1024)
    y = cpu.kernels.quant_linear(x, w, Activations())
    assert y is not None
    child = os.fork()
    if child == 0:
        signal.alarm(200)
        again = cpu.kernels.quant_linear(x, w, Activations())
        os._exit(0 if again is not None and again.tolist() == y.tolist() else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- choices, and what is said about them


@needs_kernels
def test_kernels_can_be_chosen_and_switched_off(cpu: CPUBackend) -> None:
    cpu.configure("scalar", num_threads=1)
    assert cpu.describe() == "portable kernels, 1 thread"
    cpu.configure("off")
    assert cpu.describe() == "plain torch: the kernels are switched off"
    weight = random_weight(8, 32, 4, 16)
    assert cpu.pack_linear(weight, torch.float32).kind == "w4a16"
    assert cpu.why_not("linear", OpSpec("linear", "o", torch.float32, kind="w4a16")) is not None
    with pytest.raises(
        BackendError, match=r"'avx512': no such choice. Use one of: auto, off, amx, avx512vnni, avx2"
    ):
        cpu.configure("avx512")


@needs_kernels
def test_every_set_of_this_cpu_can_be_chosen_and_no_other(cpu: CPUBackend) -> None:
    assert cpu.kernels is not None
    here = cpu.kernels.isas
    assert here[-1] == "scalar" and set(here) <= set(backend.KERNEL_CHOICES)
    cpu.configure()
    names = {"avx512vnni": "AVX-512", "scalar": "portable"}
    assert cpu.describe().startswith(f"{names.get(here[0], here[0].upper())} kernels, ")
    for name in here:
        cpu.configure(name)
        assert cpu.kernels.isa == name
    for name in set(backend.KERNEL_CHOICES) - {"auto", "off", *here}:
        with pytest.raises(BackendError, match=f"'{name}' were asked for; this CPU and build have {here[0]}"):
            cpu.configure(name)


def test_kernel_status_is_one_line() -> None:
    line = kernel_status()
    assert "\n" not in line
    if BUILT:
        assert all(name in line for name in kernels.Kernels().isas)
    assert " kernels, " in line if BUILT else line.startswith("plain torch: the C++ kernels were not built")


@needs_kernels
def test_bindings_say_which_code_serves(cpu: CPUBackend) -> None:
    def why(kind: str, op: str = "linear") -> str | None:
        return cpu.why_not(op, OpSpec(op, "layers.0", torch.float32, kind=kind))

    assert [why(kind) for kind in (kernels.native_kind(4), "dense", "dense16", "parts", "")] == [None] * 5
    odd = cpu.pack_linear(random_weight(8, 30, 4, 3), torch.float32)
    assert odd.kind == "w4a16" and "groups do not fill" in str(why(odd.kind))
    x = torch.randn(2, 30)
    assert torch.equal(cpu.linear(x, odd), reference.linear(x, odd))
    cpu.demoted["linear"] = "self-check: wrong"
    assert why("w4a16") == "self-check: wrong"
    assert cpu.pack_linear(random_weight(8, 32, 4, 16), torch.float32).kind == "w4a16"
    assert type(cpu).linear is not Backend.linear


def test_without_a_library_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "csrc was not built (_qwenrt_cpu.so is missing): install a C++ compiler"
    monkeypatch.setattr(backend, "_load", lambda: kernels.KernelsUnavailable(reason))
    cpu = CPUBackend(CPU)
    assert cpu.kernels is None and cpu.describe() == "plain torch: csrc was not built"
    assert cpu.why_not("linear", OpSpec("linear", "o", torch.float32, kind="w4a16")) == reason
    weight, x = random_weight(8, 32, 4, 16), torch.randn(2, 32)
    w = cpu.pack_linear(weight, torch.float32)
    assert torch.equal(cpu.linear(x, w), reference.linear(x, w))
    with pytest.raises(BackendError, match="'scalar': csrc was not built"):
        cpu.configure("scalar")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "kernels were not built .*missing.*install a C\\+\\+ compiler and reinstall"),
        (b"", "is not a library"),
        (b"<html>404</html>" * 10, "is not a library"),
        (b"\x7fELF" + bytes(36) + (1 << 40).to_bytes(8, "little") + bytes(16), "is cut short"),
        (b"\x7fELF" + bytes(200), "does not load"),
    ],
)
def test_a_damaged_library_is_refused_with_the_reason(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "_qwenrt_cpu.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kernels.KernelsUnavailable, match=message) as error:
        kernels.Kernels(path)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_a_library_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_qwenrt_cpu.so"
    path.write_bytes(b"")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(kernels.KernelsUnavailable, match=r"does not load .*Permission denied"):
        kernels.Kernels(path)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="ELF only")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_library_cut_anywhere_is_refused(tmp_path: Path, share: float) -> None:
    whole = kernels.LIBRARY.read_bytes()
    path = tmp_path / "_qwenrt_cpu.so"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(kernels.KernelsUnavailable, match="cut short"):
        kernels.Kernels(path)


@needs_kernels
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(kernels.KernelsUnavailable, match=r"has interface \d+, expected \d+: install a C"):
        kernels.Kernels()
    monkeypatch.undo()
    foreign = ctypes.util.find_library("m")
    found = next(iter(Path("/lib").glob(f"*/{foreign}")), None) if foreign else None
    if found is not None:
        path = tmp_path / "_qwenrt_cpu.so"
        shutil.copy(found, path)
        with pytest.raises(kernels.KernelsUnavailable, match="does not load"):
            kernels.Kernels(path)


@needs_kernels
@pytest.mark.parametrize("struct", kernels.STRUCTS)
def test_a_library_whose_structs_are_laid_out_otherwise_is_refused(
    struct: type[ctypes.Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = struct.__doc__.split(" ")[0]

    class Longer(ctypes.Structure):
        _fields_ = (*struct._fields_, ("more", ctypes.c_int64))

    Longer.__doc__ = struct.__doc__
    monkeypatch.setattr(kernels, "STRUCTS", (Longer,))
    message = rf"has \d+ bytes for {name}, expected {ctypes.sizeof(Longer)} .* rebuild it: install a C"
    with pytest.raises(kernels.KernelsUnavailable, match=message):
        kernels.Kernels()
    Longer.__doc__ = "QwenrtNothing of no header."
    with pytest.raises(kernels.KernelsUnavailable, match="has no such struct for QwenrtNothing"):
        kernels.Kernels()


# ---- the machine


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n"
GIB = 1 << 30


def test_memory_is_the_tightest_cgroups(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": MEMINFO})
    assert resources.memory(root) == (4 * GIB, 8 * GIB)
    tree(
        root,
        {
            "proc/self/cgroup": "0::/box/inner\n",
            "sys/fs/cgroup/box/memory.max": str(3 * GIB),
            "sys/fs/cgroup/box/memory.current": str(2 * GIB),
            "sys/fs/cgroup/box/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
            "sys/fs/cgroup/box/inner/memory.max": "max",
        },
    )
    assert resources.memory(root) == (3 * GIB // 2, 3 * GIB)
    tree(
        root, {"sys/fs/cgroup/box/inner/memory.max": str(GIB), "sys/fs/cgroup/box/inner/memory.current": "5"}
    )
    assert resources.memory(root) == (GIB - 5, GIB)


def test_memory_of_version_1_and_of_a_container_with_its_own_mount(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    assert resources.memory(root) == (0, 2 * GIB)
    assert resources.usable_cores(root) == 1
    tree(root, {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)})
    assert resources.memory(root) == (4 * GIB, 8 * GIB)


def test_cores_obey_affinity_siblings_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert resources.usable_cores(tmp_path) == 4
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = tree(tmp_path, {siblings.format(cpu): f"{cpu % 2},{cpu % 2 + 2}" for cpu in range(4)})
    assert resources.usable_cores(root) == 2
    tree(root, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert resources.usable_cores(root) == 1
    tree(root, {"sys/fs/cgroup/cpu.max": "max 100000"})
    assert resources.usable_cores(root) == 2


def test_memory_here_is_plausible_and_float32_is_taken_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = CPUBackend(CPU)
    free, total = cpu.memory()
    assert 0 < free <= total
    monkeypatch.setattr(resources, "memory", lambda: (10 * GIB, 16 * GIB))
    assert cpu.default_dtype("bfloat16", 6 * GIB, False) == torch.float32
    assert cpu.default_dtype("float16", 16 * GIB, False) == torch.bfloat16
    assert cpu.default_dtype("float16", 60 * GIB, True) == torch.float32


# ---- the build


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qwenrt_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_failing_compiler_costs_one_line(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "deep" / "_qwenrt_cpu.so"
    latin = tmp_path / "latin"
    latin.write_text("#!/bin/sh\nprintf 'error: \\351t\\351' >&2\nexit 1\n")
    latin.chmod(0o755)
    causes = {
        "/bin/false": "exit status 1",
        "/no/such/compiler -x": "No such file",
        str(latin): "error: ",
        "/no/such/compiler '": "No such file",
    }
    for command, cause in causes.items():
        monkeypatch.setenv("CXX", command)
        assert build.build_or_say_why(target) is False
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("qwenrt: the CPU kernels were not built: ")
        assert cause in said and "Plain torch serves the CPU instead." in said
    assert not target.exists() and not list(tmp_path.rglob("*.so*"))


def test_no_compiler_at_all_is_no_error(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler() is None
    monkeypatch.setenv("CXX", " ")
    assert build.build_kernels(tmp_path / "x.so").startswith("no C++ compiler was found (set CXX")


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_broken_sources_name_the_compilers_first_error(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "broken.cpp").write_text("int x = nothing_of_that_name;\n")
    reason = build.build_kernels(tmp_path / "x.so", source=tmp_path)
    assert "failed (" in reason and "error" in reason and "\n" not in reason
    assert not (tmp_path / "x.so").exists()


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
def test_flags_that_a_compiler_does_not_know_cost_their_set_alone(
    build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build.SETS[build.machine()] = {"avx2": ["-mavx9"], "avx512": []}
    build.FLAGS = [*build.FLAGS, "-O0"]
    assert build.build_or_say_why(tmp_path / "x.so")
    *_, built, without = capsys.readouterr().out.splitlines()
    assert built.startswith("qwenrt: built the CPU kernels (x.so) in ")
    assert without.startswith("qwenrt: without those for avx2: ") and "mavx9" in without
    assert kernels.Kernels(tmp_path / "x.so").isas == ("scalar",)


def test_a_folder_that_cannot_be_written_leaves_no_part(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_run", lambda command: Path(command[-1]).write_bytes(b"made"))
    monkeypatch.setattr(build.os, "replace", fails)
    assert "No space left" in build.build_kernels(tmp_path / "x.so")
    assert not list(tmp_path.iterdir())


def test_every_source_is_compiled_and_each_folder_of_a_set_has_its_flags(build: ModuleType) -> None:
    root = ROOT / "csrc"
    sets = {name for machine in build.SETS.values() for name in machine}
    assert {path.name for path in (root / "isa").iterdir() if path.is_dir()} == {"scalar", *sets}
    compiled = [path for name in ("", *sets) for path in build.sources(root, name)]
    assert sorted(compiled) == sorted(p for p in root.rglob("*.cpp") if p.parent != root / "tests")


@needs_kernels
@pytest.mark.parametrize("words", [0, 1, 3, 13, 4096, 100_003])
def test_reading_reads_every_word(words: int) -> None:
    library = CPUBackend(torch.device("cpu")).kernels
    assert library is not None
    memory = torch.randint(0, 2**40, (words,))
    assert library.read(memory) == int(memory.sum())
