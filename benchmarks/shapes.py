"""The networks that are measured: released shapes of Qwen, and a tiny one that proves the harness in seconds."""

from __future__ import annotations

from qwenrt.config import ModelConfig, parse_model_config
from qwenrt.config.released import released_config

TINY = "tiny"
_TINY = {
    "model_type": "qwen",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 1024,  # as Qwen-1 writes it: twice the width
    "vocab_size": 1024,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def config_of(shape: str) -> ModelConfig:
    """The config of a shape that peers are written for. Needs no torch, so that every engine's interpreter can read
    it."""
    config = parse_model_config(_TINY) if shape == TINY else released_config(shape)
    if config is None or config.model_type not in ("qwen", "qwen3_5"):
        raise SystemExit(
            f"shape {shape!r}: the peers are written for Qwen-1's and llama.cpp for Qwen3.5's dense shapes. Use "
            "Qwen-1_8B, Qwen-7B, Qwen3.5-4B or tiny."
        )
    return config
