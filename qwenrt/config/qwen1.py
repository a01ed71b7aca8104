"""config.json of Qwen-1, in both spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenrt.config.fields import bad, boolean, first_given, integer, number
from qwenrt.config.model import ModelConfig
from qwenrt.config.quant import QuantConfig
from qwenrt.errors import ConfigError

# Qwen-1 was released with two spellings of its config; the early one on the left.
_EARLY_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
}


def read(config: Mapping[str, Any], quant: QuantConfig | None, where: str) -> ModelConfig:
    """Qwen-1: multi-head attention with biases on q, k and v, dynamic NTK, LogN, and a doubled MLP width."""
    spelled = {  # vocab_size may be told without the padding of padded_vocab_size
        late: first_given(config, (early, late), where, strict=late != "vocab_size")
        for early, late in _EARLY_KEYS.items()
    }
    config = {**config, **{name: value for name, value in spelled.items() if value is not None}}
    hidden = integer(config, "hidden_size", where)
    heads = integer(config, "num_attention_heads", where)
    if hidden % heads:
        raise ConfigError(
            f"reading {where}",
            f"hidden_size {hidden} does not divide into {heads} heads",
            "Check the file against the model's repository.",
        )
    head_dim = integer(config, "kv_channels", where, default=hidden // heads)
    if head_dim * heads != hidden:
        raise ConfigError(
            f"reading {where}",
            f"kv_channels {head_dim} x {heads} heads is {head_dim * heads}, hidden_size is {hidden}",
            "Check the file against the model's repository.",
        )
    doubled = integer(config, "intermediate_size", where)
    if doubled % 2:
        raise bad(where, "intermediate_size", doubled, "even (Qwen-1 stores twice the width)")
    train_length = integer(config, "seq_length", where)
    linear_bias = not boolean(config, "no_bias", where, True)
    return ModelConfig(
        model_type="qwen",
        vocab_size=integer(config, "vocab_size", where, default=151936),
        hidden_size=hidden,
        num_layers=integer(config, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=doubled // 2,
        rms_norm_eps=number(config, "layer_norm_epsilon", where, 1e-12, 0.1, 1e-6),
        rope_theta=number(config, "rotary_emb_base", where, 1.0, 1e12, 10000.0, low_open=True),
        rotary_dim=_rotary_dim(config, head_dim, where),
        train_length=train_length,
        max_position_embeddings=integer(
            config, "max_position_embeddings", where, default=max(train_length, 8192)
        ),
        use_dynamic_ntk=boolean(config, "use_dynamic_ntk", where, True),
        use_logn_attn=boolean(config, "use_logn_attn", where, True),
        tie_word_embeddings=boolean(config, "tie_word_embeddings", where, False),
        o_bias=linear_bias,
        mlp_bias=linear_bias,
        dtype=_dtype(config, where),
        quant=quant,
    )


def _rotary_dim(config: Mapping[str, Any], head_dim: int, where: str) -> int:
    percent = number(config, "rotary_pct", where, 0.0, 1.0, 1.0, low_open=True)
    dim = head_dim if percent == 1.0 else int(head_dim * percent)
    if dim < 4 or dim % 2:
        raise ConfigError(
            f"reading {where}",
            f"rotary_pct {percent:g} of {head_dim} channels rotates {dim} of them",
            "The rotated part must be an even number of at least 4 channels.",
        )
    return dim


def _dtype(config: Mapping[str, Any], where: str) -> str | None:
    flags = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    on = [name for name in flags if boolean(config, name, where, False)]
    if len(on) > 1:
        raise ConfigError(f"reading {where}", f"{' and '.join(on)} are all true", "At most one may be.")
    return flags[on[0]] if on else None
