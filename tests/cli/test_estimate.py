"""qwenrt estimate: names, figures, the table, exit codes, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenrt.config import read_model_config
from qwenrt.config.layers import num_parameters, num_snapshots, state_bytes
from qwenrt.config.released import released_config
from qwenrt.loader.memory import device as device_memory
from qwenrt.loader.memory.fit import device_layout
from qwenrt.loader.memory.footprint import GIB, Storage, memory_need, weight_bytes
from tests.conftest import write_tiny_checkpoint

Qwenrt = Callable[..., Any]


@pytest.fixture(autouse=True)
def _nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENRT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QWENRT_BACKEND", raising=False)


def as_json(qwenrt: Qwenrt, *argv: str) -> dict[str, Any]:
    done = qwenrt("estimate", *argv, "--json")
    report: dict[str, Any] = json.loads(done.out)
    assert done.code == (1 if report["fits"] is False else 0)
    return report


def test_a_released_shape(qwenrt: Qwenrt) -> None:
    done = qwenrt("estimate", "Qwen2.5-7B", "--device", "cuda", "--memory", "24", "--ctx", "32768")
    assert done.code == 0
    assert done.out.startswith("Qwen2.5-7B: model type qwen2, from the built-in table of released shapes\n")
    for line in (
        "parameters         7.62 B",
        "weights         14.19 GiB   16-bit",
        "KV cache         1.75 GiB   1 user with 32768 tokens of 56.0 KiB in bfloat16",
        "free on cuda: it fits",
        "32768 (all)",
        "<- as asked",
        "these figures assume: computed in bfloat16",
    ):
        assert line in done.out
    assert max(map(len, done.out.splitlines())) <= 110


def test_the_states_of_all_that_may_run_are_counted_as_loading_counts_them(qwenrt: Qwenrt) -> None:
    config = released_config("Qwen3.5-0.8B")
    assert config is not None
    for more, sequences in ((), 16), (("--max-num-seqs", "2"), 2), (("--users", "20"), 20):
        report = as_json(qwenrt, "Qwen3.5-0.8B", "--device", "cpu", "--memory", "24", *more)
        states = (sequences + num_snapshots(sequences, 0)) * state_bytes(config, 4)
        assert report["state_bytes"] == states and report["max_num_seqs"] == sequences
        tokens = report["users"] * report["context"] * report["kv_bytes_per_token"]
        assert report["cache_bytes"] == tokens + states
        layout = device_layout(config, "cpu", "auto", 24 * GIB).storage
        need = memory_need(config, layout, report["context"], users=report["users"], sequences=sequences)
        assert report["total_bytes"] == need.total + report["runtime_bytes"]
        asked = next(o for o in report["options"] if (o["quantize"], o["kv_cache_dtype"]) == (None, "auto"))
        assert asked["need"]["cache"] == report["cache_bytes"]
    said = qwenrt("estimate", "Qwen3.5-0.8B", "--memory", "24").out
    assert "of linear attention, for max_num_seqs=16 and prefixes" in said
    assert "linear attention" not in qwenrt("estimate", "Qwen3-8B", "--memory", "64").out


def test_a_path_is_said_once(qwenrt: Qwenrt, tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "m")
    done = qwenrt("estimate", str(directory))
    assert done.out.splitlines()[0] == f"{directory}: model type {read_model_config(directory).model_type}"


def test_files_that_are_here_decide_whether_the_head_is_the_embedding(qwenrt: Qwenrt, tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    with_files = as_json(qwenrt, str(directory))
    (directory / "model.safetensors").unlink()
    alone = as_json(qwenrt, str(directory))
    assert with_files["parameters"] - alone["parameters"] == 512 * 64
    assert with_files["weight_bytes"] > alone["weight_bytes"]


def test_what_does_not_fit_exits_with_1(qwenrt: Qwenrt) -> None:
    done = qwenrt("estimate", "Qwen3-30B-A3B", "--device", "cuda", "--memory", "24")
    assert done.code == 1
    assert "GiB are missing" in done.out and "3.35 B of them active for a token" in done.out
    rows = [line.split() for line in done.out.splitlines() if line.startswith(("none", "int8", "int4"))]
    assert [row[:2] for row in rows] == [
        [q, kv] for q in ("none", "int8", "int4") for kv in ("bfloat16", "int8")
    ]
    assert rows[0][4:6] == ["none", "none"] and int(rows[4][4]) > 8192


def test_an_offer_of_the_table_does_fit(qwenrt: Qwenrt) -> None:
    asked = ("Qwen-7B", "--device", "cpu", "--memory", "8", "--users", "2")
    report = as_json(qwenrt, *asked)
    assert report["fits"] is False
    offer = next(o for o in report["options"] if o["quantize"] == "int4" and o["kv_cache_dtype"] == "int8")
    changed = ("--quantize", "int4", "--kv-cache-dtype", "int8", "--ctx")
    assert as_json(qwenrt, *asked, *changed, str(offer["longest"]))["fits"]
    assert not as_json(qwenrt, *asked, *changed, str(offer["longest"] + 16))["fits"]


def test_json_adds_up(qwenrt: Qwenrt) -> None:
    report = as_json(
        qwenrt, "Qwen3-8B", "--device", "cuda", "--memory", "24", "--users", "4", "--ctx", "4096"
    )
    parts = ("weight_bytes", "cache_bytes", "workspace_bytes", "runtime_bytes")
    assert sum(report[part] for part in parts) == report["total_bytes"]
    assert report["cache_bytes"] == 4 * 4096 * report["kv_bytes_per_token"] == 4 * 4096 * 36 * 2 * 8 * 128 * 2
    assert report["memory_free_bytes"] == 24 * GIB and report["memory_total_bytes"] is None


def test_a_directory_and_a_file(qwenrt: Qwenrt, tiny_dir: Path, tmp_path: Path) -> None:
    config = read_model_config(tiny_dir)
    for name in (tiny_dir, tiny_dir / "config.json"):
        report = as_json(qwenrt, str(name), "--device", "cpu", "--memory", "1")
        assert report["source"] == str(name) and report["parameters"] == num_parameters(config)
        assert report["context"] == 512
        assert report["weight_bytes"] == weight_bytes(config, Storage(4, 2))
    alone = tmp_path / "copy of it.json"
    alone.write_text((tiny_dir / "config.json").read_text())
    assert as_json(qwenrt, str(alone), "--device", "cpu", "--memory", "1")["source"] == str(alone)


def test_a_quantised_file_beside_its_sidecar(qwenrt: Qwenrt, golden_dir: Path) -> None:
    done = qwenrt(
        "estimate", str(golden_dir / "gptq_int4" / "config.json"), "--device", "cpu", "--memory", "1"
    )
    assert done.code == 0 and "gptq int4 in groups of" in done.out
    assert qwenrt("estimate", str(golden_dir / "gptq_int4"), "--quantize", "int8").code == 1


def test_a_model_in_the_cache_comes_before_the_table(qwenrt: Qwenrt, tiny_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "home/huggingface/models--Qwen--Qwen-7B"
    snapshot = place / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs/main").write_text("a" * 40)
    (snapshot / "config.json").write_text((tiny_dir / "config.json").read_text())
    for name in ("Qwen-7B", "Qwen/Qwen-7B"):
        report = as_json(qwenrt, name, "--memory", "1")
        assert report["source"] == str(snapshot)
    assert "built-in table" in as_json(qwenrt, "Qwen-14B", "--memory", "1")["source"]


def test_memory_that_nobody_tells(qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "device_memory", lambda device: None)
    done = qwenrt("estimate", "Qwen3-0.6B", "--device", "npu")
    assert done.code == 0
    assert "not known" in done.out and "--memory GIB" in done.out and "<- as asked for" not in done.out
    assert as_json(qwenrt, "Qwen3-0.6B", "--device", "npu")["fits"] is None


def test_auto_takes_the_device_there_is(qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, tuple[int, int] | None] = {"cpu": (8 * GIB, 16 * GIB), "cuda": None}
    monkeypatch.setattr(device_memory, "device_memory", lambda device: sizes[device])
    assert as_json(qwenrt, "Qwen3-0.6B")["device"] == "cpu"
    sizes["cuda"] = (80 * GIB, 80 * GIB)
    report = as_json(qwenrt, "Qwen3-0.6B")
    assert (report["device"], report["memory_free_bytes"]) == ("cuda", 80 * GIB)
    monkeypatch.setenv("QWENRT_BACKEND", "cpu")
    assert as_json(qwenrt, "Qwen3-0.6B")["device"] == "cpu"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["Qwen3-9B"], "no released shape. Did you mean Qwen3.5-9B or Qwen3-8B"),
        (["zzz"], "Known shapes are: Qwen-1_8B"),
        (["./no/such/place"], "there is no such directory"),
        (["x" * 5000], "qwenrt: error:"),
        (["bad\0name"], "qwenrt: error:"),
        (["Qwen3-8B", "--ctx", "0"], "--ctx: got 0"),
        (["Qwen3-8B", "--users", "-3"], "--users: got -3"),
        (["Qwen3-8B", "--memory", "nan"], "--memory: got nan"),
        (["Qwen3-8B", "--memory", "0"], "--memory: got 0"),
        (["Qwen3-8B", "--device", "tpu"], "no such device"),
        (["Qwen3-8B", "--device", "cuda:x"], "no such device"),
        (["Qwen3-8B-GPTQ-Int4", "--quantize", "int8"], "already quantised to 4 bits"),
    ],
)
def test_bad_input_is_one_typed_message(argv: list[str], words: str, qwenrt: Qwenrt) -> None:
    done = qwenrt("estimate", *argv)
    assert (done.code, done.out) == (1, "")
    assert words in done.err and done.err.count("qwenrt: error:") == 1


@pytest.mark.parametrize(
    "changed",
    [{"hidden_size": 10**15}, {"num_hidden_layers": 10**9}, {"vocab_size": -1}, {"model_type": "gpt"}],
)
def test_hostile_configs(changed: dict[str, Any], qwenrt: Qwenrt, tiny_dir: Path, tmp_path: Path) -> None:
    values = json.loads((tiny_dir / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(values))
    done = qwenrt("estimate", str(tmp_path / "config.json"))
    assert done.code == 1 and next(iter(changed)) in done.err


def test_it_works_without_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from qwenrt.cli import main\n"
        "assert main(['estimate', 'Qwen3-8B', '--device', 'cpu']) in (0, 1)\n"
        "assert main(['estimate', 'Qwen-7B-Chat-Int4', '--memory', '24', '--device', 'cuda', '--json']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Qwen3-8B: model type qwen3" in done.stdout and " on cpu: " in done.stdout
