"""Whose device it is that torch calls "cuda", by stand-ins: NVIDIA's, AMD's, Hygon's; and what follows for each."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwenrt.backends import registry
from qwenrt.backends.cuda import CudaBackend
from qwenrt.backends.cuda.profiles import profile_of
from qwenrt.backends.dcu import software
from qwenrt.backends.dcu.backend import DcuBackend
from qwenrt.errors import BackendError
from tests.fake_cuda import FakeCuda, install

CPU = torch.device("cpu")
DAS, ROCM, CUDA = "2.9.0+das.opt1.dtk2604.torch290", "2.9.0+rocm6.4", "2.11.0+cu130"


def machine(
    patch: pytest.MonkeyPatch,
    arch: str = "",
    *,
    version: str = CUDA,
    places: tuple[str, ...] = (),
    triton: str | None = None,
    **properties: Any,
) -> FakeCuda:
    """A machine with one device. ``arch``: of a HIP device, as gcnArchName has it; ``places``: of toolkits."""
    fake = install(patch, FakeCuda(arch=arch, name="a card", **properties))
    patch.setattr(torch, "get_device_module", lambda _: fake)
    patch.setattr(torch, "__version__", version)
    patch.setattr(torch.version, "hip", "6.3.26093" if arch else None)
    patch.setattr(software, "_places", lambda: list(places))
    patch.setattr(software, "version_of", lambda package: triton if package == "triton" else None)
    patch.setattr(registry, "_torch_device", lambda kind, index: CPU)
    return fake


@pytest.mark.parametrize(
    ("arch", "version", "places", "vendor", "wave", "bfloat16", "sizes"),
    [
        ("", CUDA, (), "nvidia", 32, True, 64),
        ("gfx90a:sramecc+:xnack-", ROCM, (), "amd", 64, True, 64),
        ("gfx942", ROCM, (), "amd", 64, True, 64),
        ("gfx1100", ROCM, (), "amd", 32, False, 64),
        ("gfx906", ROCM, (), "amd", 64, False, 64),
        ("gfx906", DAS, (), "hygon", 64, False, 16),
        ("gfx906:sramecc+", ROCM, ("/opt/dtk-26.04",), "hygon", 64, False, 16),
        ("gfx906", ROCM, ("/usr/bin/hy-smi",), "hygon", 64, False, 16),
        ("gfx928:sramecc+:xnack-", DAS, (), "hygon", 64, True, 16),
        ("gfx936", ROCM, (), "hygon", 64, True, 16),  # an id that AMD never gave
        ("gfx9ff", DAS, (), "hygon", 32, False, 16),  # not known yet
        ("gfx9ff", ROCM, ("/opt/dtk",), "amd", 32, False, 64),
    ],
)
def test_whose_device_it_is(
    arch: str,
    version: str,
    places: tuple[str, ...],
    vendor: str,
    wave: int,
    bfloat16: bool,
    sizes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, arch, version=version, places=places, warp_size=32)
    profile = profile_of(CPU)
    assert (profile.vendor, profile.wave, profile.bfloat16) == (vendor, wave, bfloat16)
    assert profile.graph_sizes[-1] == sizes and profile.arch == (arch.split(":")[0] or "sm_90")
    assert not profile.pdl or vendor == "nvidia"
    assert profile.max_threads == (1024 if vendor == "nvidia" else 256)


@pytest.mark.parametrize("asked", ["auto", "cuda", "dcu"])
def test_a_dcu_is_found_by_any_name(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "gfx936", version=DAS, triton="3.5.1+das.opt1.dtk2604")
    backend = registry.create(asked)
    assert type(backend) is DcuBackend and backend.name == "dcu"
    graphs = backend.graphs()
    assert graphs is not None and graphs.sizes == (1, 2, 4, 8, 16)
    assert "(gfx936), decoding captured, DTK 26.04, Triton 3.5.1+das.opt1.dtk2604" in backend.describe()
    assert "triton" not in sys.modules


def test_other_vendors_cards_are_no_dcu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "gfx942", version=ROCM)
    assert type(registry.create("cuda")) is CudaBackend
    with pytest.raises(BackendError, match="the device is AMD's gfx942 and no DTK is here; its name is cuda"):
        registry.create("dcu")
    machine(monkeypatch)
    with pytest.raises(BackendError, match="is not a ROCm or DTK build"):
        registry.create("dcu")


def test_where_the_library_of_attention_is_missing_torch_computes_it_plainly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, "gfx928", version=DAS)

    def lacking(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("flash_attn is not installed")

    off: list[tuple[str, bool]] = []
    for kind in ("flash", "mem_efficient"):
        name = f"enable_{kind}_sdp"
        monkeypatch.setattr(torch.backends.cuda, name, lambda enabled, name=name: off.append((name, enabled)))
    DcuBackend(CPU)
    assert not off
    monkeypatch.setattr(F, "scaled_dot_product_attention", lacking)
    backend = DcuBackend(CPU)
    assert off == [("enable_flash_sdp", False), ("enable_mem_efficient_sdp", False)]
    assert "flash_attn is not installed" in caplog.text and "plain attention" in backend.describe()


@pytest.mark.parametrize(
    ("arch", "wrong", "dtype"),
    [
        ("gfx936", False, torch.bfloat16),
        ("gfx936", True, torch.float16),
        ("gfx926", False, torch.float16),
    ],
)
def test_bfloat16_is_taken_where_a_product_in_it_is_right(
    arch: str, wrong: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, arch, version=DAS)
    right = torch.Tensor.__matmul__
    product = (lambda a, b: right(a, b) + (a.dtype == torch.bfloat16)) if wrong else right
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert DcuBackend(CPU).default_dtype("bfloat16", 0, False) == dtype


@pytest.mark.parametrize(
    ("torch_version", "triton", "said"),
    [
        (DAS, None, []),
        (DAS, "3.5.1+das.opt1.dtk2604", []),
        (CUDA, None, ["torch 2.11.0+cu130 is no build for Hygon's DTK, and may have replaced one"]),
        (DAS, "3.6.0", ["Triton 3.6.0 is not the vendor's build: it knows no gfx928, gfx936 or gfx938"]),
        (DAS, "3.3.0+das.dtk2504", ["are for different DTKs"]),
    ],
)
def test_what_is_wrong_with_the_packages(torch_version: str, triton: str | None, said: list[str]) -> None:
    found = software.problems(torch_version, triton)
    assert len(found) == len(said)
    for (what, remedy), words in zip(found, said, strict=True):
        assert words in what and "vendor's image" in remedy


def test_toolkits_are_told_by_versions_and_places() -> None:
    assert software.toolkit(DAS) == "26.04"
    assert software.toolkit("2.4.0+das.opt2", seen=()) == ""
    assert software.toolkit(ROCM, seen=("/opt/rocm-6.4", "/opt/dtk-25.04.1")) == "25.04"
    assert software.toolkit(ROCM, seen=("/opt/rocm-6.4",)) is None


def test_telling_them_imports_no_torch() -> None:
    code = "import sys, qwenrt.backends.dcu.software\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "False", done.stderr
