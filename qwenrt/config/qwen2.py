"""config.json of Qwen1.5 and everything after it: Qwen2, Qwen2.5, Qwen3, dense and mixtures of experts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from qwenrt.config.fields import bad, boolean, integer, number
from qwenrt.config.model import ModelConfig, MoeConfig, YarnConfig
from qwenrt.config.quant import QuantConfig
from qwenrt.errors import ConfigError

MODEL_TYPES = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
_CHECK = "Check the file against the model's repository."
_DTYPES = ("float32", "bfloat16", "float16")
_LAYER_TYPES = ("full_attention", "sliding_attention")
logger = logging.getLogger("qwenrt")


def read(model_type: str, config: Mapping[str, Any], quant: QuantConfig | None, where: str) -> ModelConfig:
    """Grouped queries; biases on q, k and v up to Qwen2.5, norms on q and k from Qwen3 on."""
    qwen3 = model_type.startswith("qwen3")
    hidden = integer(config, "hidden_size", where)
    heads = integer(config, "num_attention_heads", where)
    kv_heads = integer(config, "num_key_value_heads", where, default=heads)
    if heads % kv_heads:
        found = f"{heads} heads do not divide into {kv_heads} key-value heads"
        raise ConfigError(f"reading {where}", found, _CHECK)
    layers = integer(config, "num_hidden_layers", where)
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise bad(where, "hidden_act", activation, "'silu', as in every Qwen")
    rope = _rope_parameters(config, where)
    positions = integer(config, "max_position_embeddings", where, default=32768)
    yarn = _yarn(rope, positions, where)
    attention_bias = boolean(config, "attention_bias", where, False)
    head_dim = _head_dim(model_type, config, hidden, heads, where)
    return ModelConfig(
        model_type=model_type,
        vocab_size=integer(config, "vocab_size", where, default=151936),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=integer(config, "intermediate_size", where),
        rms_norm_eps=number(config, "rms_norm_eps", where, 1e-12, 0.1, 1e-6),
        rope_theta=_theta(config, rope, where),
        rotary_dim=head_dim,
        train_length=positions,
        max_position_embeddings=max(positions, int(yarn.factor * yarn.original_length) if yarn else 0),
        tie_word_embeddings=boolean(config, "tie_word_embeddings", where, False),
        qkv_bias=attention_bias if qwen3 else boolean(config, "qkv_bias", where, True),
        o_bias=qwen3 and attention_bias,
        qk_norm=qwen3,
        windows=_windows(model_type, config, layers, where),
        yarn=yarn,
        moe=_moe(model_type, config, layers, where) if model_type.endswith("_moe") else None,
        eos_token_ids=_eos(config, where),
        dtype=_dtype(config, where),
        quant=quant,
    )


def _head_dim(model_type: str, config: Mapping[str, Any], hidden: int, heads: int, where: str) -> int:
    """As written; else 128 for dense Qwen3, whose heads need not share out the hidden size, and hidden / heads."""
    if config.get("head_dim") is None and model_type != "qwen3" and hidden % heads:
        found = f"hidden_size {hidden} does not divide into {heads} heads"
        raise ConfigError(f"reading {where}", found, _CHECK)
    default = 128 if model_type == "qwen3" else hidden // heads
    head_dim = integer(config, "head_dim", where, default=default)
    if head_dim < 4 or head_dim % 2:
        raise bad(where, "head_dim", head_dim, "an even number of at least 4")
    return head_dim


# ---- positions


def _rope_parameters(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """rope_parameters of later files, rope_scaling of earlier ones, or nothing."""
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name)
        if value is not None:
            if not isinstance(value, Mapping):
                raise bad(where, name, value, "an object or null")
            return value
    return {}


def _theta(config: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> float:
    source = rope if rope.get("rope_theta") is not None else config
    if source.get("rope_theta") is None:
        logger.warning(
            "%s names no rope_theta: 10000 is assumed, which few Qwen models were trained with", where
        )
    return number(source, "rope_theta", where, 1.0, 1e12, 10000.0, low_open=True)


def _yarn(rope: Mapping[str, Any], positions: int, where: str) -> YarnConfig | None:
    """None for plain positions. Text alone has all sections of mrope at the same position, which is plain as well."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "mrope"):
        return None
    if kind != "yarn":
        found = f"the rope type is {kind!r:.80}"
        raise ConfigError(
            f"reading {where}", found, "Supported are 'default' and 'yarn'; guessing would be wrong."
        )
    if rope.get("factor") is None:
        raise ConfigError(f"reading {where}", "YaRN without a factor", _CHECK)
    factor = number(rope, "factor", where, 1.0, 1024.0, 1.0)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = _mscale(factor, 1.0)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            attention = _mscale(factor, number(rope, "mscale", where, 0.0, 100.0, 1.0))
            attention /= _mscale(factor, number(rope, "mscale_all_dim", where, 0.0, 100.0, 1.0))
    else:
        attention = number(rope, "attention_factor", where, 0.0, 100.0, 1.0, low_open=True)
    fast = number(rope, "beta_fast", where, 0.0, 1e6, 32.0, low_open=True)
    slow = number(rope, "beta_slow", where, 0.0, 1e6, 1.0, low_open=True)
    return YarnConfig(
        factor=factor,
        original_length=integer(rope, "original_max_position_embeddings", where, 1, 2**24, positions),
        attention_factor=attention,
        beta_fast=fast,
        beta_slow=slow,
        truncate=boolean(rope, "truncate", where, True),
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _windows(model_type: str, config: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    """For each layer the tokens a query sees. Released files name a window and leave use_sliding_window off."""
    if not boolean(config, "use_sliding_window", where, False):
        return ()
    if config.get("sliding_window") is None:
        raise ConfigError(
            f"reading {where}", "use_sliding_window is true and sliding_window is absent", _CHECK
        )
    window = integer(config, "sliding_window", where, 1, 2**31)
    kinds = config.get("layer_types")
    if kinds is not None:
        known = isinstance(kinds, list) and len(kinds) == layers
        if not known or not all(kind in _LAYER_TYPES for kind in kinds):
            raise bad(where, "layer_types", kinds, f"a list of {layers} of {' and '.join(_LAYER_TYPES)}")
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    first = 0 if model_type == "qwen3_moe" else integer(config, "max_window_layers", where, 0, 2**31, layers)
    return tuple(window if layer >= first else 0 for layer in range(layers))


# ---- experts


def _moe(model_type: str, config: Mapping[str, Any], layers: int, where: str) -> MoeConfig | None:
    qwen2 = model_type == "qwen2_moe"
    if config.get("num_experts") is None and "num_local_experts" in config:  # as later writers spell it
        config = {**config, "num_experts": config["num_local_experts"]}
    experts = integer(config, "num_experts", where, 0, None, 60 if qwen2 else 128)
    if experts == 0:
        return None
    top_k = integer(config, "num_experts_per_tok", where, 1, None, 4 if qwen2 else 8)
    if top_k > experts:
        found = f"each token goes to {top_k} experts of {experts}"
        raise ConfigError(f"reading {where}", found, _CHECK)
    step = integer(config, "decoder_sparse_step", where, 1, 2**31, 1)
    listed = config.get("mlp_only_layers")
    listed = [] if listed is None else listed
    if not isinstance(listed, list) or not all(type(n) is int and 0 <= n < layers for n in listed):
        raise bad(where, "mlp_only_layers", listed, f"a list of layer numbers from 0 to {layers - 1}")
    return MoeConfig(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=integer(config, "moe_intermediate_size", where, default=1408 if qwen2 else 768),
        shared_intermediate_size=integer(config, "shared_expert_intermediate_size", where, default=5632)
        if qwen2
        else 0,
        norm_topk_prob=boolean(config, "norm_topk_prob", where, False),
        dense_layers=frozenset(n for n in range(layers) if n in listed or (n + 1) % step),
    )


# ---- the rest


def _eos(config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise bad(where, "eos_token_id", eos, "a token id or a list of them")
    return tuple(ids)


def _dtype(config: Mapping[str, Any], where: str) -> str | None:
    """dtype of later files, torch_dtype of earlier ones."""
    value = config.get("dtype", config.get("torch_dtype"))
    if value in (None, "auto"):
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in _DTYPES:
        raise bad(where, "dtype", value, f"one of {', '.join(_DTYPES)}")
    return str(name)
