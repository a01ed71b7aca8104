"""Checkpoints of the later generations in every form they come in: stacked experts, tied heads, wrappers, AWQ, FP8."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenrt.errors import CheckpointError, ConfigError, QwenrtError
from qwenrt.sampling_params import SamplingParams
from tests.model.tiny_models import (
    MOE,
    PROMPT,
    QWEN2_MOE,
    build,
    error_against,
    greedy,
    linears,
    load,
    reloaded,
    rewrite,
    set_weights,
    weights,
)
from tests.ops.quantised_checkpoints import awq_config, awq_state, fp8_config, fp8_state, gptq_state

MOE_SHAPE = {**MOE, "head_dim": 16, "norm_topk_prob": True}


def stacked(tensors: dict[str, torch.Tensor], transposed: bool) -> dict[str, torch.Tensor]:
    """Experts one after the other in one tensor, gate above up."""
    out = {k: v for k, v in tensors.items() if ".experts." not in k}
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.gate_proj.weight" not in tensors:
            continue
        names = range(MOE["num_experts"])
        gate_up = [
            torch.cat([tensors[f"{prefix}.{e}.{p}_proj.weight"] for p in ("gate", "up")]) for e in names
        ]
        down = [tensors[f"{prefix}.{e}.down_proj.weight"] for e in names]
        for name, parts in (("gate_up_proj", gate_up), ("down_proj", down)):
            out[f"{prefix}.{name}"] = torch.stack([p.t() if transposed else p for p in parts])
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "Qwen2Moe"])
def test_experts_stacked_in_one_tensor(tmp_path: Path, kind: str, transposed: bool) -> None:
    oracle = build(kind, MOE_SHAPE if kind == "Qwen3Moe" else QWEN2_MOE, tmp_path)
    rewrite(tmp_path, stacked(weights(tmp_path), transposed))
    assert error_against(oracle, tmp_path) <= 1e-4


def test_experts_stacked_in_a_shape_of_neither_kind_are_named(tmp_path: Path) -> None:
    build("Qwen3Moe", MOE_SHAPE, tmp_path)
    tensors = stacked(weights(tmp_path), False)
    name = "model.layers.1.mlp.experts.down_proj"
    rewrite(tmp_path, {**tensors, name: tensors[name][:, :-1]})
    with pytest.raises(CheckpointError, match=r"unexpected: model.layers.1.mlp.experts.down_proj"):
        load(tmp_path)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_mixtures_of_experts_are_quantised_at_load(tmp_path: Path, quantize: str) -> None:
    oracle = build("Qwen3Moe", MOE_SHAPE, tmp_path)
    with torch.no_grad():
        wanted = oracle(torch.tensor([PROMPT])).logits[0]
    with load(tmp_path, quantize=quantize) as llm:
        got = llm.logits(PROMPT)
        kinds = {llm._assembled.model.get(f"layers.0.experts.{e}.down_proj").bits for e in range(6)}
        assert llm._assembled.model.get("layers.0.router").dtype == torch.float32
    assert kinds == {int(quantize[3:])}
    similarity = torch.nn.functional.cosine_similarity(got, wanted, dim=-1)
    # a token may go to another expert
    assert float(similarity.median()) > {"int8": 0.98, "int4": 0.5}[quantize]


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl"])
def test_the_text_of_a_vision_language_checkpoint(tmp_path: Path, model_type: str) -> None:
    kind = "Qwen3" if model_type == "qwen3_vl" else "Qwen2"
    oracle = build(kind, {"head_dim": 16} if kind == "Qwen3" else {}, tmp_path)
    tensors = {k.replace("model.", "model.language_model.", 1): v for k, v in weights(tmp_path).items()}
    tensors["model.visual.blocks.0.attn.qkv.weight"] = torch.zeros(4, 4)
    text = json.loads((tmp_path / "config.json").read_text())
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    nested = {"model_type": model_type, "text_config": {**text, "model_type": f"{model_type}_text"}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    rewrite(tmp_path, tensors)
    assert error_against(oracle, tmp_path) <= 1e-4


@pytest.mark.parametrize("method", ["awq", "fp8 block", "fp8 channel"])
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Qwen2, tied"])
def test_quantised_checkpoints(tmp_path: Path, method: str, kind: str) -> None:
    """The oracle computes with the dequantised matrices."""
    tied = kind.endswith("tied")
    shape = {
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "tie_word_embeddings": tied,
    }
    oracle = build(kind.split(",")[0], {**shape, "head_dim": 16}, tmp_path)
    tensors = weights(tmp_path)
    names = linears(tensors)
    block = (16, 32) if method == "fp8 block" else None
    state, dense = awq_state(tensors, names, 16) if method == "awq" else fp8_state(tensors, names, block)
    rewrite(tmp_path, state, quantization_config=awq_config(16) if method == "awq" else fp8_config(block))
    exact = {k: v.bfloat16().float() for k, v in dense.items()} if method != "awq" else dense
    set_weights(oracle, exact)
    with torch.no_grad():
        size = float(oracle(torch.tensor([PROMPT])).logits.abs().max())
    assert error_against(oracle, tmp_path) <= 1e-5 * size  # float32 sums in another order
    with torch.no_grad():
        wanted = greedy(oracle, PROMPT, 4)
    with load(tmp_path) as llm:
        params = SamplingParams(temperature=0, max_tokens=4)
        assert llm.generate(prompt_token_ids=PROMPT, sampling_params=params).token_ids == wanted


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("kind", "width"), [("Qwen2", 96), ("Qwen2", 80), ("Qwen3", 96), ("Qwen3Moe", 96)])
def test_gptq_checkpoints_of_later_generations(tmp_path: Path, bits: int, kind: str, width: int) -> None:
    """Real biases on q, k and v, zero ones elsewhere; a width that is no multiple of the group; experts."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": width}
    sparse = {**MOE, "moe_intermediate_size": 32} if kind == "Qwen3Moe" else {}
    oracle = build(kind, {**shape, **sparse}, tmp_path)
    tensors = weights(tmp_path)
    state, exact = gptq_state(tensors, linears(tensors), bits, 32)
    quant = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": True}
    rewrite(tmp_path, state, quantization_config=quant)
    if kind == "Qwen3Moe":
        oracle = reloaded(oracle, exact, tmp_path)
    else:
        set_weights(oracle, exact)
    with torch.no_grad():
        size = float(oracle(torch.tensor([PROMPT])).logits.abs().max())
    assert error_against(oracle, tmp_path) <= 1e-5 * size


def test_fp8_says_what_serves_and_rounds_to_int8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build("Qwen3", {"head_dim": 16, "hidden_size": 64, "num_attention_heads": 4}, tmp_path)
    tensors = weights(tmp_path)
    state, _ = fp8_state(tensors, linears(tensors), (16, 32))
    rewrite(tmp_path, state, quantization_config=fp8_config((16, 32)))
    with caplog.at_level(logging.INFO, logger="qwenrt"), load(tmp_path) as llm:
        plain = llm.logits(PROMPT)
    assert "FP8 weights are turned into bfloat16 at load" in caplog.text
    with load(tmp_path, quantize="int8") as llm:
        assert llm._assembled.model.get("layers.0.qkv_proj").bits == 8
        rounded = llm.logits(PROMPT)
    assert float(torch.nn.functional.cosine_similarity(plain, rounded, dim=-1).min()) > 0.98


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "5 heads do not divide into 2 key-value heads"),
        ({"num_experts_per_tok": 7}, "each token goes to 7 experts of 6"),
        ({"use_sliding_window": True, "sliding_window": None}, "sliding_window is absent"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "the rope type is 'llama3'"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "YaRN without a factor"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"layer_types": ["full_attention"], "use_sliding_window": True, "sliding_window": 4},
            "layer_types is",
        ),
        ({"mlp_only_layers": [9]}, "mlp_only_layers is"),
        ({"torch_dtype": "int3", "dtype": None}, "dtype is 'int3'"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"num_local_experts": -1}, "num_experts is -1"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method is 'bitsandbytes'"),
        ({"text_config": 3, "model_type": "qwen3_vl_moe"}, "text_config is 3"),
    ],
)
def test_contradictions_are_named_and_nothing_is_allocated(
    tmp_path: Path, change: dict[str, Any], message: str, shared_moe: Path
) -> None:
    (tmp_path / "config.json").write_bytes((shared_moe / "config.json").read_bytes())
    rewrite(tmp_path, **change)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def shared_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("moe")
    build("Qwen3Moe", MOE_SHAPE, directory)
    return directory


def test_a_missing_expert_is_named(tmp_path: Path, shared_moe: Path) -> None:
    tensors = weights(shared_moe)
    (tmp_path / "config.json").write_bytes((shared_moe / "config.json").read_bytes())
    lost = {k: v for k, v in tensors.items() if ".experts.4." not in k}
    rewrite(tmp_path, lost)
    with pytest.raises(CheckpointError, match=r"9 missing: model.layers.0.mlp.experts.4.gate_proj.weight"):
        load(tmp_path)


def test_biases_that_the_config_does_not_announce(tmp_path: Path) -> None:
    build("Qwen3", {"head_dim": 16}, tmp_path)
    tensors = weights(tmp_path)
    rewrite(tmp_path, {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(96)})
    with pytest.raises(CheckpointError, match=r"unexpected: model.layers.0.self_attn.q_proj.bias"):
        load(tmp_path)


def overflowing(directory: Path) -> Any:
    """A model whose residual stream leaves float16's range in its second layer and comes back through the norm."""
    oracle = build("Qwen2", {}, directory)
    with torch.no_grad():
        oracle.model.layers[1].mlp.down_proj.weight.mul_(3e4)
    oracle.save_pretrained(directory)
    with torch.no_grad():
        inside = oracle.model.layers[1].mlp
        seen: list[float] = []
        hook = inside.register_forward_hook(lambda *args: seen.append(float(args[2].abs().max())))
        oracle(torch.tensor([PROMPT]))
        hook.remove()
    assert 65504 < seen[0] < 64 * 65504
    return oracle


def test_float16_survives_layers_that_overflow_it(tmp_path: Path) -> None:
    oracle = overflowing(tmp_path)
    with torch.no_grad():
        wanted = oracle(torch.tensor([PROMPT])).logits[0]
    with load(tmp_path, dtype="float16") as llm:
        got = llm.logits(PROMPT)
    assert float(torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min()) > 0.999


def test_numbers_that_overflow_are_traced_to_their_layer(tmp_path: Path) -> None:
    oracle = build("Qwen2", {}, tmp_path)
    with torch.no_grad():
        oracle.model.layers[1].mlp.down_proj.weight.mul_(1e38)
    oracle.save_pretrained(tmp_path)
    with (
        load(tmp_path) as llm,
        pytest.raises(QwenrtError, match=r"non-finite logits; the first such numbers come out of layers.1"),
    ):
        llm.generate(prompt_token_ids=PROMPT, max_tokens=2)
