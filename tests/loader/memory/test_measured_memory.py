"""The estimate against the memory a process really takes, for models of 0.1 billion parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwenrt.backends.cpu import CPUBackend
from qwenrt.config import parse_model_config
from qwenrt.loader.memory.footprint import memory_need
from qwenrt.loader.memory.preflight import storage_of

CONTEXT = 2048
DENSE = {
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 3072,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
}
SPARSE = DENSE | {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 320,
    "norm_topk_prob": True,
}
HYBRID = DENSE | {
    "model_type": "qwen3_5_text",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "partial_rotary_factor": 0.25,
}
SERVE = """
import json, sys
from qwenrt import assembly
from qwenrt.loading import load

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024

before, context = peak(), int(sys.argv[2])
settings, users = json.loads(sys.argv[3]), int(sys.argv[4])
assembly.SNAPSHOT_SHARE = 0  # as where memory is short
with load(sys.argv[1], device="cpu", max_model_len=context, max_num_seqs=users, **settings) as llm:
    prompts = [[i * (7919 + n) % llm.config.vocab_size for i in range(context - 20)] for n in range(users)]
    llm.generate(prompt_token_ids=prompts, temperature=0, max_tokens=16, ignore_eos=True)
    print(json.dumps({"peak": peak() - before, "weights": llm.stats()["weight_bytes"]}))
"""


def write_checkpoint(directory: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Random weights under the names of Qwen3's files."""
    (directory / "config.json").write_text(json.dumps(config))
    d, width = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    block = torch.randn(2**20) * 0.02

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return block.repeat(-(-rows * columns // len(block)))[: rows * columns].view(rows, columns).to(dtype)

    def mlp(prefix: str, i: int) -> dict[str, torch.Tensor]:
        shapes = {"gate": (i, d), "up": (i, d), "down": (d, i)}
        return {f"{prefix}.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}

    tensors = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], d),
        "model.norm.weight": torch.ones(d, dtype=dtype),
        "lm_head.weight": matrix(config["vocab_size"], d),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        if "layer_types" in config:
            tensors |= hybrid_layer(layer, n, config, matrix, dtype) | mlp(
                f"{layer}.mlp", config["intermediate_size"]
            )
            continue
        for name, shape in {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}.items():
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = matrix(*shape)
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = torch.ones(width if "self" in name else d, dtype=dtype)
        if "num_experts" not in config:
            tensors |= mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        tensors[f"{layer}.mlp.gate.weight"] = matrix(config["num_experts"], d)
        for expert in range(config["num_experts"]):
            tensors |= mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
    save_file(tensors, directory / "model.safetensors")


def hybrid_layer(
    layer: str, n: int, config: dict[str, Any], matrix: Callable[[int, int], torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Norms and what mixes the tokens of layer ``n`` of Qwen3.5."""
    d, width = config["hidden_size"], config["head_dim"]
    norms = {
        f"{layer}.{name}.weight": torch.zeros(d) for name in ("input_layernorm", "post_attention_layernorm")
    }
    if config["layer_types"][n] == "full_attention":
        q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
        shapes = {"q": (2 * q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        mixer = {f"{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
        mixer |= {f"{name}_norm.weight": torch.zeros(width) for name in "qk"}
        return norms | {f"{layer}.self_attn.{name}": tensor for name, tensor in mixer.items()}
    heads, dim = config["linear_num_value_heads"], config["linear_value_head_dim"]
    keys, values = config["linear_num_key_heads"] * config["linear_key_head_dim"], heads * dim
    shapes = {"qkv": (2 * keys + values, d), "z": (values, d), "b": (heads, d), "a": (heads, d)}
    mixer = {f"in_proj_{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    mixer |= {
        "out_proj.weight": matrix(d, values),
        "conv1d.weight": matrix(2 * keys + values, 4).unsqueeze(1),
    }
    mixer |= {"A_log": torch.zeros(heads), "dt_bias": torch.zeros(heads), "norm.weight": torch.ones(dim)}
    return norms | {f"{layer}.linear_attn.{name}": tensor.to(dtype) for name, tensor in mixer.items()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and trims glibc's heap")
@pytest.mark.parametrize(
    ("config", "stored", "settings", "users"),
    [
        (DENSE, torch.float32, {}, 1),
        (DENSE, torch.bfloat16, {}, 1),
        (DENSE, torch.bfloat16, {"quantize": "int4"}, 1),
        (DENSE, torch.bfloat16, {"quantize": "int8", "kv_cache_dtype": "int8"}, 1),
        (SPARSE, torch.bfloat16, {}, 1),
        (HYBRID, torch.float32, {"quantize": "int4"}, 8),
    ],
    ids=["float32", "bfloat16", "int4", "int8 with an int8 cache", "experts", "states of 8"],
)
def test_within_a_tenth(
    config: dict[str, Any], stored: torch.dtype, settings: dict[str, str], users: int, tmp_path: Path
) -> None:
    context = CONTEXT if users == 1 else CONTEXT // 8
    write_checkpoint(tmp_path, config, stored)
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(tmp_path), str(context), json.dumps(settings), str(users)],
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    storage = storage_of(CPUBackend(torch.device("cpu")), torch.float32, str(stored).removeprefix("torch."))
    need = memory_need(parse_model_config(config), storage, context, users=users, **settings)  # type: ignore[arg-type]
    print(f"{need.total / 2**20:.1f} MiB estimated {need}, {measured['peak'] / 2**20:.1f} measured")
    assert need.weights == pytest.approx(measured["weights"], rel=0.001)
    assert need.total == pytest.approx(measured["peak"], rel=0.1)
