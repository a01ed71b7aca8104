"""qwenrt tune with a clock that is made up: what is timed, what is written, and what a load makes of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.backends.cuda import backend as cuda
from qwenrt.backends.cuda import streaming, tuned
from qwenrt.backends.cuda.tables import TILES, Warps
from qwenrt.backends.cuda.tuned import Tuned
from qwenrt.conformance.gpu import tuning
from qwenrt.errors import BackendError
from tests.fake_cuda import FakeCuda, OnCPU, install

Qwenrt = Callable[..., Any]
H200 = "NVIDIA H200"


def clock(shape: tuple[int, int, int], warps: Warps, pdl: bool) -> float | None:
    """Eight rows of warps are best for many outputs and cannot be had for few; early launches save a tenth."""
    if warps == Warps(8, 1) and shape[1] < 4096:
        return None
    best = Warps(8, 1) if shape[1] >= 4096 else TILES.warps(*shape)
    return shape[1] * shape[2] * 1e-12 * (1 if warps == best else 1.5) * (0.9 if pdl else 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a card with Gluon, and the clock above."""
    install(monkeypatch, FakeCuda())
    monkeypatch.setattr("qwenrt.backends.cuda.overrides.missing_triton", lambda: None)
    monkeypatch.setattr(streaming, "missing", lambda: None)
    monkeypatch.setattr("qwenrt.backends.registry.create", lambda *_: OnCPU(torch.device("cpu")))
    monkeypatch.setattr(tuned, "version_of_triton", lambda: "3.6.0")
    monkeypatch.setattr(tuning, "DeviceClock", lambda device: clock)


def test_what_is_better_is_kept_and_used(
    gpu: None, qwenrt: Qwenrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENRT_HOME", str(tmp_path))
    assert OnCPU(torch.device("cpu")).tiles.own == {}
    done = qwenrt("tune", "Qwen-1_8B", "--quantize", "int4", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    path = Path(report["file"])
    assert path == tmp_path / "tuned" / "NVIDIA-H200-Triton-3.6.0.json" and report["pdl"]
    shapes = [tuple(row["shape"]) for row in report["linears"]]
    assert shapes == [
        *((4, 6144, 2048), (4, 2048, 2048), (4, 11008, 2048), (4, 2048, 5504)),
        (16, 151936, 2048),
    ]
    own = {(4, 6144, 2048): Warps(8, 1), (4, 11008, 2048): Warps(8, 1), (16, 151936, 2048): Warps(8, 1)}
    tiles = OnCPU(torch.device("cpu")).tiles
    assert tiles.own == own and tiles.pdl and tiles.warps(4, 2048, 2048) == TILES.narrow
    assert qwenrt("tune", "Qwen-7B").code == 0, "another model's shapes are added"
    assert own.items() < tuned.read(path).linears.items()
    with_file = qwenrt("tune", "Qwen-7B", "--out", str(tmp_path / "mine.json")).out
    assert "of 5 shapes are faster with a table; kept in" in with_file and "mine.json" in with_file


def test_shapes_of_before_are_seen_anew(
    gpu: None, qwenrt: Qwenrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENRT_HOME", str(tmp_path))
    path = tuned.path_in(tmp_path, H200, "3.6.0")
    tuned.write(path, Tuned(H200, "3.6.0", {(16, 2048, 2048): Warps(8, 2), (8, 64, 64): Warps(2, 1)}))
    assert qwenrt("tune", "Qwen-1_8B").code == 0
    found = tuned.read(path).linears
    assert (16, 2048, 2048) not in found and found[8, 64, 64] == Warps(2, 1)
    path.write_text("{")
    assert qwenrt("tune", "Qwen-1_8B").code == 0 and tuned.read(path).linears


def test_without_such_a_device_it_says_so(qwenrt: Qwenrt) -> None:
    done = qwenrt("tune", "Qwen-7B", "--device", "cpu")
    assert done.code == 1 and "no kernel in Gluon serves there" in done.err and "sm_80" in done.err


def test_a_launch_that_begins_early_and_is_wrong_is_not_timed() -> None:
    shape = (16, 4096, 4096)
    found = tuning.tuned([shape], TILES, lambda s, w, pdl: None if pdl else 1.0, lambda _: None)
    assert not found.pdl and found.choices[0].warps == TILES.warps(*shape), "none is better"
    assert tuning.tuned([shape], TILES, lambda *_: None, lambda _: None).choices == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 2"),
        ({"kind": "else"}, "kind 'else'"),
        ({"pdl": 1}, "another type"),
        ({"linears": {}}, "another type"),
        ({"linears": [{"bits": 4}]}, "powers of two"),
        (
            {"linears": [{"bits": 4, "outputs": 8, "inputs": 8, "row_warps": 8, "input_warps": 4}]},
            "16 at most",
        ),
        (
            {"linears": [{"bits": 5, "outputs": 8, "inputs": 8, "row_warps": 1, "input_warps": 1}]},
            "4, 8 or 16",
        ),
        (
            {"linears": [{"bits": 4, "outputs": 8, "inputs": 8, "row_warps": 3, "input_warps": 1}]},
            "powers of two",
        ),
    ],
)
def test_a_table_that_is_wrong_is_named_and_passed_over(
    change: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuned.path_in(tmp_path, H200, "3.6.0")
    tuned.write(path, Tuned(H200, "3.6.0"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BackendError, match=said):
        tuned.read(path)
    with caplog.at_level(logging.WARNING):
        assert tuned.tiles(TILES, tmp_path, H200, "3.6.0") is TILES
    assert said in caplog.text


def test_a_table_of_another_device_is_not_used(tmp_path: Path) -> None:
    path = tuned.path_in(tmp_path, H200, "3.6.0")
    tuned.write(path, Tuned("NVIDIA A100", "3.6.0", {(4, 8, 8): Warps(1, 1)}))
    assert tuned.tiles(TILES, tmp_path, H200, "3.6.0") is TILES
    assert tuned.tiles(TILES, tmp_path, H200, "3.9.0") is TILES


@settings(max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["bits", "outputs", "inputs", "row_warps", "input_warps"]), inner, max_size=5
            )
        ),
        max_leaves=8,
    )
)
def test_any_table_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, linears: Any) -> None:
    path = tmp_path_factory.mktemp("t") / "table.json"
    path.write_text(
        json.dumps(
            {
                "kind": "qwenrt tune",
                "format": 1,
                "device": "x",
                "triton": "y",
                "pdl": False,
                "linears": linears,
            }
        )
    )
    try:
        found = tuned.read(path)
    except BackendError:
        return
    assert all(warps.rows * warps.inputs <= 16 for warps in found.linears.values())


def test_the_backend_asks_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCuda())
    assert cuda.CudaBackend(torch.device("cpu")).device_name() == H200
