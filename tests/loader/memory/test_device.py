"""The memory of a device as the system tells it, and settings that fit into it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qwenrt.backends.cpu import CPUBackend, resources
from qwenrt.config.layers import num_parameters
from qwenrt.config.released import released_config
from qwenrt.loader.memory import device as module
from qwenrt.loader.memory.device import device_memory
from qwenrt.loader.memory.fit import Workload, device_layout, options
from qwenrt.loader.memory.footprint import GIB, memory_need
from qwenrt.loader.memory.preflight import largest_that


def _tool(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = directory / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_the_host(tmp_path: Path) -> None:
    assert device_memory("cpu") == pytest.approx(resources.memory(), rel=0.2)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096 kB\nMemAvailable: 1024 kB\n")
    assert device_memory("cpu", tmp_path) == (2**20, 2**22)


def test_nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tool(tmp_path, monkeypatch, 'case "$1" in --id=1) echo "1000, 2000";; *) echo "10, 20";; esac')
    assert device_memory("cuda") == (10 * 2**20, 20 * 2**20)
    assert device_memory("cuda:1") == (1000 * 2**20, 2000 * 2**20)


@pytest.mark.parametrize("script", ["exit 9", "echo 1, 2; exit 1", "echo '[N/A], [N/A]'", "echo", "sleep 5"])
def test_a_driver_that_does_not_tell(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.3)
    _tool(tmp_path, monkeypatch, script)
    assert device_memory("cuda") is None


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_memory("cuda") is None and device_memory("npu") is None


def test_dcu(tmp_path: Path) -> None:
    assert device_memory("dcu", tmp_path) is None
    card = tmp_path / "sys/class/drm/card0/device"
    card.mkdir(parents=True)
    (card / "mem_info_vram_total").write_text("1000\n")
    assert device_memory("dcu", tmp_path) is None
    (card / "mem_info_vram_used").write_text("300\n")
    assert device_memory("dcu", tmp_path) == (700, 1000)
    assert device_memory("dcu:1", tmp_path) is None


@pytest.mark.parametrize(
    "name", ["Qwen3-0.6B", "Qwen-7B", "Qwen2.5-72B", "Qwen-7B-Chat-Int4", "Qwen3-8B-FP8"]
)
@pytest.mark.parametrize("free", [2 * GIB, 16 * GIB, 512 * GIB])
def test_a_cpu_is_planned_as_its_backend_decides(
    name: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = released_config(name)
    assert config is not None
    monkeypatch.setattr(resources, "memory", lambda: (free, free))
    backend = CPUBackend(torch.device("cpu"))
    coded = config.quant is not None and config.quant.has_codes
    dtype = backend.default_dtype("bfloat16", num_parameters(config) * 4, coded)
    layout = device_layout(config, "cpu", "auto", free)
    assert layout.dtype == str(dtype).removeprefix("torch.")
    if backend.kernels is not None:
        assert layout.storage.dense == backend.weight_dtype("bfloat16", dtype).itemsize


def test_another_device_computes_in_the_dtype_of_the_file() -> None:
    config = released_config("Qwen3-8B")
    assert config is not None
    assert device_layout(config, "cuda:1", "auto", None).dtype == "bfloat16"
    assert device_layout(config, "npu", "float32", None).storage.dense == 4


@pytest.mark.parametrize("free", [2, 6, 9, 14, 24, 80])
def test_the_largest_that_fits_is_the_largest(free: int) -> None:
    config = released_config("Qwen3-8B")
    assert config is not None
    layout, work = device_layout(config, "cuda", "auto", free * GIB), Workload(4096, 2)
    found = options(config, lambda _: layout, work, free * GIB, 512)
    assert [(o.quantize, o.kv_cache_dtype) for o in found] == [
        (quantize, kv) for quantize in (None, "int8", "int4") for kv in ("auto", "int8")
    ]
    for option in found:
        settings = {"quantize": option.quantize, "kv_cache_dtype": option.kv_cache_dtype}

        def fits(context: int, users: int, settings: dict[str, str | None] = settings) -> bool:
            need = memory_need(config, layout.storage, context, users=users, **settings)  # type: ignore[arg-type]
            return need.total + layout.runtime <= free * GIB

        assert option.longest == 0 or fits(option.longest, 2)
        assert option.longest == config.max_position_embeddings or not fits(option.longest + 1, 2)
        assert option.most_users == 0 or fits(4096, option.most_users)
        assert not fits(4096, option.most_users + 1)


def test_a_quantised_checkpoint_has_one_weight() -> None:
    config = released_config("Qwen2.5-7B-Instruct-AWQ")
    assert config is not None
    found = options(
        config, lambda _: device_layout(config, "cuda", "auto", None), Workload(512), 24 * GIB, 512
    )
    assert [(o.quantize, o.kv_cache_dtype) for o in found] == [(None, "auto"), (None, "int8")]


def test_search() -> None:
    for limit in range(12):
        assert largest_that(lambda n, limit=limit: n <= limit, 1, 10) == min(limit, 10)
