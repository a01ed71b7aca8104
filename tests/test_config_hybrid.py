"""config.json of models with layers of linear attention: defaults, both packagings, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwenrt.config import ModelConfig, parse_model_config
from qwenrt.config.layers import file_rows, num_active_parameters, num_parameters, state_bytes
from qwenrt.errors import ConfigError
from tests.conftest import GOLDEN

# Qwen3.5-9B and Qwen3.5-35B-A3B as released, without what a text needs nothing of.
DENSE: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
}
SPARSE: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
}


def parse(base: dict[str, Any], **changes: Any) -> ModelConfig:
    return parse_model_config(base | changes)


def test_a_short_file_means_what_its_own_code_makes_of_it() -> None:
    config = parse(DENSE)
    delta = config.linear_attention
    assert delta is not None
    assert (delta.num_key_heads, delta.num_value_heads, delta.key_dim, delta.value_dim) == (16, 32, 128, 128)
    assert (delta.conv_kernel, config.head_dim, config.rotary_dim) == (4, 256, 64)
    assert [n for n in range(32) if not config.is_linear(n)] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert config.num_kv_layers == 8 and config.num_linear_layers == 24
    assert config.max_position_embeddings == 262144
    assert 8e9 < num_parameters(config) < 10e9
    # 24 layers of 32 matrices of 128 x 128 and of three inputs of the convolution, all float32
    assert state_bytes(config, 4) == 24 * 4 * (32 * 128 * 128 + 3 * 8192)


def test_experts_of_the_later_generation_are_always_weighted_to_one() -> None:
    config = parse(SPARSE, norm_topk_prob=False)
    assert config.moe is not None and config.moe.norm_topk_prob
    assert (config.moe.num_experts, config.moe.top_k, config.moe.shared_intermediate_size) == (256, 8, 512)
    assert 34e9 < num_parameters(config) < 36e9
    assert 2.5e9 < num_active_parameters(config) < 3.5e9
    before = parse(SPARSE, model_type="qwen3_next", norm_topk_prob=False)
    assert before.moe is not None and not before.moe.norm_topk_prob and before.moe.top_k == 10


def test_the_list_of_layers_wins_over_the_interval() -> None:
    kinds = ["full_attention", *["linear_attention"] * 31]
    config = parse(DENSE, layer_types=kinds, full_attention_interval=2)
    assert config.num_kv_layers == 1 and not config.is_linear(0)
    assert parse(DENSE, full_attention_interval=2).num_kv_layers == 16
    assert parse(DENSE, layer_types=["linear_attention"] * 32).num_kv_layers == 0


def test_both_packagings_are_the_same_model() -> None:
    wrapped = {
        "model_type": "qwen3_5",
        "text_config": DENSE,
        "vision_config": {},
        "tie_word_embeddings": True,
    }
    config = parse_model_config(wrapped)
    assert config.tie_word_embeddings  # said at the outer level alone
    assert config == parse(DENSE, tie_word_embeddings=True)


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling", ""])
def test_the_share_of_a_head_that_is_rotated_may_stand_in_three_places(place: str) -> None:
    base = {name: value for name, value in DENSE.items() if name != "rope_parameters"}
    rope = {"rope_theta": 1e7, "partial_rotary_factor": 0.5}
    changes = rope if not place else {place: {"rope_type": "default", **rope}}
    assert parse(base, **changes).rotary_dim == 128


def test_the_rows_of_qwen3_next_are_put_in_order() -> None:
    """Two key heads of two channels, four value heads of one: q0 k0 v0 v1 z0 z1 | q1 k1 ... -> q0 q1 | k0 k1 | v | z"""
    config = parse_model_config(
        json.loads((GOLDEN / "qwen3_next" / "config.json").read_text())
        | {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 2,
            "linear_value_head_dim": 1,
        }
    )
    rows = file_rows(config, "layers.0.in_proj", "")
    assert rows == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert file_rows(config, "layers.0.rates_proj", "") == [0, 1, 4, 5, 2, 3, 6, 7]
    assert file_rows(config, "layers.0.out_proj", "") is None
    assert file_rows(parse(DENSE), "layers.0.in_proj", "") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_value_heads": 24}, "24 value heads do not divide by 16 key heads"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types is"),
        ({"layer_types": ["indexed_attention"] * 32}, "layer_types is"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype is 'bfloat16'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
        ({"head_dim": 4}, "rotates 1 channels"),
        ({"num_key_value_heads": 5}, "16 heads do not divide into 5 key-value heads"),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor",
        ),
    ],
)
def test_what_no_released_model_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(DENSE, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("listed", [False, 0, "", [40], [True]])
def test_layers_without_experts_are_a_list_of_layers(listed: object) -> None:
    with pytest.raises(ConfigError, match="mlp_only_layers is"):
        parse(SPARSE, model_type="qwen3_next", mlp_only_layers=listed)
    later = parse(SPARSE, mlp_only_layers=listed)  # which has no such setting
    assert later.moe is not None and not later.moe.dense_layers
    before = parse(SPARSE, model_type="qwen3_next", mlp_only_layers=[0], decoder_sparse_step=2)
    assert before.moe is not None and before.moe.dense_layers == {0, *range(0, 40, 2)}


def test_more_experts_for_a_token_than_there_are() -> None:
    with pytest.raises(ConfigError, match="each token goes to 9 experts of 8"):
        parse(SPARSE, num_experts=8, num_experts_per_tok=9)


def test_its_successor_is_refused_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"Qwen3\.8-Flash-Next.*several residual streams"):
        parse_model_config({"model_type": "qwen4_exp", "text_config": {"model_type": "qwen4_exp_text"}})
