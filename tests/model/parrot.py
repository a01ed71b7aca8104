"""A model that answers with given words whatever it is asked, to see what is made of an answer."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.text.bpe_vocab import (
    CONTROL,
    SHOWN,
    added_tokens,
    merges_of,
    small_bpe_ranks,
    tokenizer_json,
    write,
)

CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\\n' ~ (tools | tojson) ~ '<tool_call><|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
THINKS = CHATML + "{# <think> #}"  # the model may open a thought
IN_THOUGHT = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")  # the prompt has opened it
_HEAD_DIM = 8
_NEWLINE = 10  # the token that every prompt ends with


def parrot(directory: Path, words: list[str], template: str = CHATML) -> Path:
    """A Qwen2 directory. Each word is a token of its own and must be another one; then the turn ends.

    Attention and MLPs give zero and an embedding is one-hot, so that lm_head says which token follows which.
    """
    ranks = small_bpe_ranks()
    shown = list(dict.fromkeys([*SHOWN, *(word for word in words if word.encode() not in ranks)]))
    added = added_tokens(len(ranks), shown)
    ids = {entry["content"]: entry["id"] for entry in added} | {
        w: ranks[w.encode()] for w in words if w.encode() in ranks
    }
    chain = [_NEWLINE, *(ids[word] for word in words), ids["<|im_end|>"]]
    assert len(set(chain)) == len(chain), "every word of the answer must be another"
    size = len(ranks) + len(CONTROL) + len(shown)
    config = {
        "model_type": "qwen2",
        "vocab_size": size,
        "hidden_size": size,
        "head_dim": _HEAD_DIM,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": ids["<|im_end|>"],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_weights(size, chain), str(directory / "model.safetensors"))
    return write(
        directory,
        tokenizer_json=tokenizer_json(ranks, merges_of(ranks), added),
        tokenizer_config_json={"eos_token": "<|im_end|>", "chat_template": template},
    )


def _weights(size: int, chain: list[int]) -> dict[str, Any]:
    layer = "model.layers.0."
    head = torch.zeros(size, size)
    for token, following in pairwise(chain):
        head[following, token] = 1.0
    weights = {
        "model.embed_tokens.weight": torch.eye(size),
        "model.norm.weight": torch.ones(size),
        "lm_head.weight": head,
        f"{layer}self_attn.o_proj.weight": torch.zeros(size, 2 * _HEAD_DIM),
        f"{layer}mlp.gate_proj.weight": torch.zeros(8, size),
        f"{layer}mlp.up_proj.weight": torch.zeros(8, size),
        f"{layer}mlp.down_proj.weight": torch.zeros(size, 8),
    }
    for name, rows in (("q", 2 * _HEAD_DIM), ("k", _HEAD_DIM), ("v", _HEAD_DIM)):
        weights[f"{layer}self_attn.{name}_proj.weight"] = torch.zeros(rows, size)
        weights[f"{layer}self_attn.{name}_proj.bias"] = torch.zeros(rows)
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{layer}{name}.weight"] = torch.ones(size)
    return weights
