"""Adapters that peft wrote (recorded, see peft_models.py) give peft's logits; damaged and foreign ones are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig, read_model_config
from qwenrt.config.adapter import AdapterConfig, as_peft_writes
from qwenrt.errors import CheckpointError, QwenrtError, RequestError
from qwenrt.loader.adapters import BaseWeights, open_adapter, read_adapter
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import StepPlan
from qwenrt.ops.types import AdapterSpan, AdapterWeights, StepAdapters
from tests.loader.adapters.peft_models import ADAPTERS, IDS, RECORDED

SERVED = [name for name in ADAPTERS if name != "norms"]


def base_of(kind: str) -> BaseWeights:
    checkpoint = open_checkpoint(RECORDED / kind)
    return BaseWeights(checkpoint, as_stored(read_model_config(RECORDED / kind), checkpoint))


def loaded(directory: Path) -> Qwen:
    checkpoint = open_checkpoint(directory)
    config = as_stored(read_model_config(directory), checkpoint)
    model = Qwen(config, Backend(torch.device("cpu")), torch.float32)
    load_weights(model, checkpoint, config, model.backend, torch.float32, progress=False)
    model.bind()
    return model


def logits_of(model: Qwen, adapter: AdapterWeights | None = None) -> list[torch.Tensor]:
    """float32 [T, V] of each of IDS, which are laid behind each other in one step."""
    flat, lengths, spans = [i for ids in IDS for i in ids], [len(ids) for ids in IDS], []
    if adapter is not None:
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        spans = [AdapterSpan(adapter, end - length, end) for end, length in zip(ends, lengths, strict=True)]
    adapters = StepAdapters(tuple(spans)) if spans else None
    plan = StepPlan(lengths, lengths, adapters=adapters)
    with torch.no_grad():
        hidden = model.forward(torch.tensor(flat), plan, [1] * len(lengths))
        return list(model.logits(hidden, adapters).split(lengths))


def recorded_logits(name: str) -> list[torch.Tensor]:
    recorded = load_file(RECORDED / name / "logits.safetensors")
    return [recorded[f"logits.{i}"] for i in range(len(recorded))]


@pytest.mark.parametrize("name", SERVED)
def test_logits_are_those_of_peft(name: str) -> None:
    kind = ADAPTERS[name][0]
    base, model = base_of(kind), loaded(RECORDED / kind)
    adapter, info = read_adapter(RECORDED / name, base.config, base=base, strict=True)
    plain = logits_of(model)
    for made, wanted, alone in zip(logits_of(model, adapter), recorded_logits(name), plain, strict=True):
        assert (made - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (alone - wanted).abs().max() > 1e-2 * wanted.abs().max()
    assert info.nbytes == sum(tensor.nbytes for tensor in adapter.tensors) and info.base == kind


# ---- files made here


def written(
    directory: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, **config: Any
) -> Path:
    directory.mkdir(exist_ok=True)
    said = AdapterConfig(**{"rank": 2, "alpha": 4.0, **config})
    (directory / "adapter_config.json").write_text(json.dumps(as_peft_writes(said)))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt", **(metadata or {})})
    return directory


def pair_for(module: str, rows: int, columns: int, rank: int = 2) -> dict[str, torch.Tensor]:
    a, b = torch.randn(rank, columns), torch.randn(rows, rank)
    return {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}


Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return read_model_config(RECORDED / "qwen3")


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model._orig_mod."])
def test_prefixes_of_other_programs(tmp_path: Path, config: ModelConfig, prefix: str) -> None:
    tensors = {name.replace("base_model.model.", prefix): t for name, t in pair_for(Q, 16, 16).items()}
    tensors = {
        name.replace(".model.layers", ".model.language_model.layers"): t for name, t in tensors.items()
    }
    tensors = {name.replace("lora_A.weight", "lora_A.default.weight"): t for name, t in tensors.items()}
    adapter, info = read_adapter(written(tmp_path / "a", tensors, targets=("q_proj",)), config)
    (pair,) = adapter.linears["layers.0.qkv_proj"]
    assert (pair.first, pair.scale, info.rank, info.targets) == (0, 2.0, 2, ("q_proj",))


def test_parts_of_fused_linears_and_qwen1_names(tmp_path: Path, config: ModelConfig) -> None:
    tensors = pair_for("model.layers.1.self_attn.v_proj", 8, 16) | pair_for(
        "model.layers.1.mlp.up_proj", 24, 16
    )
    adapter, _ = read_adapter(written(tmp_path / "a", tensors), config)
    assert [(p.first, len(p.b)) for p in adapter.linears["layers.1.qkv_proj"]] == [(24, 8)]
    assert [(p.first, len(p.b)) for p in adapter.linears["layers.1.gate_up_proj"]] == [(24, 24)]
    first = read_model_config(RECORDED.parent / "plain")
    d, i = first.hidden_size, first.intermediate_size
    tensors = pair_for("transformer.h.0.attn.c_attn", 3 * d, d) | pair_for("transformer.h.0.mlp.w1", i, d)
    tensors |= pair_for("transformer.h.0.mlp.w2", i, d) | pair_for("transformer.h.0.mlp.c_proj", d, i)
    adapter, _ = read_adapter(written(tmp_path / "b", tensors), first)
    assert len(adapter.linears["layers.0.qkv_proj"][0].b) == 3 * d  # one part for all of its rows
    gate, up = adapter.linears["layers.0.gate_up_proj"]  # silu is applied to w2
    assert (
        torch.equal(gate.b, tensors["base_model.model.transformer.h.0.mlp.w2.lora_B.weight"])
        and up.first == i
    )


def test_rows_of_qwen3_next_are_brought_to_the_models_order(tmp_path: Path) -> None:
    config = read_model_config(RECORDED.parent / "qwen3_next")
    base = BaseWeights(open_checkpoint(RECORDED.parent / "qwen3_next"), config)
    name = next(n for n in base.checkpoint.tensors if n.endswith("linear_attn.in_proj_qkvz.weight"))
    raw = base.reader.reader.tensor(name).float()
    module = name.removesuffix(".weight")
    tensors = pair_for(module, *raw.shape, rank=1)
    tensors[f"base_model.model.{module}.lora_B.weight"] = raw[:, :1].contiguous()
    adapter, _ = read_adapter(written(tmp_path / "a", tensors, rank=1), config)
    ((param, (pair,)),) = adapter.linears.items()
    assert torch.equal(pair.b, base.weight(param)[:, :1]) and not torch.equal(pair.b, raw[:, :1])


def test_experts_one_by_one_and_all_in_one(tmp_path: Path) -> None:
    """What peft keeps for all experts and what older releases keep for each are the same pairs."""
    config = read_model_config(RECORDED / "qwen3_moe")
    fused, _ = read_adapter(RECORDED / "experts", config)
    stack = load_file(RECORDED / "experts" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.experts"
    a, b = stack[f"{stem}.lora_A.weight"], stack[f"{stem}.lora_B.weight"]  # down_proj, 4 experts, rank 2
    for e in range(4):
        (pair,) = fused.linears[f"layers.1.experts.{e}.down_proj"]
        assert torch.equal(pair.a, a[2 * e : 2 * e + 2]) and torch.equal(pair.b, b[:, [e, 4 + e]])
    turned = {f"{stem}.lora_A.weight": b.view(16, 2, 4).permute(2, 1, 0).reshape(8, 16).contiguous()}
    turned[f"{stem}.lora_B.weight"] = a.view(4, 2, 12).permute(2, 1, 0).reshape(12, 8).contiguous()
    other, _ = read_adapter(written(tmp_path / "a", turned, alpha=8.0), config)
    for param, (pair,) in other.linears.items():
        (wanted,) = fused.linears[param]
        assert torch.allclose(pair.scale * pair.b @ pair.a, wanted.scale * wanted.b @ wanted.a)
    assert config.moe is not None
    square = replace(config, moe=replace(config.moe, intermediate_size=16))
    tensors = {f"{stem}.lora_A.weight": torch.randn(8, 16), f"{stem}.lora_B.weight": torch.randn(16, 8)}
    with pytest.raises(CheckpointError, match=r'moe_layout="out_in"'):
        read_adapter(written(tmp_path / "b", tensors), square)
    with pytest.raises(RequestError, match="one of out_in, in_out"):
        read_adapter(tmp_path / "b", square, moe_layout="fused")
    ways = [read_adapter(tmp_path / "b", square, moe_layout=way)[0] for way in ("out_in", "in_out")]
    (one,), (two,) = (adapter.linears["layers.1.experts.3.down_proj"] for adapter in ways)
    assert torch.allclose(one.b @ one.a, (two.b @ two.a).t())


def test_a_vocabulary_of_another_padding(
    tmp_path: Path, config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for rows in (60, 70):
        tensors = {"base_model.model.lm_head.weight": torch.randn(rows, 16)}
        adapter, info = read_adapter(written(tmp_path / "a", tensors, kept_modules=("lm_head",)), config)
        assert adapter.head is not None and adapter.head.rows.shape == (min(rows, 64), 16)
        assert (adapter.head.ids is None) == (rows == 70) and info.whole == ("lm_head",)
    assert "lm_head has 70 rows and the model's 64" in caplog.text


def test_what_can_only_be_merged(config: ModelConfig) -> None:
    with pytest.raises(RequestError, match=r"norm.*qwenrt merge"):
        read_adapter(RECORDED / "norms", config)
    with pytest.raises(RequestError, match=r"layers.0.router.*qwenrt merge"):  # a pair for what is not there
        read_adapter(RECORDED / "router", read_model_config(RECORDED / "qwen3_moe"))
    adapter = open_adapter(RECORDED / "norms", config)
    assert ("norm", 0) in adapter.replaced and ("layers.0.o_proj", 0) in adapter.replaced


# ---- faults


def test_the_seeds_incomplete_adapters(
    tmp_path: Path, config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ("model.embed_tokens", "lm_head")
    path = written(tmp_path / "a", pair_for(Q, 16, 16), targets=(Q,), kept_modules=kept)
    adapter, _ = read_adapter(path, config)
    assert adapter.linears and "model.embed_tokens, lm_head" in caplog.text and "base's own" in caplog.text
    with pytest.raises(CheckpointError, match="2 modules for which there are no tensors"):
        read_adapter(path, config, strict=True)
    path = written(tmp_path / "b", pair_for(Q, 16, 16), targets=("q_proj", "up_proj"))
    with pytest.raises(CheckpointError, match=r"3 modules .*: model.layers.0.mlp.up_proj, model.layers.1"):
        read_adapter(path, config, strict=True)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.int8)


def _half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"base_model.model.{Q}.lora_B.weight"]


def _same_twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.randn(2, 16)


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.qq_proj.lora_A.weight"] = torch.randn(2, 16)


def _of_a_layer_too_many(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= pair_for("model.layers.2.self_attn.q_proj", 16, 16)


def _of_another_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= pair_for(Q, 16, 16, rank=3)


def _of_another_size(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= pair_for(Q, 32, 32)


def _long_name(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a." * 5000 + "lora_A.weight"] = torch.randn(2, 2)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_nan, "lora_A.weight: 1 of its 32 values are NaN"),
        (_integers, "I8, expected F16 or BF16 or F32"),
        (_half, "the other half of the pair is missing"),
        (_same_twice, "the same as"),
        (
            _renamed,
            "1 are for nothing in this model (qwen3): base_model.model.model.layers.0.self_attn.qq_proj",
        ),
        (_of_a_layer_too_many, "2 are for nothing in this model"),
        (_of_another_rank, "(rank 3, and the config says 2)"),
        (_of_another_size, "lora_A.weight [2, 32], expected [2, 16]"),
        (_long_name, "1 are for nothing in this model"),
    ],
)
def test_spoilt_tensors_are_named(
    tmp_path: Path, config: ModelConfig, spoil: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    tensors = pair_for(Q, 16, 16)
    spoil(tensors)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_adapter(written(tmp_path / "a", tensors), config)


def test_an_adapter_that_does_nothing_says_so(
    tmp_path: Path, config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = pair_for(Q, 16, 16)
    tensors[f"base_model.model.{Q}.lora_B.weight"].zero_()
    read_adapter(written(tmp_path / "a", tensors), config)
    assert "B is zero in all of its pairs" in caplog.text
    read_adapter(written(tmp_path / "b", {}), config)
    assert "it has no tensors" in caplog.text


def test_files_that_are_not_there_or_something_else(tmp_path: Path, config: ModelConfig) -> None:
    def refused(words: str, directory: Path = tmp_path / "a") -> None:
        with pytest.raises(QwenrtError, match=words):
            read_adapter(directory, config)

    refused("there is no such directory")
    refused("it holds a model, not an adapter", RECORDED / "qwen3")
    path = written(tmp_path / "a", pair_for(Q, 16, 16))
    refused("it is a file", path / "adapter_config.json")
    weights = path / "adapter_model.safetensors"
    weights.rename(path / "adapter_model.bin")
    refused(r"adapter_model.bin is a pickle.*weights_only=True")
    (path / "adapter_model.bin").unlink()
    refused("there is no adapter_model.safetensors")
    weights.write_bytes(b"PK\x03\x04 and so on")
    refused("a zip archive, as torch.save writes it")
    weights.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    refused("its header claims 1099511627776 bytes")
    (path / "adapter_config.json").unlink()
    refused("there is no adapter_config.json")


def test_another_base_is_worth_a_warning(
    tmp_path: Path, config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    base, tensors = base_of("qwen3"), pair_for(Q, 16, 16)
    read_adapter(written(tmp_path / "a", tensors, {"qwenrt.base": base.digest}), config, base=base)
    assert "other weights" not in caplog.text
    read_adapter(written(tmp_path / "a", tensors, {"qwenrt.base": "0" * 64}), config, base=base)
    assert "other weights" in caplog.text
    copy = shutil.copytree(RECORDED / "qwen3", tmp_path / "copy")
    assert base.digest == BaseWeights(open_checkpoint(copy), config).digest


def test_dora_needs_its_base(config: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match=r"DoRA's magnitudes .*base="):
        read_adapter(RECORDED / "dora", config)
