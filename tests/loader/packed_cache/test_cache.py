"""Packed weights on disk: the same bits as a load without, and whatever happens to the file, right answers."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwenrt.backends.base import Backend
from qwenrt.backends.cpu import CPUBackend
from qwenrt.config import Environment, read_model_config
from qwenrt.config.environment import packed_cache_in
from qwenrt.loader.packed_cache import file as packed_file
from qwenrt.loader.packed_cache.file import Damaged
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import StepPlan

GOLDEN = Path(__file__).parents[2] / "golden"
CPU = torch.device("cpu")
IDS = torch.arange(3, 40)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(
    source: Path,
    cache: Path | None,
    quantize: str | None = None,
    backend: Backend | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, bool]:
    """(logits, whether the weights were mapped from the cache)."""
    config = read_model_config(source)
    backend = backend or CPUBackend(CPU)
    model = Qwen(config, backend, dtype)
    report = load_weights(
        model, source, config, backend, dtype, quantize=quantize, progress=False, packed_cache=cache
    )
    model.bind()
    plan = StepPlan([len(IDS)], [len(IDS)])
    return model.logits(model.forward(IDS, plan, [1])), report.mapped


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copied("gptq_int4", tmp_path / "model")


def copied(name: str, target: Path) -> Path:
    target.mkdir()
    for file in ("config.json", "quantize_config.json", "model.safetensors"):
        if (GOLDEN / name / file).exists():
            (target / file).write_bytes((GOLDEN / name / file).read_bytes())
    return target


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


# ---- what is mapped is what was packed


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("plain", None),
        ("plain", "int4"),
        ("plain", "int8"),
        ("gptq_int4", None),
        ("gptq_int4_act_order", None),
        ("gptq_int8", None),
    ],
)
@pytest.mark.parametrize("backend", [Backend, CPUBackend])
def test_logits_are_the_same_bits(
    name: str, quantize: str | None, backend: type[Backend], tmp_path: Path
) -> None:
    results = [
        load(GOLDEN / name, cache, quantize, backend(CPU)) for cache in (None, tmp_path, tmp_path, tmp_path)
    ]
    assert [mapped for _, mapped in results] == [False, False, True, True]
    assert all(torch.equal(logits, results[0][0]) for logits, _ in results)


def test_a_bfloat16_model_comes_back_in_bfloat16(tmp_path: Path) -> None:
    first, again = (load(GOLDEN / "plain", tmp_path, None, Backend(CPU), torch.bfloat16) for _ in range(2))
    assert again[1] and torch.equal(first[0], again[0])


def test_the_checkpoints_own_memory_is_named_and_not_copied(tmp_path: Path) -> None:
    load(GOLDEN / "plain", tmp_path)
    kept = load_file(only_file(tmp_path))
    whole = sum(t.nbytes for t in load_file(GOLDEN / "plain" / "model.safetensors").values())
    assert "embed_tokens" not in kept and "lm_head.weight" not in kept
    assert "layers.0.gate_up_proj.weight" in kept  # merged at load, so in no file yet
    assert sum(t.nbytes for t in kept.values()) < whole / 2


def test_every_way_of_packing_has_a_file_of_its_own(tmp_path: Path) -> None:
    plain, scalar = CPUBackend(CPU), CPUBackend(CPU)
    scalar.configure("off")
    load(GOLDEN / "plain", tmp_path, None, plain)
    for backend, quantize in ((plain, "int4"), (plain, "int8"), (scalar, "int4"), (Backend(CPU), "int4")):
        assert not load(GOLDEN / "plain", tmp_path, quantize, backend)[1]
    demoted = CPUBackend(CPU)
    demoted.demoted["linear"] = "self-check"
    assert not load(GOLDEN / "plain", tmp_path, "int4", demoted)[1]
    assert len(list(tmp_path.iterdir())) == (6 if plain.kernels is not None else 4)


# ---- stale


def test_a_changed_shard_or_config_is_packed_again(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before, _ = load(source, cache)
    shard = source / "model.safetensors"
    os.utime(shard, ns=(1, 1))
    assert not load(source, cache)[1] and load(source, cache)[1]

    data = bytearray(shard.read_bytes())
    data[-3] ^= 1  # in the last tensor; size and time as they were
    shard.write_bytes(data)
    os.utime(shard, ns=(1, 1))
    assert not load(source, cache)[1] and load(source, cache)[1]

    config = json.loads((source / "config.json").read_text())
    config["layer_norm_epsilon"] = 0.05
    (source / "config.json").write_text(json.dumps(config))
    after, mapped = load(source, cache)
    assert not mapped and not torch.equal(before, after) and load(source, cache)[1]
    assert len(list(cache.iterdir())) == 1, "stale files do not pile up"


# ---- damaged: one warning, right answers, and a sound file afterwards


def damaged_answers(
    source: Path, cache: Path, wanted: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "qwenrt"):
        logits, mapped = load(source, cache)
    assert not mapped and torch.equal(logits, wanted)
    assert len(caplog.records) == 1 and "are ignored" in caplog.text, caplog.text


def test_a_file_cut_anywhere_is_not_used(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, _ = load(source, tmp_path / "cache")
    path = only_file(tmp_path / "cache")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for cut in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        damaged_answers(source, path.parent, wanted, caplog)
        assert path.stat().st_size == len(whole) and load(source, path.parent)[1]
    path.write_bytes(whole + b"\0")
    damaged_answers(source, path.parent, wanted, caplog)


def test_something_else_in_its_place(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted, _ = load(source, tmp_path / "cache")
    path = only_file(tmp_path / "cache")
    for content in (b"{" * 300, b"\xff" * 4096, b"PK\x03\x04" + bytes(200), bytes(5000)):
        path.write_bytes(content)
        damaged_answers(source, path.parent, wanted, caplog)
    path.write_bytes((source / "model.safetensors").read_bytes())  # sound, but no packed weights
    damaged_answers(source, path.parent, wanted, caplog)
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.WARNING, "qwenrt"):
        caplog.clear()
        assert torch.equal(load(source, path.parent)[0], wanted)
    assert "are ignored" in caplog.text and "not kept" in caplog.text
    path.rmdir()
    os.mkfifo(path)  # opening one would wait for a writer
    damaged_answers(source, path.parent, wanted, caplog)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("sound") / "file.safetensors"
    tensors = {"a": torch.arange(5000, dtype=torch.int32), "b": torch.ones(3, 7).half(), "c": torch.empty(0)}
    packed_file.write(path, tensors, {"format": 1, "weights": {"x": [1, {"y": "z"}]}})
    return path, path.read_bytes()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_changed_byte_goes_unnoticed(sound: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = sound
    header = 8 + int.from_bytes(whole[:8], "little")
    padding = {  # nothing reads these
        i
        for name, entry in json.loads(whole[8:header]).items()
        if name.startswith("pad.")
        for i in range(header + entry["data_offsets"][0], header + entry["data_offsets"][1])
    }
    last = st.integers(0, len(whole) - 1)
    at = data.draw(st.one_of(st.integers(0, header - 1), last).filter(lambda i: i not in padding))
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255))
    damaged = path.with_name("damaged")
    damaged.write_bytes(changed)
    with pytest.raises(Damaged):
        packed_file.open_file(damaged, {"format": 1})


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.integers(0, 500))
def test_no_bytes_at_all_do_harm(sound: tuple[Path, bytes], head: bytes, length: int) -> None:
    path = sound[0].with_name("any")
    path.write_bytes(length.to_bytes(8, "little") + head)
    with pytest.raises(Damaged):
        packed_file.open_file(path, {"format": 1})


def test_a_file_of_another_format_is_not_used(sound: tuple[Path, bytes]) -> None:
    found = packed_file.open_file(sound[0], {"format": 1})
    assert found is not None and found.description["weights"] == {"x": [1, {"y": "z"}]}
    assert torch.equal(found.tensors["a"], torch.arange(5000, dtype=torch.int32))
    assert all(t.data_ptr() % packed_file.ALIGNMENT == 0 for t in found.tensors.values() if t.numel())
    with pytest.raises(Damaged, match="another format"):
        packed_file.open_file(sound[0], {"format": 2})


FORGED = {
    "group_size": 64,
    "bits": 8,
    "kind": "w8a16-rows8",
    "shape": [1, 1],
    "bias": {"kept": "layers.0.o_proj.scales", "dtype": "float16", "shape": [32, 2, 8]},
}


@pytest.mark.parametrize("field", [*FORGED, "words", "nothing"])
def test_a_sound_file_that_lies_about_shapes_does_not_reach_the_kernels(
    field: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Written with correct digests, as by another version's mistake."""
    wanted, _ = load(source, tmp_path / "cache")
    path = only_file(tmp_path / "cache")
    found = packed_file.open_file(path, {})
    assert found is not None
    weights = found.description["weights"]
    if field in FORGED:
        weights["layers.1.o_proj"]["packed"][field] = FORGED[field]
    elif field == "words":
        weights["layers.1.o_proj"]["packed"]["data"] |= {
            "words": weights["layers.1.o_proj"]["packed"]["data"].get("scales", {}),
            "weight": {"kept": "norm", "dtype": "float32", "shape": [256]},
        }
    else:
        del weights["layers.1.o_proj"]
    packed_file.write(path, dict(found.tensors), found.description)
    damaged_answers(source, path.parent, wanted, caplog)


# ---- writing: nobody sees half a file


def test_a_read_only_or_impossible_directory_only_warns(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = load(source, None)
    (tmp_path / "file").write_text("")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for cache in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "closed"):
        with caplog.at_level(logging.WARNING, "qwenrt"), monkeypatch.context() as patch:
            if cache.name == "closed":  # root may write anywhere, so the refusal is injected
                patch.setattr(Path, "mkdir", refused)
            caplog.clear()
            assert torch.equal(load(source, cache)[0], wanted)
        assert "not kept" in caplog.text


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk_leaves_the_old_file_and_no_part(
    after: int,
    source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    load(source, cache)
    old = only_file(cache).read_bytes()
    os.utime(source / "model.safetensors", ns=(1, 1))
    written = []
    write = os.write

    def full(fd: int, data: memoryview) -> int:
        if len(written) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(data))
        return write(fd, data[: max(1, len(data) // 2)])

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "qwenrt"):
        patch.setattr(packed_file.os, "write", full)
        assert not load(source, cache)[1]
    assert "No space left" in caplog.text
    assert only_file(cache).read_bytes() == old


def test_a_file_that_would_not_fit_is_not_begun(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = packed_file.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packed_file.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with caplog.at_level(logging.WARNING, "qwenrt"):
        load(source, tmp_path / "cache")
    assert "are free" in caplog.text and not list((tmp_path / "cache").iterdir())


WRITER = """
import sys, torch
from pathlib import Path
from qwenrt.loader.packed_cache import file as packed_file
torch.set_num_threads(1)
path, number, times, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "slow"
if pause:
    import time, os
    write = os.write
    def slow(fd, data):
        count = write(fd, data[:4096]); print("writing", flush=True); time.sleep(0.02); return count
    packed_file.os.write = slow
for _ in range(times):
    packed_file.write(path, {"a": torch.full((200_000,), number)}, {"number": number})
"""


def writer(path: Path, number: int, times: int, speed: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(number), str(times), speed]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    writers = [writer(path, number, 5) for number in (1, 2)]
    seen = set()
    while any(each.poll() is None for each in writers):
        found = packed_file.open_file(path, {})
        if found is not None:
            seen.add(int(found.description["number"]))
            assert bool((found.tensors["a"] == found.description["number"]).all())
        time.sleep(0.002)
    assert [each.wait() for each in writers] == [0, 0]
    assert seen and seen <= {1, 2} and only_file(tmp_path) == path


def test_a_writer_that_is_killed_leaves_the_old_file_and_the_next_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    packed_file.write(path, {"a": torch.zeros(3)}, {"number": 0})
    slow = writer(path, 1, 1, "slow")
    assert slow.stdout is not None and slow.stdout.readline() and slow.stdout.readline()
    packed_file.write(path, {"a": torch.zeros(3)}, {"number": 2})
    assert len(list(tmp_path.iterdir())) == 2, "a part that is being written is left alone"
    slow.send_signal(signal.SIGKILL)
    slow.communicate()
    found = packed_file.open_file(path, {})
    assert found is not None and found.description["number"] == 2 and len(list(tmp_path.iterdir())) == 2
    packed_file.write(path, {"a": torch.zeros(3)}, {"number": 3})
    assert only_file(tmp_path) == path


def test_where_it_is_switched_on(tmp_path: Path) -> None:
    assert packed_cache_in(None, tmp_path) is None and packed_cache_in(False, tmp_path) is None
    assert packed_cache_in("0", tmp_path) is None and packed_cache_in("", tmp_path) is None
    assert packed_cache_in(True, tmp_path) == packed_cache_in("1", tmp_path) == tmp_path / "packed"
    assert packed_cache_in("/somewhere", tmp_path) == packed_cache_in(Path("/somewhere"), tmp_path)
    environment = Environment.read({"QWENRT_PACKED_CACHE": "1", "QWENRT_HOME": str(tmp_path)})
    assert environment.packed_cache == tmp_path / "packed"
    assert Environment.read({}).packed_cache is None
