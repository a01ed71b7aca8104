"""config.json of each generation -> ModelConfig, and the errors for unsupported families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenrt.config import hybrid, qwen1, qwen2
from qwenrt.config.fields import LIMITS, bad, contradiction, first_given, read_json, token_ids
from qwenrt.config.layers import num_parameters
from qwenrt.config.model import ModelConfig
from qwenrt.config.quant import QuantConfig
from qwenrt.errors import ConfigError, shown
from qwenrt.files import is_there

# model_type of a file that holds more than text -> the generation of its text. Vision and audio are left out.
_WRAPPERS = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_5": "qwen3_5",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
}
MAX_PARAMETERS = 2**44
MAX_EXPERTS = 2**17  # in all layers; the largest released model has 12,000
_QWEN4_EXP = (
    "several residual streams, a table of n-grams and indexed attention, which this version does not compute"
)
_KNOWN = {  # model_type -> (what it is, what is missing)
    "qwen4_exp": ("Qwen3.8-Flash-Next", _QWEN4_EXP),
    "qwen4_exp_text": ("Qwen3.8-Flash-Next", _QWEN4_EXP),
    "qwen2_audio": ("Qwen2-Audio", "an audio encoder around the text model"),
    "qwen2_5_omni": ("Qwen2.5-Omni", "speech and vision around the text model"),
    "qwen3_omni_moe": ("Qwen3-Omni", "speech and vision around the text model"),
}


def read_model_config(directory: str | Path) -> ModelConfig:
    """The config of a model directory: config.json, and quantize_config.json where there is one. Keys that name code
    (auto_map) are never looked at."""
    directory = Path(directory)
    sidecar = directory / "quantize_config.json"
    return parse_model_config(
        read_json(directory / "config.json"),
        read_json(sidecar) if is_there(sidecar, ConfigError) else None,
    )


def parse_model_config(config: Mapping[str, Any], quantize: Mapping[str, Any] | None = None) -> ModelConfig:
    """From the content of config.json and of quantize_config.json. ConfigError for what is contradictory, absurdly
    large, or of a family that is not supported."""
    where = "config.json"
    model_type = config.get("model_type")
    if model_type is None:
        if config.get("seq_length") is None:  # the first uploads of Qwen-1 named no model_type, and had this
            remedy = f'Add it, as the model\'s page has it ("model_type": "{qwen2.MODEL_TYPES[0]}" is one).'
            raise ConfigError(f"reading {where}", "no model_type", remedy)
        model_type = "qwen"
    quant = first_given(config, _QUANT, where, strict=False)
    text = config
    if isinstance(model_type, str) and model_type in _WRAPPERS:
        text = config if config.get("text_config") is None else config["text_config"]
        if not isinstance(text, Mapping):
            raise bad(where, "text_config", text, "an object")
        text = _with_outer(config, text, where)
        model_type = _WRAPPERS[model_type]
        quant = first_given(text, _QUANT, where, strict=False)
    if quant is not None and not isinstance(quant, Mapping):
        raise bad(where, "quantization_config", quant, "an object")
    place = f"quantization_config of {where}" if quant else "quantize_config.json"
    quant = _with_sidecar(quant or {}, quantize or {})
    parsed = QuantConfig.from_dict(quant, place) if quant else None
    if model_type == "qwen":
        return _check_total_size(qwen1.read(text, parsed, where), where)
    if isinstance(model_type, str) and model_type in qwen2.MODEL_TYPES:
        return _check_total_size(qwen2.read(model_type, text, parsed, where), where)
    if isinstance(model_type, str) and model_type in hybrid.MODEL_TYPES:
        return _check_total_size(hybrid.read(model_type, text, parsed, where), where)
    raise _unsupported(model_type, where)


# Settings that a wrapper and its text_config may both have. Of _READ the value in text_config counts, of _JOINED the
# more specific one.
_READ = (
    *LIMITS,
    *("rms_norm_eps", "hidden_act", "attention_bias", "qkv_bias", "norm_topk_prob", "decoder_sparse_step"),
    *("mlp_only_layers", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    *("full_attention_interval", "attn_output_gate", "output_gate_type", "mamba_ssm_dtype"),
    "quantization_config",
)
_QUANT = ("quantization_config", "compression_config")  # the latter of older compressed-tensors
_JOINED = ("rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings")


def _with_outer(outer: Mapping[str, Any], text: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of text_config, completed by those of the level around it.

    Where the two differ the value in text_config is used and a warning names both, with two exceptions: embeddings are
    tied if either level says so (a saved text_config carries the class's default), and all settings of positions are
    kept, those of the outer level under ``outer_rope``.
    """
    if text is outer:
        return dict(text)
    joined = {k: v for k, v in outer.items() if v is not None and k not in ("text_config", "model_type")}
    for name, value in text.items():
        if value is None:
            continue
        if name in _READ and name in joined and joined[name] != value:
            used = f"{name} {value!r:.60} in text_config"
            contradiction(where, used, f"{joined[name]!r:.60} beside it", strict=False)
        joined[name] = value
    ends = [i for level in (text, outer) for i in token_ids(level, "eos_token_id", where)]
    joined["eos_token_id"] = list(dict.fromkeys(ends))
    flags = [level.get("tie_word_embeddings") for level in (outer, text)]
    if True in flags:
        joined["tie_word_embeddings"] = True
    joined["outer_rope"] = {name: outer[name] for name in _JOINED[:3] if outer.get(name) is not None}
    return joined


def _with_sidecar(quant: Mapping[str, Any], sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """quantization_config of config.json, completed by quantize_config.json; where the two differ for one method,
    the value in config.json is used and a warning names both."""
    methods = [level.get("quant_method") or "gptq" for level in (quant, sidecar) if level]
    if methods[1:] and methods[0] != methods[1]:
        used = f"quant_method {methods[0]!r:.40} in quantization_config"
        contradiction("config.json", used, f"{methods[1]!r:.40} in quantize_config.json", strict=False)
        return dict(quant)
    for name in ("bits", "group_size", "desc_act", "sym", "checkpoint_format"):
        ours, theirs = quant.get(name), sidecar.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            used = f"{name} {ours!r:.40} in quantization_config"
            contradiction("config.json", used, f"{theirs!r:.40} in quantize_config.json", strict=False)
    return {**sidecar, **{name: value for name, value in quant.items() if value is not None}}


def _check_total_size(config: ModelConfig, where: str) -> ModelConfig:
    """The config, unless its sizes, each of them valid, are absurd together: refused before anything is allocated."""
    experts = config.num_moe_layers * (config.moe.num_experts if config.moe is not None else 0)
    for what, count, most in (
        ("parameters", num_parameters(config), MAX_PARAMETERS),
        ("experts in all layers", experts, MAX_EXPERTS),
    ):
        if count > most:
            raise ConfigError(
                f"reading {where}",
                f"it describes a model of {count} {what}, and no Qwen comes near {most}",
                "Check the sizes in the file against the model's repository.",
            )
    return config


def text_model_type(config: Mapping[str, Any]) -> str:
    """The generation of a config.json's text: its model_type, or for what holds more than text that of the text."""
    model_type = config.get("model_type", "qwen")
    return _WRAPPERS.get(model_type, model_type) if isinstance(model_type, str) else "unknown"


def _unsupported(model_type: object, where: str) -> ConfigError:
    types = ("qwen", *qwen2.MODEL_TYPES, *hybrid.MODEL_TYPES)
    supported = f"This version of qwenrt runs model_type {', '.join(types)}."
    found = f"model_type is {shown(model_type)}"
    if isinstance(model_type, str) and model_type in _KNOWN:
        what, missing = _KNOWN[model_type]
        return ConfigError(f"reading {where}", f"{found} ({what}): it has {missing}", supported)
    spelt = model_type.lower().replace("-", "_") if isinstance(model_type, str) else ""
    if spelt != model_type and spelt in (*types, *_WRAPPERS):
        return ConfigError(f"reading {where}", found, f'Write "model_type": "{spelt}".')
    newer = spelt.startswith("qwen")
    note = " (a Qwen this version does not know)" if newer else " (not a Qwen)"
    return ConfigError(f"reading {where}", found + note, supported)
