"""Checkpoints written again as GGUF files, with the names and the writer of the package that defines them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors.torch import load_file

from tests.text.bpe_vocab import MERGES, RANKS, added_tokens, form

ARCHITECTURES = {
    "qwen": "QWEN",
    "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def as_gguf(
    directory: Path, path: Path, kind: str = "F32", *, tokenizer: bool = False, **changes: Any
) -> Path:
    """The checkpoint of a directory in one file; the rest as `write_gguf`."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    return write_gguf(path, config, tensors, kind, tokenizer=tokenizer, **changes)


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    kind: str = "F32",
    *,
    tokenizer: bool = False,
    **changes: Any,
) -> Path:
    """A file of a model's config and tensors; ``kind``: the type of its matrices. ``changes`` are keys of the metadata
    (dots as double underscores), None to leave one out."""
    model_type = config["model_type"]
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[model_type])
    name = gguf.MODEL_ARCH_NAMES[arch]
    keys = _qwen1_keys(config) if model_type == "qwen" else _later_keys(config)
    values = {f"{name}.{key}": value for key, value in keys.items()}
    if tokenizer:
        values |= tokenizer_keys()
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", name))
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in _stacked(tensors).items():
        _add_tensor(writer, table.get_name(name, try_suffixes=(".weight", ".bias")), tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def next_as_gguf(tensors: dict[str, torch.Tensor], path: Path, **changes: Any) -> Path:
    """The recorded Qwen3-Next: 2 key heads and 4 value heads of 16, three layers of four with linear attention.
    ``changes``: other keys, __ for each dot, and tensors."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    writer = gguf.GGUFWriter(path, "qwen3next")
    keys: dict[str, Any] = {
        "block_count": 4,
        "context_length": 512,
        "embedding_length": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": 8,
        "rope.freq_base": 1e7,
        "expert_count": 6,
        "expert_used_count": 3,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 64,
        **{name: value for name, value in changed.items() if not isinstance(value, torch.Tensor)},
    }
    for key, value in keys.items():
        if value is not None:
            _add(writer, f"qwen3next.{key}", value)
    plain = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "mlp.gate": "ffn_gate_inp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
        "linear_attn.out_proj": "ssm_out",
        "linear_attn.norm": "ssm_norm",
        "linear_attn.in_proj_ba": "ssm_ba",
    }
    made: dict[str, torch.Tensor] = {
        "token_embd.weight": tensors["model.embed_tokens.weight"],
        "output_norm.weight": tensors["model.norm.weight"] + 1,
        "output.weight": tensors["lm_head.weight"],
    }
    for n in range(4):
        own = {k.removeprefix(f"model.layers.{n}."): v for k, v in tensors.items() if f"layers.{n}." in k}
        for name, value in own.items():
            module = name.removesuffix(".weight")
            if module in plain:
                shifted = module.endswith("norm") and module != "linear_attn.norm"
                made[f"blk.{n}.{plain[module]}.weight"] = value + 1 if shifted else value
        for side in ("gate", "up", "down"):
            experts = [own[f"mlp.experts.{e}.{side}_proj.weight"] for e in range(6)]
            made[f"blk.{n}.ffn_{side}_exps.weight"] = torch.stack(experts)
        if "linear_attn.A_log" in own:
            packed = own["linear_attn.in_proj_qkvz.weight"].view(2, 96, 32)  # q 16, k 16, v 2 x 16, z 2 x 16
            sides = [side.reshape(-1, 32) for side in packed.split((16, 16, 32, 32), dim=1)]
            made[f"blk.{n}.attn_qkv.weight"] = torch.cat(sides[:3])
            made[f"blk.{n}.attn_gate.weight"] = sides[3]
            made[f"blk.{n}.ssm_a"] = -own["linear_attn.A_log"].exp()
            made[f"blk.{n}.ssm_dt.bias"] = own["linear_attn.dt_bias"]
            made[f"blk.{n}.ssm_conv1d.weight"] = own["linear_attn.conv1d.weight"].squeeze(1)
    made |= {name: value for name, value in changed.items() if isinstance(value, torch.Tensor)}
    for name, tensor in made.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_keys() -> dict[str, Any]:
    """A small vocabulary with all that Qwen3 adds to it, and two rows without a token."""
    ordinary = [form(token) for token in sorted(RANKS, key=RANKS.__getitem__)]
    added = added_tokens(len(ordinary))
    size = len(ordinary) + len(added)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [
            *ordinary,
            *(token["content"] for token in added),
            *(f"[PAD{size + i}]" for i in range(2)),
        ],
        "tokenizer.ggml.token_type": [
            *([1] * len(ordinary)),
            *(3 if token["special"] or token["content"].startswith("<|") else 4 for token in added),
            *(5, 4),
        ],
        "tokenizer.ggml.merges": [f"{form(a)} {form(b)}" for a, b in MERGES],
        "tokenizer.ggml.eos_token_id": len(ordinary) + 2,
        "tokenizer.ggml.padding_token_id": len(ordinary),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def raw_file(
    keys: list[tuple[bytes, int, bytes]], tensors: list[tuple[bytes, tuple[int, ...], int, int]], data: bytes
) -> bytes:
    """A file byte by byte: keys are (name, type, value), tensors (name, sizes innermost first, type, offset)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, kind, value in keys:
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
    for name, sizes, kind, offset in tensors:
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(sizes))
        head += struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", kind, offset)
    return head + bytes(-len(head) % 32) + data


def _qwen1_keys(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_rms_epsilon": config.get("layer_norm_epsilon", 1e-6),
        "rope.freq_base": float(config.get("rotary_emb_base", 10000)),
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
    }


def _later_keys(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope.get("rope_theta") or config["rope_theta"]),
        "expert_count": config.get("num_experts") or config.get("num_local_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
    }
    if rope.get("rope_type") == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    return keys


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of one linear in one tensor, as llama.cpp's converter makes them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        before, experts, after = name.partition(".experts.")
        if not experts:
            found[name] = tensor
            continue
        number, _, rest = after.partition(".")
        if number == "0":
            count = sum(other.startswith(f"{before}.experts.") and other.endswith(rest) for other in tensors)
            each = [tensors[f"{before}.experts.{e}.{rest}"] for e in range(count)]
            found[f"{before}.experts.{rest}"] = torch.stack(each)
    return found


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    values = tensor.float().numpy()
    if values.ndim == 2 and values.shape[0] == 1:
        values = values[0]  # the gate of a shared expert
    plain = values.ndim == 1 or kind == "F32" or "ffn_gate_inp" in name or values.shape[-1] % 32 != 0
    type_ = gguf.GGMLQuantizationType[kind]
    if plain or kind == "F16":
        writer.add_tensor(name, values if plain else values.astype(np.float16))
    else:
        writer.add_tensor(name, quantize(values, type_), raw_dtype=type_)


def rounded(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The values that a file of this kind holds."""
    type_ = gguf.GGMLQuantizationType[kind]

    def of(name: str, tensor: torch.Tensor) -> torch.Tensor:
        router = name.endswith((".gate.weight", "shared_expert_gate.weight"))
        plain = tensor.ndim == 1 or kind == "F32" or router or tensor.shape[-1] % 32 != 0
        if plain or kind == "F16":
            return tensor if plain else tensor.half().float()
        return torch.from_numpy(gguf.quants.dequantize(quantize(tensor.float().numpy(), type_), type_))

    return {name: of(name, tensor) for name, tensor in tensors.items()}
