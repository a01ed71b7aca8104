"""Which backend a name means, plugins, binding of overrides, and the self-check that demotes a wrong one."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenrt.backends import registry, selfcheck
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec, native
from qwenrt.errors import BackendError
from qwenrt.ops import reference
from qwenrt.ops.steps import LayerKV
from qwenrt.ops.types import Packed

CPU = torch.device("cpu")


class Half(Backend):
    """An override with limits, and one that is wrong."""

    name = "half"

    @native(dtypes=(torch.float32,), note="fast")
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return reference.rms_norm(x, weight, eps)

    @native(needs=("unobtainium",))
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        raise AssertionError("never bound")


class Wrong(Backend):
    name = "wrong"

    @native()
    def linear(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        return reference.linear(x, w) * 1.01

    @native()
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    @native()
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return reference.silu_and_mul(gate_up)


def test_an_override_serves_within_its_limits_only() -> None:
    backend = Half(CPU)
    inside = backend.resolve(OpSpec("rms_norm", "norm", torch.float32))
    outside = backend.resolve(OpSpec("rms_norm", "norm", torch.bfloat16))
    assert inside.__func__ is Half.rms_norm and outside.__func__ is Backend.rms_norm
    assert [(b.native, b.why) for b in backend.bindings] == [(True, "fast"), (False, "no bfloat16 kernel")]


def test_a_seam_composes_what_serves() -> None:
    backend = Half(CPU)
    seam = backend.resolve(OpSpec("norm_gate_up_silu", "layers.0", torch.float32, kind="dense"))
    weight = torch.randn(6, 4)
    packed = Packed("dense", 6, 4, {"weight": weight})
    assert seam(torch.randn(2, 4), torch.ones(4), 1e-6, packed).shape == (2, 3)
    why = {b.op: (b.native, b.why) for b in backend.bindings}
    assert why["silu_and_mul"] == (False, "unobtainium is not available")
    assert why["rms_norm"] == (True, "fast") and why["linear"] == (False, "")


def test_the_self_check_demotes_what_is_wrong() -> None:
    backend = Wrong(CPU)
    bad = selfcheck.check(backend, torch.float32, (4, 4, 16), [(8, 64, 16, 128), (8, 64, 4, 32)])
    assert set(bad) == {"linear", "rms_norm"}
    assert "differs from its definition by" in bad["linear"] and "no kernel image" in bad["rms_norm"]
    assert backend.resolve(OpSpec("linear", "x", torch.float32)).__func__ is Backend.linear
    assert backend.resolve(OpSpec("silu_and_mul", "x", torch.float32)).__func__ is Wrong.silu_and_mul


def test_the_self_check_looks_at_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys_twice(self: Backend, k: torch.Tensor, v: torch.Tensor, kv: LayerKV, slots: torch.Tensor) -> None:
        reference.store_kv(k, k, kv, slots)

    def as_defined(self: Backend, *args: Any) -> None:
        reference.store_kv(*args)

    for override, demoted in ((keys_twice, True), (as_defined, False)):
        monkeypatch.setattr(Wrong, "store_kv", native()(override))
        bad = selfcheck.check(Wrong(CPU), torch.float32, (4, 2, 16), [])
        assert ("store_kv" in bad) is demoted


def test_the_self_check_finds_nan_whichever_shape_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_for_one_token(self: Backend, x: torch.Tensor, w: Packed) -> torch.Tensor:
        y = reference.linear(x, w)
        return y * torch.nan if len(x) == 1 and w.out_features == 9 else y

    monkeypatch.setattr(Wrong, "linear", native()(nan_for_one_token))
    for order in ([(8, 64, 16, 0), (9, 64, 16, 0)], [(9, 64, 16, 0), (8, 64, 16, 0)]):
        assert "linear" in selfcheck.check(Wrong(CPU), torch.float32, (4, 4, 16), order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_backend_passes_its_self_check(dtype: torch.dtype) -> None:
    backend = registry.create("cpu")
    shapes = [(96, 64, 16, 128), (96, 64, 4, 32), (33, 256, 4, 128), (96, 256, 8, 128)]
    assert selfcheck.check(backend, dtype, (4, 2, 64), shapes) == {}


def test_auto_finds_a_device_and_a_setting_wins() -> None:
    assert isinstance(registry.create("auto"), Backend)
    assert registry.create("auto", preferred="cpu").name == "cpu"
    assert type(registry.create("auto", preferred="auto")) is type(registry.create("auto"))
    assert {p.name for p in registry.probe_all()} >= {"cpu", "cuda", "npu", "dcu"}


def test_a_device_number_past_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.create("cpu:0").device.type == "cpu"
    with pytest.raises(BackendError, match="device='cpu:1': the last cpu device is number 0"):
        registry.create("cpu:1")
    there = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    monkeypatch.setattr(torch, "cuda", there)
    with pytest.raises(BackendError, match="device='cuda:2': the last cuda device is number 1"):
        registry.create("cuda:2")
    for index in ("300", "9" * 30, "9" * 5000):
        with pytest.raises(BackendError, match="is not a device number"):
            registry.create(f"cpu:{index}")


def entry_point(value: str) -> metadata.EntryPoint:
    return metadata.EntryPoint("mychip", value, registry.PLUGIN_GROUP)


def test_a_plugin_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = entry_point("tests.backends.test_registry:Half")
    monkeypatch.setattr(registry, "_plugins", lambda: {"mychip": point})
    backend = registry.create("mychip")
    assert type(backend).__name__ == "Half" and backend.device.type == "cpu"
    assert any(p.name == "mychip" for p in registry.probe_all())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no.such.module:Thing", "ModuleNotFoundError"),
        ("qwenrt.errors:QwenrtError", "not a subclass of"),
        ("qwenrt.errors:Nothing", "AttributeError"),
    ],
)
def test_a_broken_plugin_is_explained(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setattr(registry, "_plugins", lambda: {"mychip": entry_point(value)})
    with pytest.raises(BackendError, match=message):
        registry.create("mychip")


@pytest.mark.parametrize(
    ("stored", "bfloat16", "dtype"),
    [
        ("float16", True, torch.float16),
        ("float32", True, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float16),
        (None, False, torch.float16),
    ],
)
def test_auto_is_what_the_checkpoint_is_in_where_the_device_can(
    monkeypatch: pytest.MonkeyPatch, stored: str | None, bfloat16: bool, dtype: torch.dtype
) -> None:
    device = SimpleNamespace(is_bf16_supported=lambda: bfloat16)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    assert Backend(CPU).default_dtype(stored, 0, False) == dtype
