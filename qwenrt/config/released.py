"""The released shapes by name, so that their size can be told without a file."""

from __future__ import annotations

import difflib
import re
from typing import Any

from qwenrt.config.families import parse_model_config
from qwenrt.config.model import ModelConfig

# Hidden size, layers, heads, key-value heads, intermediate size as in config.json (Qwen-1: doubled), vocabulary,
# whether head and embedding are one.
_DENSE = {
    "Qwen-1_8B": (2048, 24, 16, 16, 11008, 151936, False),
    "Qwen-7B": (4096, 32, 32, 32, 22016, 151936, False),
    "Qwen-14B": (5120, 40, 40, 40, 27392, 152064, False),
    "Qwen-72B": (8192, 80, 64, 64, 49152, 152064, False),
    "Qwen1.5-0.5B": (1024, 24, 16, 16, 2816, 151936, False),
    "Qwen1.5-1.8B": (2048, 24, 16, 16, 5504, 151936, False),
    "Qwen1.5-4B": (2560, 40, 20, 20, 6912, 151936, False),
    "Qwen1.5-7B": (4096, 32, 32, 32, 11008, 151936, False),
    "Qwen1.5-14B": (5120, 40, 40, 40, 13696, 152064, False),
    "Qwen1.5-32B": (5120, 64, 40, 8, 27392, 152064, False),
    "Qwen1.5-72B": (8192, 80, 64, 64, 24576, 152064, False),
    "Qwen1.5-110B": (8192, 80, 64, 8, 49152, 152064, False),
    "Qwen2-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen2-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2-72B": (8192, 80, 64, 8, 29568, 152064, False),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2.5-14B": (5120, 48, 40, 8, 13824, 152064, False),
    "Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, False),
    "Qwen2.5-72B": (8192, 80, 64, 8, 29568, 152064, False),
    "QwQ-32B": (5120, 64, 40, 8, 27648, 152064, False),
    "Qwen3-0.6B": (1024, 28, 16, 8, 3072, 151936, True),
    "Qwen3-1.7B": (2048, 28, 16, 8, 6144, 151936, True),
    "Qwen3-4B": (2560, 36, 32, 8, 9728, 151936, True),
    "Qwen3-8B": (4096, 36, 32, 8, 12288, 151936, False),
    "Qwen3-14B": (5120, 40, 40, 8, 17408, 151936, False),
    "Qwen3-32B": (5120, 64, 64, 8, 25600, 151936, False),
}
# The same, then experts, experts a token goes to, their intermediate size, that of the shared expert.
_SPARSE = {
    "Qwen1.5-MoE-A2.7B": (2048, 24, 16, 16, 5632, 151936, False, 60, 4, 1408, 5632),
    "Qwen2-57B-A14B": (3584, 28, 28, 4, 18944, 151936, False, 64, 8, 2560, 20480),
    "Qwen3-30B-A3B": (2048, 48, 32, 4, 6144, 151936, False, 128, 8, 768, 0),
    "Qwen3-235B-A22B": (4096, 94, 64, 4, 12288, 151936, False, 128, 8, 1536, 0),
    "Qwen3-Coder-480B-A35B": (6144, 62, 96, 8, 8192, 151936, False, 160, 8, 2560, 0),
}
# Models with layers of linear attention: hidden size, layers, heads, key-value heads, key and value heads of linear
# attention, intermediate size (of each expert), vocabulary, whether head and embedding are one, experts, experts a
# token goes to. Of 0.8B and 2B the intermediate size, and of 2B the heads, are such that the parameters agree: no file
# was at hand.
_HYBRID = {
    "Qwen3-Next-80B-A3B": (2048, 48, 16, 2, 16, 32, 512, 151936, False, 512, 10),
    "Qwen3.5-0.8B": (1024, 24, 8, 2, 16, 16, 3584, 248320, True, 0, 0),
    "Qwen3.5-2B": (2048, 24, 8, 2, 16, 16, 6144, 248320, True, 0, 0),
    "Qwen3.5-4B": (2560, 32, 16, 4, 16, 32, 9216, 248320, True, 0, 0),
    "Qwen3.5-9B": (4096, 32, 16, 4, 16, 32, 12288, 248320, False, 0, 0),
    "Qwen3.5-27B": (5120, 64, 24, 4, 16, 48, 17408, 248320, False, 0, 0),
    "Qwen3.5-35B-A3B": (2048, 40, 16, 2, 16, 32, 512, 248320, False, 256, 8),
    "Qwen3.5-397B-A17B": (4096, 60, 32, 2, 16, 64, 1024, 248320, False, 512, 10),
}
_SAME_SHAPES = {
    "Qwen3-Coder-Next": "Qwen3-Next-80B-A3B",
    "Qwen3.6-27B": "Qwen3.5-27B",
    "Qwen3.8-27B": "Qwen3.5-27B",
    "Qwen3.6-35B-A3B": "Qwen3.5-35B-A3B",
}
RELEASED = (*_DENSE, *_SPARSE, *_HYBRID, *_SAME_SHAPES)
_BY_LOWER = {name.lower(): name for name in RELEASED}
_POSITIONS = {"qwq": 131072, "qwen3": 40960}  # by the beginning of the name; 32768 for the others
_LONG = 262144  # Qwen3 of July 2025 and Qwen3-Coder
_NAME = re.compile(
    r"(?:qwen/)?(?P<shape>.{1,60}?)(?:-(?:chat|instruct|base|thinking|preview))?(?P<long>-2507)?"
    r"(?P<quant>-(?:gptq-)?int[48]|-awq|-fp8)?",
    re.IGNORECASE,
)


def released_config(name: str) -> ModelConfig | None:
    """The config of a released shape, None for another name.

    A repository's name is understood as well: "Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen-7B-Chat-Int4", "Qwen3-8B-FP8",
    "Qwen2.5-Coder-7B".
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        return None
    asked = parts["shape"].lower()
    plain = asked.replace("-coder-", "-", 1).replace("-math-", "-", 1).replace("qwen-1.8b", "qwen-1_8b")
    shape = _BY_LOWER.get(asked) or _BY_LOWER.get(plain)
    if shape is None:
        return None
    values = _values(shape)
    if shape.startswith("Qwen3") and (parts["long"] or "-coder-" in asked):
        values["max_position_embeddings"] = _LONG
    quant = _quantisation((parts["quant"] or "").lower())
    return parse_model_config(values | ({"quantization_config": quant} if quant else {}))


def _values(shape: str) -> dict[str, Any]:
    """The entries of config.json that say what the network is."""
    shape = _SAME_SHAPES.get(shape, shape)
    if shape in _HYBRID:
        return _hybrid_values(shape)
    row = _DENSE.get(shape) or _SPARSE[shape]
    hidden, layers, heads, kv_heads, intermediate, vocab, tied = row[:7]
    family = "qwen" if shape in list(_DENSE)[:4] else "qwen3" if shape.startswith("Qwen3") else "qwen2"
    beginning = shape.lower().partition("-")[0]
    values: dict[str, Any] = {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": _POSITIONS.get(beginning, 32768),
        "rope_theta": 1e6,
    }
    if family == "qwen":
        return values | {"seq_length": 8192}
    values["torch_dtype"] = "bfloat16"
    if family == "qwen3":
        values["head_dim"] = 128
    if shape in _SPARSE:
        experts, top_k, width, shared = _SPARSE[shape][7:]
        values |= {
            "model_type": f"{family}_moe",
            "num_experts": experts,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": width,
            "norm_topk_prob": family == "qwen3",
        }
        if shared:
            values["shared_expert_intermediate_size"] = shared
    return values


def _hybrid_values(shape: str) -> dict[str, Any]:
    """As _values, of a model with layers of linear attention."""
    hidden, layers, heads, kv_heads, keys, values, width, vocab, tied, experts, top_k = _HYBRID[shape]
    family = "qwen3_next" if shape.startswith("Qwen3-Next") else "qwen3_5_moe" if experts else "qwen3_5"
    found = {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": _LONG,
        "rope_theta": 1e7,
        "torch_dtype": "bfloat16",
        "mtp_num_hidden_layers": 1,
    }
    if not experts:
        return found | {"intermediate_size": width}
    sizes = {"moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    return found | sizes | {"num_experts": experts, "num_experts_per_tok": top_k}


def names_like(name: str) -> str:
    """What an error about an unknown shape advises: the known ones that are spelled alike, else all."""
    alike = difflib.get_close_matches(name.lower().replace(":", "-"), _BY_LOWER, 3)
    close = [_BY_LOWER[lower] for lower in alike]
    return f"Did you mean {' or '.join(close)}?" if close else f"Known shapes are: {', '.join(RELEASED)}."


def _quantisation(suffix: str) -> dict[str, Any] | None:
    """quantization_config of the official releases whose names end so."""
    if not suffix:
        return None
    if suffix == "-fp8":
        return {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if suffix == "-awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 128}
    return {"quant_method": "gptq", "bits": int(suffix[-1]), "group_size": 128}
