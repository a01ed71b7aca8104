"""What training takes is said beforehand, and refused where it is not there."""

from __future__ import annotations

import json

import pytest
import torch

from qwenrt.cli import main
from qwenrt.config import read_model_config
from qwenrt.config.released import released_config
from qwenrt.errors import CapacityError
from qwenrt.finetune import finetune
from qwenrt.finetune.building import Base, build
from qwenrt.finetune.job import prepare
from qwenrt.finetune.lora import LoraSettings, num_trained
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.loader.hub.resolve import DEMO
from qwenrt.loader.memory.training import check_fits, lora_numbers, training_need
from tests.finetune.test_networks import SHAPES, corpus_of

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_key_value_heads": 4, "num_hidden_layers": 4}
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_activations_are_about_as_many_as_are_kept(tmp_path, kind, precision):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES[kind], **WIDE}))
    options = TrainingSettings(method="full", from_scratch=True, precision=precision, router="frozen")
    base = Base.open(tmp_path, read_model_config(tmp_path), options)
    corpus = corpus_of(150, [40] * 8)
    run = build(base, corpus, options)
    weights = {p.untyped_storage().data_ptr() for _, p in run.network.model.tensors()}
    kept, seen = [], {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.append(tensor)
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids, targets, lengths = corpus.take(list(range(8)))
    targets[1:] = -100  # no logits
    targets[0] = 5
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.network.loss(ids, targets, lengths)
    need = training_need(base.config, 4 if precision == "float32" else 2, tokens=320)
    assert 1.0 <= need.activations / sum(seen.values()) <= 1.4


def test_released_models_take_what_is_known():
    config = released_config("Qwen-7B")
    assert lora_numbers(config, 64) == num_trained(config, LoraSettings(rank=64)) == 143_130_624
    lora = training_need(config, 2, lora=lora_numbers(config, 64), tokens=2048, recompute=True)
    assert 15e9 < lora.weights < 16e9 and lora.trained == 16 * 143_130_624
    assert lora.total < 22 * 2**30 < training_need(config, 2, tokens=2048).total
    whole, halves = (training_need(config, 2, moments=moments, recompute=True) for moments in (4, 2))
    assert whole.weights + whole.trained == 18 * 7_721_324_544
    assert halves.weights + halves.trained == 12 * 7_721_324_544 < 95e9
    shared, layers = (
        training_need(config, 2, recompute=True, parts=8, shares_weights=every) for every in (False, True)
    )
    assert shared.trained == layers.trained == 2 * 7_721_324_544 and shared.weights == whole.weights
    assert layers.weights < 0.3 * whole.weights and layers.total < 24 * 2**30
    rounded = training_need(config, 2, lora=lora_numbers(config, 64), quantize="int4", recompute=True)
    assert rounded.weights < 0.5 * lora.weights
    for name in ("Qwen3-30B-A3B", "Qwen3-0.6B"):
        config = released_config(name)
        assert lora_numbers(config, 16) == num_trained(config, LoraSettings())


def test_too_little_memory_is_said_before_anything_is_read(tmp_path, monkeypatch):
    config = read_model_config(DEMO)
    need = training_need(config, 4)
    with pytest.raises(
        CapacityError, match=r"training on cpu: it needs .*weights.*Use recompute=.all., .*an adapter"
    ):
        check_fits(need, 2**20, 2**30, "cpu", lora=False, recompute=False)
    job = prepare(DEMO, [TALK], None, None, "cpu", {"rank": 4})
    assert (
        job.check_memory() is False
        and "it fits" in job.plan()
        and "an adapter of 61440 numbers" in job.plan()
    )
    tight = job.need(True).total + 1000
    monkeypatch.setattr("qwenrt.backends.cpu.backend.CPUBackend.memory", lambda self: (tight, 2**40))
    if job.need(False).total > tight:
        assert prepare(DEMO, [TALK], None, None, "cpu", {"rank": 4}).check_memory() is True
    monkeypatch.setattr("qwenrt.backends.cpu.backend.CPUBackend.memory", lambda self: (2**20, 2**40))
    with pytest.raises(CapacityError, match=r"1\.0 MiB of 1024\.00 GiB are free"):
        finetune(DEMO, [TALK], tmp_path / "out", progress=False, device="cpu")


def test_the_command_line_plans_and_estimates(tmp_path, capsys):
    (tmp_path / "talks.jsonl").write_text(json.dumps(TALK))
    words = ["finetune", "demo", str(tmp_path / "talks.jsonl"), str(tmp_path / "out"), "--rank", "4"]
    assert main([*words, "--plan", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "an adapter of 61440 numbers" in said and "moments" in said and not (tmp_path / "out").exists()
    assert main(["estimate", "Qwen-7B", "--finetune", "lora", "--device", "cuda", "--memory", "24"]) == 0
    assert "recompute all" in capsys.readouterr().out
    assert (
        main(["estimate", "Qwen-7B", "--finetune", "full", "--device", "cuda", "--memory", "24", "--json"])
        == 1
    )
    assert json.loads(capsys.readouterr().out)["all"]["total"] > 100e9
