"""config.json of each generation -> ModelConfig, and what is said about the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenrt.config import qwen1, qwen2
from qwenrt.config.fields import bad
from qwenrt.config.model import ModelConfig
from qwenrt.config.quant import QuantConfig
from qwenrt.errors import ConfigError

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
}
_HYBRID = "linear attention (gated DeltaNet) layers, which this version does not compute"
_KNOWN = {  # model_type -> (what it is, what is missing)
    "qwen3_next": ("Qwen3-Next", _HYBRID),
    "qwen3_5": ("Qwen3.5", _HYBRID),
    "qwen3_5_text": ("Qwen3.5", _HYBRID),
    "qwen3_5_moe": ("a Qwen3.5 mixture of experts", _HYBRID),
    "qwen3_5_moe_text": ("a Qwen3.5 mixture of experts", _HYBRID),
    "qwen2_audio": ("Qwen2-Audio", "an audio encoder around the text model"),
    "qwen2_5_omni": ("Qwen2.5-Omni", "speech and vision around the text model"),
    "qwen3_omni_moe": ("Qwen3-Omni", "speech and vision around the text model"),
}


def read_model_config(config: Mapping[str, Any], quantize: Mapping[str, Any] | None = None) -> ModelConfig:
    """The config of any supported generation; ConfigError with a sentence for the others."""
    where = "config.json"
    model_type = config.get("model_type", "qwen")  # the first uploads of Qwen-1 named none
    quant = config.get("quantization_config") or quantize
    text = config
    if isinstance(model_type, str) and model_type in _WRAPPERS:
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise bad(where, "text_config", text, "an object")
        # What the outer level says of the whole model holds for its text as well.
        outer = {k: config[k] for k in ("tie_word_embeddings", "torch_dtype", "dtype") if k in config}
        text = {**outer, **text}
        model_type = _WRAPPERS[model_type]
        quant = text.get("quantization_config") or quant
    if quant is not None and not isinstance(quant, Mapping):
        raise bad(where, "quantization_config", quant, "an object")
    parsed = QuantConfig.from_dict(quant, "the quantisation config") if quant else None
    if model_type == "qwen":
        return qwen1.read(text, parsed, where)
    if isinstance(model_type, str) and model_type in qwen2.MODEL_TYPES:
        return qwen2.read(model_type, text, parsed, where)
    raise _unsupported(model_type, where)


def text_model_type(config: Mapping[str, Any]) -> str:
    """The generation of a config.json's text: its model_type, or for what holds more than text that of the text."""
    model_type = config.get("model_type", "qwen")
    return _WRAPPERS.get(model_type, model_type) if isinstance(model_type, str) else "unknown"


def _unsupported(model_type: object, where: str) -> ConfigError:
    supported = f"This version of qwenrt runs model_type {', '.join(('qwen', *qwen2.MODEL_TYPES))}."
    found = f"model_type is {str(model_type)[:80]!r}"
    if isinstance(model_type, str) and model_type in _KNOWN:
        what, missing = _KNOWN[model_type]
        return ConfigError(f"reading {where}", f"{found} ({what}): it has {missing}", supported)
    newer = isinstance(model_type, str) and model_type.startswith("qwen")
    note = " (a Qwen this version does not know)" if newer else " (not a Qwen)"
    return ConfigError(f"reading {where}", found + note, supported)
