"""Engines and worker processes of the benchmarks, with a network of two small layers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.checkpoints import qwen1_checkpoint, qwen2_checkpoint
from benchmarks.qwenrt_engine import QwenrtEngine
from benchmarks.rows import Row, Work, llama, torch_eager
from benchmarks.shapes import TINY, config_of
from benchmarks.torch_engine import TorchEngine
from benchmarks.workers import Options, Worker, Workers, check_peers


@pytest.fixture
def broken_python(tmp_path: Path) -> str:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'No module named llama_cpp' >&2\nexit 3\n")
    script.chmod(0o755)
    return str(script)


def test_the_torch_network_decodes_what_it_prefills() -> None:
    torch.manual_seed(0)
    engine = TorchEngine(TINY, {}, threads=1)
    ids = torch.tensor([5, 900, 3, 77, 41, 8])
    whole = engine._forward(ids, 0)
    engine.cache.zero_()
    for position, token in enumerate(ids):
        step = engine._forward(token[None], position)
    assert step == whole
    assert engine.decode(4, 2, 1).seconds > 0


def test_qwenrt_is_measured_at_the_tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENRT_NUM_THREADS", "1")  # the engine sets it, and the test's end restores it
    settings = {"quantize": "int4", "a_setting_of_the_future": 1, "max_model_len": 256, "progress": False}
    engine = QwenrtEngine(TINY, settings, threads=1)
    assert engine.about["left_out"] == ["a_setting_of_the_future"]
    assert engine.about["kv_bytes_per_token"] == 2 * 2 * 256 * 4  # keys and values, layers, width, float32
    assert engine.prefill(20).seconds > 0
    assert engine.decode(17, 3, 2).seconds > 0
    engine.llm.close()


def test_a_worker_answers_until_it_is_not_needed(tmp_path: Path) -> None:
    options = Options(threads=1, cache=tmp_path, llama_python=sys.executable)
    with Workers(options) as workers:
        (worker,) = workers.of([torch_eager(TINY)])
        assert worker.about["version"] == torch.__version__
        answer = worker.ask(Work("decode", 17, 2))
        assert answer["seconds"] > 0 and 0 <= answer["foreign"] <= 1
        assert workers.of([torch_eager(TINY)]) == [worker]
        workers.of([])
        assert worker._process.returncode == 0


def test_a_worker_that_dies_is_quoted(tmp_path: Path, broken_python: str) -> None:
    options = Options(threads=1, cache=tmp_path, llama_python=broken_python)
    with pytest.raises(SystemExit, match=r"ended with status 3:\nNo module named llama_cpp"):
        Worker(llama(TINY, "Q4_0"), options)


def test_a_row_that_fails_is_named_and_the_next_one_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.bandwidth.Bandwidth", lambda threads, nbytes: None)
    monkeypatch.setattr("benchmarks.__main__.check_peers", lambda names, options: None)

    def row(run: object, row: Row, workers: Workers) -> dict[str, Any]:
        if row.key == "decode-int8":
            raise SystemExit("no memory")
        return {"measured": row.key}

    monkeypatch.setattr("benchmarks.measure.Run.row", row)
    asked = ["--rows", "decode-int8,prefill-int8", "--curves", "none", "--tiny", "--out"]
    with pytest.raises(SystemExit, match=r"failed: decode-int8\. The others are in "):
        main([*asked, str(tmp_path / "results.json")])
    assert "decode-int8: FAILED: no memory" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == {
        "prefill-int8": {"measured": "prefill-int8"}
    }


def test_a_missing_peer_is_named_with_the_command_that_installs_it(
    tmp_path: Path, broken_python: str
) -> None:
    with pytest.raises(
        SystemExit, match=r"No module named llama_cpp\. Install it with: .*llama-cpp-python gguf"
    ):
        check_peers(["qwenrt", "llama.cpp"], Options(threads=1, cache=tmp_path, llama_python=broken_python))


@pytest.mark.parametrize("write", [qwen1_checkpoint, qwen2_checkpoint])
def test_the_written_checkpoints_are_some_that_load(
    tmp_path: Path, write: Callable[[str, Path], Path]
) -> None:
    import qwenrt

    directory = write(TINY, tmp_path / "model")
    (directory / "tokenizer.json").unlink(missing_ok=True)  # of other tools' kind
    with qwenrt.load(directory, max_model_len=64, progress=False) as llm:
        config = config_of(TINY)
        assert (llm.config.hidden_size, llm.config.num_layers) == (config.hidden_size, config.num_layers)
        assert (llm.config.intermediate_size, llm.config.num_kv_heads) == (config.intermediate_size, 2)
        assert len(llm.generate(prompt_token_ids=[1, 2, 3], max_tokens=1, ignore_eos=True).token_ids) == 1
