"""Tiny models and adapters made with peft, the oracle: run by hand where it is installed (pip install peft accelerate).

`python -m tests.loader.adapters.peft_models` records tests/golden/adapters, which the default suite reads without it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN

RECORDED = GOLDEN / "adapters"
IDS = [[3, 17, 40, 5, 5, 61], [9, 2, 33]]
SHAPE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=1, norm_topk_prob=True
)
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {**SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SHAPE, "head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {**SHAPE, **EXPERTS, "head_dim": 8}),
}
# adapter -> (base, settings of peft's LoraConfig)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all_linear": ("qwen2", dict(r=4, lora_alpha=6, target_modules="all-linear", bias="all")),
    "tied_rows": ("qwen2", dict(r=2, target_modules=["v_proj"], trainable_token_indices=[5, 3, 40])),
    "tied_embedding": (
        "qwen2", dict(r=2, target_modules=["k_proj", "embed_tokens"], ensure_weight_tying=True)
    ),
    "tied_kept": ("qwen2", dict(r=2, target_modules=["k_proj"], modules_to_save=["embed_tokens"])),
    "tied_kept_both": (
        "qwen2", dict(r=2, target_modules=["k_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    ),
    "dora": (
        "qwen3",
        dict(r=4, target_modules=["q_proj", "o_proj", "down_proj"], use_dora=True, use_rslora=True,
             rank_pattern={"q_proj": 2}, alpha_pattern={r"model\.layers\.0\.self_attn\.q_proj": 7}),
    ),
    "embedding": (
        "qwen3",
        dict(r=2, lora_alpha=5, target_modules=["q_proj", "up_proj", "embed_tokens"], modules_to_save=["lm_head"],
             layers_to_transform=None, bias="lora_only"),
    ),
    "b_bias": (
        "qwen3",
        dict(r=2, target_modules=r".*layers\.1\..*(gate|v)_proj|lm_head", lora_bias=True,
             trainable_token_indices={"embed_tokens": [3, 60]}),
    ),
    "norms": ("qwen3", dict(r=2, target_modules=["q_proj"], modules_to_save=["norm", "o_proj"])),
    "experts": (
        "qwen3_moe", dict(r=2, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    ),
    "experts_down": ("qwen3_moe", dict(r=3, target_modules=["k_proj"], target_parameters=["mlp.experts.down_proj"])),
    "router": ("qwen3_moe", dict(r=2, target_modules="all-linear")),
}  # fmt: skip


def base_model(kind: str) -> Any:
    """A random model whose logits are large enough to tell adapters apart."""
    import transformers  # noqa: TID251

    name, shape = BASES[kind]
    torch.manual_seed(len(kind))
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            wide = 0.3 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * wide)
            parameter.copy_(parameter.bfloat16())
    return model.eval()


def save_base(kind: str, directory: Path) -> None:
    base_model(kind).to(torch.bfloat16).save_pretrained(directory)


def adapted(kind: str, settings: dict[str, Any]) -> Any:
    """peft's model with every trainable parameter at random."""
    from peft import LoraConfig, get_peft_model  # noqa: TID251

    model = get_peft_model(base_model(kind), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.05 if "magnitude" in name else 0.2))
    return model.eval()


def peft_logits(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in IDS]


def load_in_peft(base: Path, adapter: Path) -> Any:
    """The adapter of a directory beside the base of another, as peft loads it."""
    import transformers  # noqa: TID251
    from peft import PeftModel  # noqa: TID251

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def record() -> None:
    shutil.rmtree(RECORDED, ignore_errors=True)
    for kind in BASES:
        save_base(kind, RECORDED / kind)
        (RECORDED / kind / "generation_config.json").unlink()
    for name, (kind, settings) in ADAPTERS.items():
        model, directory = adapted(kind, settings), RECORDED / name
        model.save_pretrained(directory)
        (directory / "README.md").unlink()
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text())
        config = {key: value for key, value in config.items() if value not in (None, {}, [], False)}
        for key in ("target_modules", "target_parameters", "modules_to_save"):
            if isinstance(config.get(key), list):
                config[key].sort()
        path.write_text(
            json.dumps({**config, "base_model_name_or_path": kind}, indent=1, sort_keys=True) + "\n"
        )
        save_file(
            {f"logits.{i}": each for i, each in enumerate(peft_logits(model))},
            directory / "logits.safetensors",
        )
        print(name, sorted(load_file(directory / "adapter_model.safetensors"))[:4])


if __name__ == "__main__":
    record()
