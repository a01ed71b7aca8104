"""Merged models say what the model says beside its adapter, whatever the base is stored as, in complete directories."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenrt.cli import main
from qwenrt.config import read_model_config
from qwenrt.errors import CheckpointError, QwenrtError, RequestError
from qwenrt.loader.adapters import BaseWeights, read_adapter
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.merging import RequantizedReport, merge
from qwenrt.quantize.finished import claimed
from tests.conftest import GOLDEN
from tests.loader.adapters.peft_models import ADAPTERS, RECORDED
from tests.loader.adapters.test_reader import loaded, logits_of, pair_for, recorded_logits, written
from tests.ops.quantised_checkpoints import awq_config, awq_state, fp8_config, fp8_state


def near(made: list[torch.Tensor], wanted: list[torch.Tensor], relative: float) -> bool:
    return all((a - b).abs().max() <= relative * b.abs().max() for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "b_bias"])
def test_merged_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base = RECORDED / ADAPTERS[name][0]
    report = merge(base, RECORDED / name, tmp_path / "out", dtype="float32")
    assert near(logits_of(loaded(tmp_path / "out")), recorded_logits(name), 1e-5)
    assert report.changed and report.loss < 1e-6 and report.was_quantised is None
    untied = name in ("tied_embedding", "tied_kept")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.untied == untied and config["tie_word_embeddings"] == (
        ADAPTERS[name][0] == "qwen2" and not untied
    )
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


def test_a_bias_where_the_network_has_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"merging a bias into .*--adapter"):
        merge(RECORDED / "qwen3", RECORDED / "b_bias", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_weights_of_adapters_are_factors_of_their_changes(tmp_path: Path) -> None:
    base, one, two = RECORDED / "qwen3", RECORDED / "dora", RECORDED / "embedding"
    merge(base, [(one, 0.7), (two, -0.5)], tmp_path / "both", dtype="float32")
    merge(base, one, tmp_path / "one", dtype="float32")
    merge(base, two, tmp_path / "two", dtype="float32")
    both, first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("both", "one", "two")
    )
    plain = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    for name, tensor in plain.items():
        wanted = tensor + 0.7 * (first[name] - tensor) - 0.5 * (second[name] - tensor)
        assert torch.allclose(both[name], wanted, atol=1e-6), name
    report = merge(base, (one, 0.0), tmp_path / "none")
    merged = load_file(tmp_path / "none" / "model.safetensors")
    assert report.changed == 0 and all(torch.equal(merged[name].float(), plain[name]) for name in plain)


def test_what_rounding_costs_is_said(tmp_path: Path) -> None:
    base = RECORDED / "qwen3"
    report = merge(base, RECORDED / "dora", tmp_path / "out")
    assert 1e-5 < report.loss < report.worst[1] < 0.1 and "lost" not in report.format()
    assert "rounding to the stored dtype changes the adapter's part by" in report.format()
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    tiny = merge(base, (RECORDED / "dora", 1e-4), tmp_path / "tiny")
    assert tiny.loss > 0.9  # bfloat16 does not hold it


def _adapter_of_qwen1(directory: Path, config: Any) -> Path:
    d, i = config.hidden_size, config.intermediate_size
    tensors: dict[str, torch.Tensor] = {}
    for module, rows, columns in (
        ("attn.c_attn", 3 * d, d),
        ("attn.c_proj", d, d),
        ("mlp.w1", i, d),
        ("mlp.c_proj", d, i),
    ):
        tensors |= pair_for(f"transformer.h.1.{module}", rows, columns)
    tensors = {name: tensor * 0.2 for name, tensor in tensors.items()}
    tensors["base_model.model.lm_head.weight"] = torch.randn(config.vocab_size, d) * 0.1
    return written(directory, tensors, kept_modules=("lm_head",))


@pytest.mark.parametrize("base", ["plain", "gptq_int4", "gptq_int8", "gptq_int4_act_order"])
def test_qwen1_and_quantised_bases(base: str, tmp_path: Path) -> None:
    """The result is dense, and says what the adapter says beside the base."""
    source = GOLDEN / base
    checkpoint = open_checkpoint(source)
    config = as_stored(read_model_config(source), checkpoint)
    path = _adapter_of_qwen1(tmp_path / "adapter", config)
    adapter, _ = read_adapter(path, config, base=BaseWeights(checkpoint, config))
    report = merge(source, path, tmp_path / "out", dtype="float32")
    assert near(logits_of(loaded(tmp_path / "out")), logits_of(loaded(source), adapter), 1e-4)
    assert report.was_quantised == (None if base == "plain" else config.quant.name)
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in made
    given = {file.name for file in source.iterdir()} - {"golden.safetensors", "quantize_config.json"}
    assert given <= {file.name for file in (tmp_path / "out").iterdir()}
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith(("qweight", "scales", "c_proj.bias")) for name in names)


@pytest.mark.parametrize("form", ["awq", "fp8"])
def test_other_quantised_forms_beside_dense_parts(form: str, tmp_path: Path) -> None:
    """Parts of one linear that are codes and dense: all become dense weights under their names."""
    source = tmp_path / "base"
    shutil.copytree(GOLDEN / "plain", source)
    tensors = load_file(source / "model.safetensors")
    names = [
        n.removesuffix(".weight") for n in tensors if n.endswith(("attn.c_attn.weight", "mlp.w1.weight"))
    ]
    state, _ = awq_state(tensors, names, 32) if form == "awq" else fp8_state(tensors, names, (16, 32))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = awq_config(32) if form == "awq" else fp8_config((16, 32))
    (source / "config.json").write_text(json.dumps(config))
    pairs: dict[str, torch.Tensor] = {}
    for module in ("attn.c_attn", "mlp.w1", "mlp.w2"):
        pairs |= pair_for(f"transformer.h.1.{module}", *tensors[f"transformer.h.1.{module}.weight"].shape)
    path = written(tmp_path / "adapter", {name: tensor * 0.2 for name, tensor in pairs.items()})
    model = loaded(source)
    adapter, _ = read_adapter(path, model.config)
    report = merge(source, path, tmp_path / "out", dtype="float32")
    assert near(logits_of(loaded(tmp_path / "out")), logits_of(model, adapter), 1e-4)
    assert report.was_quantised == ("awq int4" if form == "awq" else "fp8")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == tensors.keys() and report.changed == 3


@pytest.mark.parametrize("base", ["qwen3_next", "qwen3_5"])
def test_hybrids(base: str, tmp_path: Path) -> None:
    source = GOLDEN / base
    checkpoint = open_checkpoint(source)
    config = as_stored(read_model_config(source), checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in checkpoint.tensors.items():
        if "linear_attn" in name and "_proj" in name:
            tensors |= pair_for(name.removesuffix(".weight"), *entry.shape)
    path = written(tmp_path / "a", {name: tensor * 0.1 for name, tensor in tensors.items()})
    adapter, _ = read_adapter(path, config)
    merge(source, path, tmp_path / "out", dtype="float32")
    plain = logits_of(loaded(source))
    wanted = logits_of(loaded(source), adapter)
    assert near(logits_of(loaded(tmp_path / "out")), wanted, 1e-4) and not near(plain, wanted, 1e-2)


def test_stacked_experts_keep_their_layout(tmp_path: Path) -> None:
    source = tmp_path / "stacked"
    shutil.copytree(RECORDED / "qwen3_moe", source)
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        own = {
            e: [tensors.pop(f"{stem}.{e}.{n}_proj.weight") for n in ("gate", "up", "down")] for e in range(4)
        }
        tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(own[e][:2]).t() for e in range(4)])
        tensors[f"{stem}.down_proj"] = torch.stack([own[e][2].t() for e in range(4)])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / "model.safetensors")
    merge(source, RECORDED / "experts", tmp_path / "out", dtype="float32")
    assert near(logits_of(loaded(tmp_path / "out")), recorded_logits("experts"), 1e-5)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


# ---- faults


def test_refusals(tmp_path: Path) -> None:
    base, adapter = RECORDED / "qwen3", RECORDED / "dora"

    def refused(words: str, *arguments: Any, kind: type[QwenrtError] = RequestError, **options: Any) -> None:
        with pytest.raises(kind, match=words):
            merge(*arguments, **options)

    refused("the model's own directory", base, adapter, base)
    refused("no adapter is given", base, [], tmp_path / "out")
    refused("its weight is nan", base, (adapter, float("nan")), tmp_path / "out")
    refused("auto, float32", base, adapter, tmp_path / "out", dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    refused("it holds 1 files already", base, adapter, tmp_path / "full")
    merge(base, adapter, tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "mine").exists()


def test_a_merge_that_fails_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwenrt.loader.checkpoint.directory.os.fsync", full)
    with pytest.raises(QwenrtError, match=r"No space left.*MB were to be written.*merge again"):
        merge(RECORDED / "qwen3", RECORDED / "dora", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# ---- quantised again


def test_what_quantising_does_to_the_adapter_is_measured(tmp_path: Path) -> None:
    source = GOLDEN / "plain"
    config = read_model_config(source)
    path = _adapter_of_qwen1(tmp_path / "adapter", config)
    texts = torch.randint(0, config.vocab_size, (20, 12)).tolist()
    options: dict[str, Any] = {"requantize": "rtn", "calibration": texts, "progress": False}
    report = merge(source, path, tmp_path / "out", bits=8, **options)
    assert isinstance(report, RequantizedReport)
    assert report.from_merged < 0.1 * report.from_base
    assert abs(report.perplexity["result"] / report.perplexity["merged"] - 1) < 0.02
    assert (
        as_stored(read_model_config(tmp_path / "out"), open_checkpoint(tmp_path / "out")).quant.name
        == "gptq int8"
    )
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "quantize_config.json", "model.safetensors", "generation_config.json"} <= names
    assert "KL divergence from the adapted model" in report.format()
    with pytest.raises(RequestError, match=r"rounding takes away what the adapter does.*--bits 8"):
        merge(source, (path, 1e-5), tmp_path / "refused", dtype="float32", **options)
    assert not list((tmp_path / "refused").iterdir())
    assert {file.name for file in tmp_path.iterdir()} == {"adapter", "out", "refused"}


def test_a_merge_that_is_cut_while_it_quantises_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = GOLDEN / "plain"
    path = _adapter_of_qwen1(tmp_path / "adapter", read_model_config(source))
    texts = torch.randint(0, 128, (20, 12)).tolist()
    options: dict[str, Any] = {"requantize": "rtn", "calibration": texts, "progress": False, "bits": 8}

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qwenrt.merging.requantized.quantize", cut)
        with pytest.raises(KeyboardInterrupt):
            merge(source, path, tmp_path / "out", **options)
    kept = tmp_path / ".out-merging" / "merged" / "model.safetensors"
    with claimed(kept.parents[1]), pytest.raises(CheckpointError, match="another process"):
        merge(
            source, path, tmp_path / "out", **{**options, "bits": 4}
        )  # other work, but not while that goes on
    assert kept.exists()

    def full(*_: Any, **__: Any) -> None:
        raise CheckpointError("writing", "no space left on device", "Make room.")

    with monkeypatch.context() as patched:
        patched.setattr("qwenrt.merging.requantized.quantize", full)
        with pytest.raises(CheckpointError, match="Make room"):
            merge(source, path, tmp_path / "out", **options)
    assert kept.exists()
    whole = merge(source, path, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr("qwenrt.merging.requantized.merge_dense", cut)  # it was done
        report = merge(source, path, tmp_path / "out", **options)
    assert report.merged == replace(whole.merged, output_dir=tmp_path / "out", seconds=report.merged.seconds)
    made, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert made.keys() == wanted.keys() and all(torch.equal(made[n], wanted[n]) for n in made)
    assert not list(tmp_path.glob(".*"))


# ---- the command line


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = str(RECORDED / "qwen3"), str(RECORDED / "dora")
    assert main(["merge", base, f"{adapter}:0.5", "-o", str(tmp_path / "a"), "--dtype", "float32"]) == 0
    assert "merged into 6 weights" in capsys.readouterr().out
    assert (
        main(["merge", "nothing-like-it", adapter, "--base", base, "-o", str(tmp_path / "b"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["changed"] == 6
    assert main(["merge", base, f"{adapter}:much", "-o", str(tmp_path / "c")]) == 1
    assert "'much' is no weight" in capsys.readouterr().err
    assert main(["merge", base, adapter, "-o", str(tmp_path / "c"), "--bits", "4"]) == 1
    assert "bits without requantize" in capsys.readouterr().err
