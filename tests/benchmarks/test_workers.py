"""Engines and worker processes of the benchmarks, with a network of two small layers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.qwenrt_engine import QwenrtEngine
from benchmarks.rows import Work, llama, torch_eager
from benchmarks.shapes import TINY, config_of
from benchmarks.start import checkpoint
from benchmarks.torch_engine import TorchEngine
from benchmarks.workers import Options, Worker, Workers, check_llama


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


def test_a_missing_peer_is_named_with_the_command_that_installs_it(
    tmp_path: Path, broken_python: str
) -> None:
    with pytest.raises(
        SystemExit, match=r"No module named llama_cpp\. Install it with: .*llama-cpp-python gguf"
    ):
        check_llama(Options(threads=1, cache=tmp_path, llama_python=broken_python))


def test_the_checkpoint_for_starts_is_one_that_loads(tmp_path: Path) -> None:
    import qwenrt

    directory = checkpoint(TINY, tmp_path)
    assert checkpoint(TINY, tmp_path) == directory
    with qwenrt.load(directory, max_model_len=64) as llm:
        config = config_of(TINY)
        assert (llm.config.hidden_size, llm.config.num_layers) == (config.hidden_size, config.num_layers)
        assert len(llm.generate(prompt_token_ids=[1, 2, 3], max_tokens=1, ignore_eos=True).token_ids) == 1
