"""config.json of Qwen3-Next and of everything from Qwen3.5 on: most layers are gated delta nets, the others attend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenrt.config.fields import bad, boolean, integer, number, token_ids
from qwenrt.config.model import LinearAttentionConfig, ModelConfig, MoeConfig
from qwenrt.config.quant import QuantConfig
from qwenrt.config.qwen2 import read_dense_layers, read_dtype, read_heads, read_top_k
from qwenrt.config.rope import read_partial_rotary, read_rope
from qwenrt.errors import ConfigError

MODEL_TYPES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
CONVERTED = "converted_for_ggml"  # not in released files: what is read from GGUF says so
_LAYER_TYPES = ("linear_attention", "full_attention")
_CHECK = "Check the file against the model's repository."


def read(model_type: str, config: Mapping[str, Any], quant: QuantConfig | None, where: str) -> ModelConfig:
    """Defaults are those of the released files' own code. ConfigError for what no released model has."""
    for name, known in (("hidden_act", "silu"), ("output_gate_type", "silu"), ("mamba_ssm_dtype", "float32")):
        if config.get(name) not in (None, known):
            raise bad(where, name, config[name], f"{known!r}, as in every released one")
    if not boolean(config, "attn_output_gate", where, True):
        raise bad(where, "attn_output_gate", False, "true, as in every released one")
    is_moe = model_type != "qwen3_5"
    layers = integer(config, "num_hidden_layers", where)
    heads, kv_heads = read_heads(config, where, 16, 4 if model_type == "qwen3_5" else 2)
    head_dim = integer(config, "head_dim", where, 4, default=256)
    positions = integer(config, "max_position_embeddings", where, default=262144)
    theta, yarn = read_rope(config, positions, where, partial=True)
    bias = boolean(config, "attention_bias", where, False)
    return ModelConfig(
        model_type=model_type,
        vocab_size=integer(config, "vocab_size", where),
        hidden_size=integer(config, "hidden_size", where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=integer(config, "intermediate_size", where, default=5632 if is_moe else None),
        rms_norm_eps=number(config, "rms_norm_eps", where, 1e-12, 0.1, 1e-6),
        rope_theta=theta,
        rotary_dim=_rotary_dim(config, head_dim, where),
        train_length=positions,
        max_position_embeddings=max(positions, int(yarn.factor * yarn.original_length) if yarn else 0),
        tie_word_embeddings=boolean(config, "tie_word_embeddings", where, False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        yarn=yarn,
        moe=_moe(model_type, config, layers, where) if is_moe else None,
        linear_attention=_linear_attention(model_type, config, layers, where),
        attn_gate=True,
        zero_centred_norms=True,
        # Qwen3-Next's own config.json does not mention the head that it was released with.
        mtp_layers=integer(
            config, "mtp_num_hidden_layers", where, 0, default=int(model_type == "qwen3_next")
        ),
        eos_token_ids=token_ids(config, "eos_token_id", where),
        dtype=read_dtype(config, where),
        quant=quant,
    )


def _rotary_dim(config: Mapping[str, Any], head_dim: int, where: str) -> int:
    """Channels of a head that are rotated: an even number, a quarter of them where the file does not say."""
    factor = read_partial_rotary(config, where, default=0.25)
    dim = int(head_dim * factor)
    if dim < 2 or dim % 2:
        found = f"partial_rotary_factor {factor:g} of head_dim {head_dim} rotates {dim} channels"
        raise ConfigError(f"reading {where}", found, "It must be an even number of at least 2.")
    return dim


def _linear_attention(
    model_type: str, config: Mapping[str, Any], layers: int, where: str
) -> LinearAttentionConfig:
    keys = integer(config, "linear_num_key_heads", where, default=16)
    values = integer(config, "linear_num_value_heads", where, default=32)
    if values % keys:
        found = f"{values} value heads do not divide by {keys} key heads in layers of linear attention"
        raise ConfigError(f"reading {where}", found, _CHECK)
    return LinearAttentionConfig(
        num_key_heads=keys,
        num_value_heads=values,
        key_dim=integer(config, "linear_key_head_dim", where, default=128),
        value_dim=integer(config, "linear_value_head_dim", where, default=128),
        conv_kernel=integer(config, "linear_conv_kernel_dim", where, 2, default=4),
        layers=frozenset(_linear_layers(config, layers, where)),
        grouped=model_type == "qwen3_next",
        converted=config.get(CONVERTED) is True,
    )


def _linear_layers(config: Mapping[str, Any], layers: int, where: str) -> list[int]:
    """layer_types decide; where the file has none, every full_attention_interval-th layer attends."""
    kinds = config.get("layer_types")
    if kinds is None:
        interval = integer(config, "full_attention_interval", where, default=4)
        return [n for n in range(layers) if (n + 1) % interval]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _LAYER_TYPES for kind in kinds):
        raise bad(where, "layer_types", kinds, f"a list of {layers} of {' and '.join(_LAYER_TYPES)}")
    return [n for n, kind in enumerate(kinds) if kind == _LAYER_TYPES[0]]


def _moe(model_type: str, config: Mapping[str, Any], layers: int, where: str) -> MoeConfig:
    is_next = model_type == "qwen3_next"
    experts = integer(config, "num_experts", where, default=512 if is_next else 256)
    return MoeConfig(
        num_experts=experts,
        top_k=read_top_k(config, experts, where, default=10 if is_next else 8),
        intermediate_size=integer(config, "moe_intermediate_size", where, default=512),
        shared_intermediate_size=integer(config, "shared_expert_intermediate_size", where, default=512),
        norm_topk_prob=not is_next or boolean(config, "norm_topk_prob", where, True),
        # The others have no setting for that.
        dense_layers=read_dense_layers(config, layers, where) if is_next else frozenset(),
    )
