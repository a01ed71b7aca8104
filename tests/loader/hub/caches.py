"""Caches as other tools leave them, and small models to put into them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.text import bpe_vocab

COMMIT = "89abcdef" * 5
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded_model(directory: Path) -> Path:
    """A Qwen3 of one layer in two shards with an index, a tokenizer, a template and a licence."""
    directory.mkdir(parents=True)
    config = {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 1024, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rope_theta": 1e6,
    }  # fmt: skip
    generation = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinking }}"
    files = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer.json": bpe_vocab.small_json(),
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": template},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "LICENSE").write_text(
        "      Apache License\n   Version 2.0, January 2004\n\n1. Definitions.\n"
    )
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (1024, 32), "model.norm.weight": (32,),
        f"{layer}input_layernorm.weight": (32,), f"{layer}post_attention_layernorm.weight": (32,),
        f"{layer}self_attn.q_proj.weight": (32, 32), f"{layer}self_attn.k_proj.weight": (16, 32),
        f"{layer}self_attn.v_proj.weight": (16, 32), f"{layer}self_attn.o_proj.weight": (32, 32),
        f"{layer}self_attn.q_norm.weight": (8,), f"{layer}self_attn.k_norm.weight": (8,),
        f"{layer}mlp.gate_proj.weight": (64, 32), f"{layer}mlp.up_proj.weight": (64, 32),
        f"{layer}mlp.down_proj.weight": (32, 64),
    }  # fmt: skip
    source = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=source) * 0.1).bfloat16() for name, shape in shapes.items()
    }
    names = list(tensors)
    weight_map = {name: FIRST if i < 2 else SECOND for i, name in enumerate(names)}
    for file in (FIRST, SECOND):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def into_huggingface(
    cache: Path, repo: str, source: Path, *, without: Iterable[str] = (), commit: str = COMMIT
) -> Path:
    """The snapshot that HuggingFace's client makes of the files of ``source``: links into blobs."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for directory in (home / "blobs", home / "refs", snapshot):
        directory.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    for file in source.iterdir():
        if file.name in without:
            continue
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def into_modelscope(cache: Path, repo: str, source: Path, layout: str = "hub/models") -> Path:
    """A model as ModelScope's clients keep it: the older ones in ``layout`` below their cache, with each dot of the
    name written as three underscores and a link that has the name itself; the newer one in layout "snapshots"."""
    if layout == "snapshots":
        directory = cache / "models" / repo.replace("/", "--") / "snapshots" / "master"
        shutil.copytree(source, directory)
        return directory
    owner, _, name = repo.partition("/")
    directory = cache / layout / owner / name.replace(".", "___")
    shutil.copytree(source, directory)
    if "." in name:
        (directory.parent / name).symlink_to(directory.name)
    return directory
