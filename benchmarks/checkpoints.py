"""Checkpoint directories of random bfloat16 weights, as qwenrt and the builder of ONNX models read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shapes import config_of

if TYPE_CHECKING:
    import torch

    from qwenrt.loader.checkpoint.names import NameTable


def qwen1_checkpoint(shape: str, cache: Path) -> Path:
    """A Qwen-1 directory without a tokenizer, made in ``cache`` unless it is there."""
    from qwenrt.loader.checkpoint.names import QWEN1

    c = config_of(shape)
    config = {
        "model_type": "qwen",
        "intermediate_size": 2 * c.intermediate_size,
        "seq_length": c.train_length,
        "bf16": True,
    }
    return _written(cache / f"{shape}-checkpoint", shape, config, QWEN1)


def qwen2_checkpoint(shape: str, directory: Path) -> Path:
    """The same network as Qwen2 writes it, with a tokenizer of a few words, for tools that insist on one."""
    from qwenrt.loader.checkpoint.names import QWEN2

    c = config_of(shape)
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "intermediate_size": c.intermediate_size,
        "num_key_value_heads": c.num_heads,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.rms_norm_eps,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    _written(directory, shape, config, QWEN2)
    words = {f"word{n}": n for n in range(16)}
    tokenizer = {
        "version": "1.0",
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "word0"},
        "added_tokens": [],
    }
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "word1", "eos_token": "word2"}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(names | {"unk_token": "word0"}))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    return directory


def _written(directory: Path, shape: str, config: dict[str, Any], names: NameTable) -> Path:
    if not (directory / "config.json").exists():
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(_tensors(shape, names)), directory / "model.safetensors", metadata={"format": "pt"})
        c = config_of(shape)
        common = {
            "hidden_size": c.hidden_size,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.max_position_embeddings,
            "tie_word_embeddings": False,
        }
        (directory / "config.json").write_text(json.dumps(common | config))
    return directory


def _tensors(shape: str, names: NameTable) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under the name that a checkpoint of this generation gives it."""
    import torch

    c = config_of(shape)
    torch.manual_seed(0)
    yield names.source("embed_tokens"), _matrix(c.vocab_size, c.hidden_size)
    yield names.source("lm_head"), _matrix(c.vocab_size, c.hidden_size)
    for n in range(c.num_layers):
        linears = {
            "qkv_proj": (3 * c.hidden_size, c.hidden_size),
            "o_proj": (c.hidden_size, c.hidden_size),
            "gate_up_proj": (2 * c.intermediate_size, c.hidden_size),
            "down_proj": (c.hidden_size, c.intermediate_size),
        }
        for linear, (rows, columns) in linears.items():
            parts = names.parts(f"layers.{n}.{linear}")
            for part in parts:
                size = rows // len(parts)
                yield names.source(f"layers.{n}.{linear}", part), _matrix(size, columns)
                if linear == "qkv_proj":
                    bias = torch.zeros(size, dtype=torch.bfloat16)
                    yield names.source(f"layers.{n}.{linear}", part, "bias"), bias
        for norm in ("input_norm", "post_norm"):
            yield names.source(f"layers.{n}.{norm}"), torch.ones(c.hidden_size, dtype=torch.bfloat16)
    yield names.source("norm"), torch.ones(c.hidden_size, dtype=torch.bfloat16)


def _matrix(rows: int, columns: int) -> torch.Tensor:
    """Random weights of size 1/sqrt(columns). 512 rows repeat, which makes no difference to a kernel's speed."""
    import torch

    block = (torch.randn(min(rows, 512), columns) / columns**0.5).bfloat16()
    return block.repeat(-(-rows // 512), 1)[:rows].contiguous()
