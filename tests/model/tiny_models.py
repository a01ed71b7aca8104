"""Tiny random models of transformers, saved as checkpoints: the oracle of every generation after Qwen-1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: TID251 (the oracle of these tests)
from safetensors.torch import load_file, save_file

import qwenrt

PROMPT = [5, 17, 3, 99, 42, 8, 120]
SMALL = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
QWEN2_MOE = {**MOE, "shared_expert_intermediate_size": 40}


def build(kind: str, changes: dict[str, Any], directory: Path, **save: Any) -> Any:
    """A random model of transformers, saved, with every norm and bias away from its start value."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, "rope_parameters": ROPE, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "gate.weight" in name or "embed" in name:
                parameter.mul_(2)
    model.save_pretrained(directory, **save)
    return model


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def load(directory: Path, **settings: Any) -> qwenrt.LLM:
    return qwenrt.load(directory, device="cpu", progress=False, **{"dtype": "float32", **settings})


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def rewrite(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
    """Other tensors, other keys of config.json (None: removed)."""
    if tensors is not None:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
        )
    path = directory / "config.json"
    merged = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))


def error_against(oracle: Any, directory: Path, **settings: Any) -> float:
    with torch.no_grad():
        wanted = oracle(torch.tensor([PROMPT])).logits[0]
    with load(directory, **settings) as llm:
        return float((llm.logits(PROMPT) - wanted).abs().max())


def linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    names = [
        k.removesuffix(".weight") for k, v in tensors.items() if v.dim() == 2 and k.endswith("_proj.weight")
    ]
    assert names
    return names


def set_weights(oracle: Any, dense: dict[str, torch.Tensor]) -> None:
    missing = oracle.load_state_dict(dense, strict=False)
    assert not missing.unexpected_keys


def reloaded(oracle: Any, exact: dict[str, torch.Tensor], directory: Path) -> Any:
    """The oracle from other weights on disk, which its own loader stacks."""
    place = directory / "exact"
    oracle.save_pretrained(place)
    save_file({k: v.contiguous() for k, v in exact.items()}, place / "model.safetensors", {"format": "pt"})
    return type(oracle).from_pretrained(place, dtype=torch.float32).eval()
