"""The served model as Ollama's clients see it: /api/tags, /api/ps, /api/show and /api/version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qwenrt.config import ModelConfig
from qwenrt.text.dialects.ollama_answers import rfc3339

API_VERSION = "0.13.0"  # the Ollama whose answers these are; clients refuse what looks too old
_FOREVER = 100 * 365 * 24 * 3600.0  # seconds: how long a model stays loaded
_PARAMETERS = {  # fields of SamplingParams by Ollama's names
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}


@dataclass(frozen=True)
class ModelCard:
    """A served model in plain words.

    architecture: as GGUF files name it ("qwen3", "qwen2moe"). parameters: how many. quantization: of the weights, such
    as "int4" or "bfloat16". context_length: tokens. capabilities: of "completion", "tools", "thinking", "embedding".
    size: bytes of the weights. modified: seconds since the epoch. info: what else `show` tells of the architecture, by
    the names of GGUF without the architecture before them. sampling: the model's own fields of SamplingParams. version:
    of this program.
    """

    name: str
    architecture: str
    parameters: int
    quantization: str
    context_length: int
    capabilities: Sequence[str]
    size: int
    modified: float
    info: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits that differ between models: of the name and of what is told about it."""
        told = [
            self.name,
            self.architecture,
            self.parameters,
            self.quantization,
            self.context_length,
            self.size,
        ]
        return hashlib.sha256(json.dumps([*told, sorted(self.info.items())]).encode()).hexdigest()

    @property
    def details(self) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "safetensors",
            "family": self.architecture,
            "families": [self.architecture],
            "parameter_size": human_count(self.parameters),
            "quantization_level": self.quantization,
        }


def architecture(config: ModelConfig) -> str:
    """What GGUF files call a model's architecture: "qwen2moe" for "qwen2_moe"."""
    return config.model_type.replace("_", "")


def architecture_info(config: ModelConfig) -> dict[str, Any]:
    """ModelCard.info of a model."""
    info: dict[str, Any] = {
        "block_count": config.num_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.rotary_dim,
        "vocab_size": config.vocab_size,
    }
    if config.moe is not None:
        info |= {"expert_count": config.moe.num_experts, "expert_used_count": config.moe.top_k}
    return info


def tags(cards: Sequence[ModelCard]) -> dict[str, Any]:
    """GET /api/tags."""
    return {"models": [_listed(card) | {"modified_at": rfc3339(card.modified)} for card in cards]}


def ps(cards: Sequence[ModelCard], now: float, in_vram: bool = False) -> dict[str, Any]:
    """GET /api/ps. now: seconds since the epoch; in_vram: whether the weights are on a device of their own."""
    loaded = [
        _listed(card)
        | {
            "expires_at": rfc3339(now + _FOREVER),
            "size_vram": card.size if in_vram else 0,
            "context_length": card.context_length,
        }
        for card in cards
    ]
    return {"models": loaded}


def show(card: ModelCard) -> dict[str, Any]:
    """POST /api/show."""
    lines = [
        f"{name:<30} {card.sampling[ours]}" for ours, name in _PARAMETERS.items() if ours in card.sampling
    ]
    lines += [
        f"{'stop':<30} {json.dumps(text, ensure_ascii=False)}" for text in card.sampling.get("stop", ())
    ]
    about = {f"{card.architecture}.{name}": value for name, value in card.info.items()}
    return {
        "license": "",
        "modelfile": f"# served by qwenrt {card.version}".rstrip() + f"\nFROM {card.name}\n",
        "parameters": "\n".join(lines),
        "template": "",
        "details": card.details,
        "model_info": {
            "general.architecture": card.architecture,
            "general.basename": card.name,
            "general.parameter_count": card.parameters,
            f"{card.architecture}.context_length": card.context_length,
            **about,
        },
        "capabilities": list(card.capabilities),
        "modified_at": rfc3339(card.modified),
    }


def version(own: str) -> dict[str, str]:
    """GET /api/version. own: of this program."""
    return {"version": API_VERSION, "qwenrt": own}


def human_count(count: int) -> str:
    """7615616512 as "7.6B", 494032768 as "494.03M"."""
    for unit, letter, digits in ((1e9, "B", 1), (1e6, "M", 2), (1e3, "K", 2)):
        if count >= unit:
            return f"{count / unit:.{digits}f}{letter}"
    return str(count)


def _listed(card: ModelCard) -> dict[str, Any]:
    return {
        "name": card.name,
        "model": card.name,
        "size": card.size,
        "digest": card.digest,
        "details": card.details,
    }
