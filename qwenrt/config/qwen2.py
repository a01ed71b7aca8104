"""config.json of Qwen1.5 and everything after it: Qwen2, Qwen2.5, Qwen3, dense and mixtures of experts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from qwenrt.config.fields import bad, boolean, contradiction, first_given, integer, number, token_ids
from qwenrt.config.model import DTYPE_BYTES, ModelConfig, MoeConfig
from qwenrt.config.quant import QuantConfig
from qwenrt.config.rope import read_rope
from qwenrt.errors import ConfigError

MODEL_TYPES = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
_CHECK = "Check the file against the model's repository."
_LAYER_TYPES = ("full_attention", "sliding_attention")
logger = logging.getLogger("qwenrt")


def read(model_type: str, config: Mapping[str, Any], quant: QuantConfig | None, where: str) -> ModelConfig:
    """Grouped queries; biases on q, k and v up to Qwen2.5, norms on q and k from Qwen3 on."""
    qwen3 = model_type.startswith("qwen3")
    hidden = integer(config, "hidden_size", where)
    heads, kv_heads = read_heads(config, where)
    layers = integer(config, "num_hidden_layers", where)
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        raise bad(where, "hidden_act", activation, "'silu', as in every Qwen")
    positions = integer(config, "max_position_embeddings", where, default=32768)
    theta, yarn = read_rope(config, positions, where)
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
        rope_theta=theta,
        rotary_dim=head_dim,
        train_length=positions,
        max_position_embeddings=max(positions, int(yarn.factor * yarn.original_length) if yarn else 0),
        tie_word_embeddings=boolean(config, "tie_word_embeddings", where, False),
        qkv_bias=attention_bias if qwen3 else boolean(config, "qkv_bias", where, True),
        o_bias=qwen3 and attention_bias,
        qk_norm=qwen3,
        windows=_windows(model_type, config, layers, where),
        is_causal=boolean(config, "is_causal", where, True),
        yarn=yarn,
        moe=_moe(model_type, config, layers, where) if model_type.endswith("_moe") else None,
        eos_token_ids=token_ids(config, "eos_token_id", where),
        dtype=read_dtype(config, where),
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


# ---- windows


def _windows(model_type: str, config: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    """For each layer the tokens a query sees. Released files name a window and leave use_sliding_window off."""
    limited = boolean(config, "use_sliding_window", where, False)
    kinds = _layer_kinds(config, layers, where, strict=limited)
    if not limited:
        if _LAYER_TYPES[1] in kinds and config.get("sliding_window"):
            other = f"{_LAYER_TYPES[1]} in layer_types"
            contradiction(where, "use_sliding_window false", other, strict=False)
        return ()
    if "sliding_window" not in config:
        raise ConfigError(
            f"reading {where}", "use_sliding_window is true and sliding_window is absent", _CHECK
        )
    if config["sliding_window"] in (None, 0, -1):
        logger.warning(
            "%s says use_sliding_window and sliding_window %r: no layer is limited",
            where,
            config["sliding_window"],
        )
        return ()
    window = integer(config, "sliding_window", where, 1, 2**31)
    if kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    first = 0 if model_type == "qwen3_moe" else integer(config, "max_window_layers", where, 0, 2**31, 28)
    return tuple(window if layer >= first else 0 for layer in range(layers))


def _layer_kinds(config: Mapping[str, Any], layers: int, where: str, *, strict: bool) -> list[str]:
    """layer_types, empty where there are none. ``strict``: they decide, so that there must be one for each layer."""
    kinds = config.get("layer_types")
    if kinds is None:
        return []
    known = isinstance(kinds, list) and all(kind in _LAYER_TYPES for kind in kinds)
    if not known or (strict and len(kinds) != layers):
        raise bad(where, "layer_types", kinds, f"a list of {layers} of {' and '.join(_LAYER_TYPES)}")
    if len(kinds) != layers:
        contradiction(where, f"num_hidden_layers {layers}", f"{len(kinds)} layer_types", strict=False)
    return list(kinds)


# ---- experts


def _moe(model_type: str, config: Mapping[str, Any], layers: int, where: str) -> MoeConfig | None:
    qwen2 = model_type == "qwen2_moe"
    named = first_given(config, ("num_experts", "num_local_experts"), where, 60 if qwen2 else 128)
    experts = integer({"num_experts": named}, "num_experts", where, 0)
    if experts == 0:
        return None
    return MoeConfig(
        num_experts=experts,
        top_k=read_top_k(config, experts, where, default=4 if qwen2 else 8),
        intermediate_size=integer(config, "moe_intermediate_size", where, default=1408 if qwen2 else 768),
        shared_intermediate_size=integer(config, "shared_expert_intermediate_size", where, default=5632)
        if qwen2
        else 0,
        norm_topk_prob=boolean(config, "norm_topk_prob", where, False),
        dense_layers=read_dense_layers(config, layers, where),
    )


def read_top_k(config: Mapping[str, Any], experts: int, where: str, default: int) -> int:
    """To how many of its experts each token goes."""
    top_k = integer(config, "num_experts_per_tok", where, default=default)
    if top_k > experts:
        found = f"each token goes to {top_k} experts of {experts}"
        raise ConfigError(f"reading {where}", found, _CHECK)
    return top_k


def read_dense_layers(config: Mapping[str, Any], layers: int, where: str) -> frozenset[int]:
    """Layers that have one MLP among others that have experts."""
    step = integer(config, "decoder_sparse_step", where, 1, 2**31, 1)
    listed = config.get("mlp_only_layers")
    listed = [] if listed is None else listed
    if not isinstance(listed, list) or not all(type(n) is int and 0 <= n < layers for n in listed):
        raise bad(where, "mlp_only_layers", listed, f"a list of layer numbers from 0 to {layers - 1}")
    return frozenset(listed) | {n for n in range(layers) if (n + 1) % step}


# ---- the rest


def read_heads(
    config: Mapping[str, Any], where: str, heads: int | None = None, kv_heads: int | None = None
) -> tuple[int, int]:
    """Heads, and key-value heads, which divide them; by default ``heads``, and as many or ``kv_heads``."""
    found = integer(config, "num_attention_heads", where, default=heads)
    shared = integer(config, "num_key_value_heads", where, default=found if kv_heads is None else kv_heads)
    if found % shared:
        said = f"{found} heads do not divide into {shared} key-value heads"
        raise ConfigError(f"reading {where}", said, _CHECK)
    return found, shared


def read_dtype(config: Mapping[str, Any], where: str) -> str | None:
    """dtype of later files, torch_dtype of earlier ones; None where the choice is open or no weights are kept so."""
    value = first_given(config, ("dtype", "torch_dtype"), where, "auto", strict=False)
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name in ("auto", "float64") or (isinstance(name, str) and name.startswith("float8_")):
        return None
    if not isinstance(name, str) or name not in DTYPE_BYTES:
        raise bad(where, "dtype", value, f"one of {', '.join(DTYPE_BYTES)}")
    return str(name)
