"""A GGUF file's metadata -> what config.json and generation_config.json of the same model say.

The readers of those files then decide, so that limits, defaults and errors are the same whatever a model comes in.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qwenrt.config import parse_model_config, read_json
from qwenrt.config.hybrid import CONVERTED
from qwenrt.config.hybrid import MODEL_TYPES as HYBRID_TYPES
from qwenrt.errors import ConfigError, shown
from qwenrt.files import is_there
from qwenrt.loader.checkpoint.gguf.metadata import Metadata
from qwenrt.loader.checkpoint.header import TensorEntry
from qwenrt.ops.ggml_types import CODED

logger = logging.getLogger("qwenrt")

# general.architecture -> model_type of its text
_MODEL_TYPES = {
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen2vl": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "qwen3vl": "qwen3",
    "qwen3vlmoe": "qwen3_moe",
    "qwen3next": "qwen3_next",
    "qwen35": "qwen3_5",
    "qwen35moe": "qwen3_5_moe",
}
_FIRST_7B, _LARGEST = 4096, 8192  # hidden sizes of Qwen-1 that were trained at other lengths than 8192
_NTK_KEYS = ("use_dynamic_ntk", "use_logn_attn", "seq_length")
# What the chat models of a generation were released with, for files that do not say: as their generation_config.json.
_SAMPLING: dict[str, dict[str, float]] = {
    "qwen": {"top_p": 0.8},
    "qwen2": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    "qwen3": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "qwen3_next": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "qwen3_5": {"temperature": 1.0, "top_p": 0.95, "top_k": 20},
}
_SAMPLING_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def model_type_of(metadata: Metadata) -> str:
    """model_type of a file's architecture. Raises ConfigError, which says what it is, for every other file."""
    kind = metadata.text("general.type", "model")
    name = metadata.text("general.architecture")
    if name == "clip" or kind == "mmproj":
        raise _refused(
            metadata, "a vision tower (mmproj), no language model", "Give the model's own GGUF file."
        )
    if kind != "model":
        raise _refused(
            metadata, f"of the type {shown(kind)}, no model", "Give the GGUF file of the model itself."
        )
    if name not in _MODEL_TYPES:
        what = f"of the architecture {shown(name)}: that is "
        found = what + ("a Qwen that this version does not know" if name.startswith("qwen") else "no Qwen")
        raise _refused(metadata, found, f"Architectures that are read: {', '.join(_MODEL_TYPES)}.")
    return _MODEL_TYPES[name]


def config_of(metadata: Metadata, tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """The content of config.json; ``tensors`` under their names in HuggingFace's layout."""
    model_type = model_type_of(metadata)
    config: dict[str, Any] = {"model_type": model_type, **_sizes(metadata, tensors, model_type)}
    config |= _qwen1(metadata, config) if model_type == "qwen" else _later(metadata, tensors, model_type)
    if model_type in HYBRID_TYPES:
        config |= _linear_attention(metadata, config)
    if metadata.has(_key(metadata, "expert_count")):
        config |= _experts(metadata, tensors, config)
    config |= _quantization(tensors)
    try:
        parse_model_config(config)
    except ConfigError as error:
        found = f"{error.found} (as config.json would say it)"
        raise ConfigError(f"reading the metadata of {metadata.path.name}", found, error.remedy) from error
    return config


def generation_of(metadata: Metadata, model_type: str, end_ids: list[int], chats: bool) -> dict[str, Any]:
    """The content of generation_config.json; ``end_ids``: every token that ends a text or a turn; ``chats``: whether
    the model was trained to."""
    sampling: dict[str, Any] = {}
    for key, name in _SAMPLING_KEYS.items():
        if metadata.has(f"general.sampling.{key}"):
            value = metadata.number(f"general.sampling.{key}")
            sampling[name] = int(value) if name == "top_k" else value
    if not sampling and chats:
        sampling = dict(_SAMPLING[model_type.removesuffix("_moe")])
    generation: dict[str, Any] = {"eos_token_id": end_ids, **sampling}
    if model_type == "qwen":
        generation["chat_format"] = "chatml" if chats else "raw"
    return generation


def _refused(metadata: Metadata, what: str, remedy: str) -> ConfigError:
    return ConfigError(f"cannot load {metadata.path.name}", f"it is {what}", remedy)


def _key(metadata: Metadata, name: str) -> str:
    return f"{metadata.text('general.architecture')}.{name}"


def _sizes(metadata: Metadata, tensors: Mapping[str, TensorEntry], model_type: str) -> dict[str, Any]:
    """What every generation has."""
    embedding = tensors.get("transformer.wte.weight" if model_type == "qwen" else "model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "there is none" if embedding is None else f"it has the sizes {list(embedding.shape)}"
        raise metadata.bad("token_embd.weight", found)
    heads = metadata.one_for_all(_key(metadata, "attention.head_count"))
    hidden = metadata.integer(_key(metadata, "embedding_length"))
    head_dim = metadata.integer(_key(metadata, "attention.key_length"), hidden // max(heads, 1))
    whole = () if model_type in HYBRID_TYPES else ("rope.dimension_count",)
    for name in ("attention.value_length", *whole):
        if metadata.has(_key(metadata, name)) and metadata.integer(_key(metadata, name)) != head_dim:
            found = f"it is {metadata.integer(_key(metadata, name))}, and keys have {head_dim} channels"
            raise metadata.bad(_key(metadata, name), found, "No Qwen that runs here has that.")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": num_layers(metadata),
        **_guessing_layers(metadata),
        "num_attention_heads": heads,
        "kv_channels" if model_type == "qwen" else "head_dim": head_dim,
        **_mlp_width(metadata, model_type),
        "max_position_embeddings": metadata.integer(_key(metadata, "context_length")),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }


def num_layers(metadata: Metadata) -> int:
    """Decoder layers of a file: its blocks without those of a head that guesses tokens."""
    heads = _guessing_layers(metadata).get("mtp_num_hidden_layers", 0)
    return metadata.integer(_key(metadata, "block_count")) - heads


def _guessing_layers(metadata: Metadata) -> dict[str, int]:
    heads = metadata.integer(_key(metadata, "nextn_predict_layers"), 0)
    return {"mtp_num_hidden_layers": heads} if heads else {}


def _mlp_width(metadata: Metadata, model_type: str) -> dict[str, Any]:
    """Models all of whose layers have experts may name none."""
    key = _key(metadata, "feed_forward_length")
    if model_type in HYBRID_TYPES and not metadata.has(key):
        return {}
    return {"intermediate_size": metadata.one_for_all(key)}


# ---- Qwen-1


def _qwen1(metadata: Metadata, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """No key says what Qwen-1 does beyond the length it was trained at: the released values stand in, unless a
    config.json beside the file says otherwise."""
    hidden, positions = sizes["hidden_size"], sizes["max_position_embeddings"]
    length = 32768 if hidden >= _LARGEST else 2048 if hidden == _FIRST_7B and positions <= 8192 else 8192
    stated = _beside(metadata)
    assumed = {"use_dynamic_ntk": True, "use_logn_attn": True, "seq_length": min(length, positions)}
    if len(stated) < len(assumed):
        said = ", ".join(f"{name} {value}" for name, value in assumed.items() if name not in stated)
        logger.warning(
            "%s does not say how Qwen-1 reads long texts; as in its releases: %s. A config.json beside it is heeded",
            metadata.path.name,
            said,
        )
    return {
        "layer_norm_epsilon": metadata.number(_key(metadata, "attention.layer_norm_rms_epsilon")),
        "rotary_emb_base": metadata.number(_key(metadata, "rope.freq_base"), 10000.0),
        **assumed,
        **stated,
    }


def _beside(metadata: Metadata) -> dict[str, Any]:
    path = metadata.path.with_name("config.json")
    if not is_there(path, ConfigError):
        return {}
    config = read_json(path)
    if config.get("model_type", "qwen") != "qwen":
        return {}
    return {name: config[name] for name in _NTK_KEYS if config.get(name) is not None}


# ---- all others


def _later(metadata: Metadata, tensors: Mapping[str, TensorEntry], model_type: str) -> dict[str, Any]:
    biased = any(name.endswith(("q_proj.bias", "qkv_proj.bias")) for name in tensors)
    heads = metadata.one_for_all(_key(metadata, "attention.head_count"))
    return {
        "num_key_value_heads": metadata.one_for_all(_key(metadata, "attention.head_count_kv"), heads),
        "rms_norm_eps": metadata.number(_key(metadata, "attention.layer_norm_rms_epsilon")),
        "rope_theta": metadata.number(_key(metadata, "rope.freq_base"), 10000.0),
        "attention_bias" if model_type.startswith("qwen3") else "qkv_bias": biased,
        **_positions(metadata),
    }


def _positions(metadata: Metadata) -> dict[str, Any]:
    """YaRN. llama.cpp multiplies its own attention factor by the one in the file."""
    kind = metadata.text(_key(metadata, "rope.scaling.type"), "none")
    if kind == "none":
        return {}
    scaling = _key(metadata, "rope.scaling.")
    factor = metadata.number(f"{scaling}factor", 1.0)
    rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if metadata.has(f"{scaling}original_context_length"):
        rope["original_max_position_embeddings"] = metadata.integer(f"{scaling}original_context_length")
    if metadata.has(f"{scaling}attn_factor"):
        own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        rope["attention_factor"] = own * metadata.number(f"{scaling}attn_factor")
    for name in ("beta_fast", "beta_slow"):
        if metadata.has(f"{scaling}yarn_{name}"):
            rope[name] = metadata.number(f"{scaling}yarn_{name}")
    return {"rope_scaling": rope}


def _linear_attention(metadata: Metadata, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of linear attention: their sizes, which they are, and that the file is as the converter left it."""
    layers, heads = sizes["num_hidden_layers"], metadata.integer(_key(metadata, "ssm.time_step_rank"))
    inner = metadata.integer(_key(metadata, "ssm.inner_size"))
    if heads < 1 or inner % heads:
        raise metadata.bad(_key(metadata, "ssm.inner_size"), f"{inner} channels for {heads} value heads")
    rotated = metadata.integer(_key(metadata, "rope.dimension_count"))
    found: dict[str, Any] = {
        CONVERTED: True,
        "linear_conv_kernel_dim": metadata.integer(_key(metadata, "ssm.conv_kernel")),
        "linear_key_head_dim": metadata.integer(_key(metadata, "ssm.state_size")),
        "linear_num_key_heads": metadata.integer(_key(metadata, "ssm.group_count")),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
        "partial_rotary_factor": rotated / max(sizes["head_dim"], 1),
    }
    recurrent = _key(metadata, "attention.recurrent_layers")
    if metadata.has(recurrent):
        flags = metadata.flags(recurrent)[:layers]
        found["layer_types"] = ["linear_attention" if flag else "full_attention" for flag in flags]
    else:
        found["full_attention_interval"] = metadata.integer(_key(metadata, "full_attention_interval"), 4)
    return found


def _experts(
    metadata: Metadata, tensors: Mapping[str, TensorEntry], sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """Most files do not say whether the weights of the chosen experts are made to sum to 1: Qwen2's are not, Qwen3's
    are. The widths are those of the tensors where no key has them."""
    layers = sizes["num_hidden_layers"]
    sparse = [n for n in range(min(layers, 1024)) if f"model.layers.{n}.mlp.gate.weight" in tensors]
    first = f"model.layers.{sparse[0] if sparse else 0}.mlp"
    qwen3 = sizes["model_type"].startswith("qwen3")
    config = {
        "num_experts": metadata.integer(_key(metadata, "expert_count")),
        "num_experts_per_tok": metadata.integer(_key(metadata, "expert_used_count")),
        "norm_topk_prob": metadata.flag(_key(metadata, "expert_weights_norm"), qwen3),
        "mlp_only_layers": [n for n in range(min(layers, 1024)) if n not in sparse],
    }
    for name, key, tensor in (
        ("moe_intermediate_size", "expert_feed_forward_length", f"{first}.experts.0.down_proj.weight"),
        (
            "shared_expert_intermediate_size",
            "expert_shared_feed_forward_length",
            f"{first}.shared_expert.down_proj.weight",
        ),
    ):
        width = tensors[tensor].shape[-1] if tensor in tensors else None
        if metadata.has(_key(metadata, key)) or width is not None:
            config[name] = metadata.integer(_key(metadata, key), width)
    return config


def _quantization(tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """The codes that most weights are in; what differs is told by the headers (as_stored)."""
    elements: Counter[str] = Counter()
    for entry in tensors.values():
        if entry.dtype in CODED:
            elements[entry.dtype] += math.prod(entry.shape)
    if not elements:
        return {}
    kind = CODED[elements.most_common(1)[0][0]]
    form = {"bits": kind.bits, "group_size": kind.group_size, "group_bytes": kind.group_bytes}
    return {
        "quantization_config": {"quant_method": "gguf", **form},
        "torch_dtype": "bfloat16",  # what these models compute in; the dtype of codes says nothing of that
    }


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
