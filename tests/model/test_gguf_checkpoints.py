"""Models out of one GGUF file: recorded logits, and the tokens of the same weights in safetensors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qwenrt
from qwenrt.backends.base import Backend
from qwenrt.config import Environment, read_model_config
from qwenrt.errors import CheckpointError, ConfigError, QwenrtError
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import TensorReader, open_checkpoint
from qwenrt.loader.hub.resolve import resolve
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops import ggml
from qwenrt.ops.ggml_types import CODED
from qwenrt.ops.steps import StepPlan
from qwenrt.sampling_params import SamplingParams
from tests.conftest import GOLDEN, HYBRID_GOLDENS
from tests.loader.gguf.gguf_files import as_gguf, next_as_gguf, rounded
from tests.model.tiny_models import (
    MOE,
    PROMPT,
    QWEN2_MOE,
    YARN,
    build,
    error_against,
    greedy,
    reloaded,
    set_weights,
    weights,
)

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
MOE_SHAPE = {**MOE, "moe_intermediate_size": 32, "norm_topk_prob": True}
QWEN2_EXPERTS = {**QWEN2_MOE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENRT_HOME", str(tmp_path_factory.mktemp("home")))


def opened(path: Path, tmp_path: Path) -> Path:
    return resolve(path, env=Environment(cache_dir=tmp_path / "cache"))


# ---- recorded files


def golden_model(name: str, tmp_path: Path) -> tuple[Qwen, dict[str, torch.Tensor]]:
    """A recorded file's model on the plain backend. Its vocabulary holds 120 bytes, which no tokenizer is made of."""
    source = GOLDEN / "gguf" / name
    directory = opened(source / "model.gguf", tmp_path)
    config = as_stored(read_model_config(directory), open_checkpoint(directory))
    backend = Backend(torch.device("cpu"))
    model = Qwen(config, backend, torch.float32)
    load_weights(model, directory, config, backend, torch.float32, progress=False)
    model.bind()
    record = source if name not in HYBRID_GOLDENS else GOLDEN / name  # of the same weights in safetensors
    return model, load_file(record / "golden.safetensors")


@pytest.mark.parametrize("name", ["kquants", "legacy", "qwen3_5_vl", "qwen3_5_moe"])
@torch.inference_mode()
def test_logits_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    model, golden = golden_model(name, tmp_path)
    keys = sorted({key.rsplit(".", 1)[0] for key in golden if not key.startswith(("dequant.", "mtp."))})
    atol = 2e-4 if name in HYBRID_GOLDENS else 1e-4  # random delta nets amplify rounding a hundredfold
    assert keys
    for key in keys:
        prompt, new = golden[f"{key}.ids"].long(), golden[f"{key}.new_tokens"].long()
        ids = torch.cat((prompt, new))
        logits = model.logits(model.forward(ids, StepPlan([len(ids)], [len(ids)]), [1.0]))
        steps = logits[len(prompt) - 1 :]
        torch.testing.assert_close(logits[: len(prompt)], golden[f"{key}.prefill_logits"], atol=atol, rtol=0)
        torch.testing.assert_close(steps, golden[f"{key}.step_logits"], atol=atol, rtol=0)
        assert steps[:-1].argmax(-1).tolist() == new.tolist()


def next_model(file: Path) -> Qwen:
    directory = opened(file, file.parent)
    config = as_stored(read_model_config(directory), open_checkpoint(directory))
    model = Qwen(config, Backend(torch.device("cpu")), torch.float32)
    load_weights(model, directory, config, model.backend, torch.float32, progress=False)
    return model


@pytest.mark.parametrize("recurrent", [None, [True, True, True, False]])
@torch.inference_mode()
def test_qwen3_next_as_the_converter_leaves_it(recurrent: list[bool] | None, tmp_path: Path) -> None:
    """Queries, keys and values in order, b and a key head by key head, norms with their 1: the same logits."""
    source = GOLDEN / "qwen3_next"
    golden, tensors = load_file(source / "golden.safetensors"), load_file(source / "model.safetensors")
    model = next_model(next_as_gguf(tensors, tmp_path / "next.gguf", attention__recurrent_layers=recurrent))
    model.bind()
    ids = golden["3.ids"].long()
    logits = model.logits(model.forward(ids, StepPlan([len(ids)], [len(ids)]), [1]))
    torch.testing.assert_close(logits, golden["3.prefill_logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attention__key_length": 0, "attention__value_length": 0}, "head_dim is 0 .as config.json would"),
        ({"rope__dimension_count": 7}, "rotates 7 channels"),
        ({"ssm__time_step_rank": 0}, "64 channels for 0 value heads"),
        ({"blk__1__ssm_a": torch.tensor([-1.0, -2.0, 0.25, -0.0])}, r"layers.1.log_decay.* is 0.25"),
    ],
)
def test_what_no_layer_of_linear_attention_has_is_refused(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    tensors = load_file(GOLDEN / "qwen3_next" / "model.safetensors")
    with pytest.raises(QwenrtError, match=match):
        next_model(next_as_gguf(tensors, tmp_path / "next.gguf", **changes))


@pytest.mark.parametrize("name", ["kquants", "legacy"])
def test_values_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "gguf" / name / "golden.safetensors")
    checkpoint = open_checkpoint(opened(GOLDEN / "gguf" / name / "model.gguf", tmp_path))
    reader = TensorReader(checkpoint)
    entries = {entry.begin: entry for entry in checkpoint.tensors.values()}
    seen = set()
    for entry in (entry for shard in checkpoint.shards for entry in shard.tensors):
        wanted = golden.get(f"dequant.{entry.name}")
        if wanted is not None:
            found = reader.tensor(entries[entry.begin].name)[: len(wanted)]
            coded = entry.dtype in CODED
            assert torch.equal(ggml.dequantize(entry.dtype, found) if coded else found.float(), wanted)
            seen.add(entry.name)
    assert seen == {key.removeprefix("dequant.") for key in golden if key.startswith("dequant.")}


# ---- twins of checkpoints in safetensors


def written(kind: str, changes: dict[str, Any], tmp_path: Path, type_: str) -> tuple[Any, Path]:
    """(the oracle with the values that the file holds, the file)."""
    directory = tmp_path / "safetensors"
    oracle = build(kind, changes, directory)
    file = as_gguf(directory, tmp_path / "model.gguf", type_)
    exact = rounded(weights(directory), type_)
    if type_ in CODED:  # the embedding becomes float16
        exact["model.embed_tokens.weight"] = exact["model.embed_tokens.weight"].half().float()
    if any(".experts." in name for name in exact):
        return reloaded(oracle, exact, directory), file
    set_weights(oracle, exact)
    return oracle, file


@pytest.mark.parametrize("type_", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen2", {**SHAPE, "tie_word_embeddings": True}),
        ("Qwen2", {**SHAPE, "rope_parameters": YARN}),
        ("Qwen3", {**SHAPE, "head_dim": 32, "num_key_value_heads": 4}),
        ("Qwen2Moe", {**SHAPE, **QWEN2_EXPERTS}),
        ("Qwen3Moe", {**SHAPE, **MOE_SHAPE}),
    ],
)  # fmt: skip
def test_a_twin_has_the_tokens_of_its_weights(
    tmp_path: Path, kind: str, changes: dict[str, Any], type_: str
) -> None:
    oracle, file = written(kind, changes, tmp_path, type_)
    with torch.no_grad():
        wanted = oracle(torch.tensor([PROMPT])).logits[0]
        tokens = greedy(oracle, PROMPT, 4)
    with qwenrt.load(file, device="cpu", dtype="float32", activations="exact", progress=False) as llm:
        got = llm.logits(PROMPT)
        # a tied head is not rounded as the oracle's is
        allowed = 1e-3 if "tie_word_embeddings" in changes else 1e-4
        assert float((got - wanted).abs().max()) <= allowed * max(1.0, float(wanted.abs().max()))
        params = SamplingParams(temperature=0, max_tokens=4)
        assert llm.generate(prompt_token_ids=PROMPT, sampling_params=params).token_ids == tokens
        if type_ in CODED:
            head = llm._assembled.model.get("lm_head")
            assert head.bits == CODED[type_].bits  # tied or not, the head keeps its codes


@pytest.mark.parametrize("type_", ["F32", "Q8_0"])
def test_qwen1(tmp_path: Path, type_: str, caplog: pytest.LogCaptureFixture) -> None:
    """What the file cannot say comes from a config.json beside it; without one the released values are assumed."""
    source = GOLDEN / "ntk_logn"
    file = as_gguf(source, tmp_path / "model.gguf", type_)
    with caplog.at_level(logging.WARNING, "qwenrt"):
        assumed = read_model_config(opened(file, tmp_path))
    assert (assumed.train_length, assumed.use_dynamic_ntk, assumed.use_logn_attn) == (8192, True, True)
    assert "model.gguf does not say how Qwen-1 reads long texts" in caplog.text
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    stated = read_model_config(opened(file, tmp_path))
    assert stated.train_length == 32
    assert stated.intermediate_size == read_model_config(source).intermediate_size
    golden = load_file(source / "golden.safetensors")
    prompt = golden["0.ids"].tolist()
    with qwenrt.load(file, device="cpu", dtype="float32", activations="exact", progress=False) as llm:
        error = float((llm.logits(prompt) - golden["0.prefill_logits"]).abs().max())
    assert error <= (1e-4 if type_ == "F32" else 0.1) * max(
        1.0, float(golden["0.prefill_logits"].abs().max())
    )


def test_fused_attention_of_newer_converters(tmp_path: Path) -> None:
    directory = tmp_path / "safetensors"
    oracle = build("Qwen2", SHAPE, directory)
    file = as_gguf(directory, tmp_path / "plain.gguf")
    import gguf

    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(tmp_path / "fused.gguf", "qwen2")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.")):
            value = field.contents()
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    tensors = {t.name: t.data.copy() for t in reader.tensors}
    import numpy as np

    for layer in range(3):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{layer}.attn_{p}.{kind}") for p in "qkv"]
            tensors[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert error_against(oracle, tmp_path / "fused.gguf") <= 1e-4


# ---- what is wrong


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "safetensors"
    build("Qwen2", SHAPE, directory)
    tensors = weights(directory)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    from safetensors.torch import save_file

    save_file(tensors, directory / "model.safetensors")
    file = as_gguf(directory, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.1\.mlp\.down_proj\.weight"):
        qwenrt.load(file, device="cpu", progress=False)


def test_a_file_that_changes_is_made_a_directory_again(tmp_path: Path) -> None:
    directory = tmp_path / "safetensors"
    build("Qwen2", SHAPE, directory)
    file = as_gguf(directory, tmp_path / "model.gguf")
    first = opened(file, tmp_path)
    assert opened(file, tmp_path) == first
    as_gguf(directory, file, "Q8_0")
    second = opened(file, tmp_path)
    assert first != second
    assert json.loads((second / "config.json").read_text())["quantization_config"]["bits"] == 8


def test_weights_in_codes_are_not_rounded_again(tmp_path: Path) -> None:
    _, file = written("Qwen2", SHAPE, tmp_path, "Q4_0")
    with pytest.raises(ConfigError, match="already quantised to 4 bits"):
        qwenrt.load(file, device="cpu", quantize="int8", progress=False)
