"""Writing a Qwen-1 directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from qwenrt.config import ModelConfig
from qwenrt.errors import CheckpointError
from qwenrt.files import opened
from qwenrt.loader.checkpoint.names import table_for
from qwenrt.loader.checkpoint.writing import save_atomically
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import Packed

_COPIED = ("config.json", "generation_config.json", "tokenizer_config.json", "*.tiktoken")


def dtype_of(config: ModelConfig) -> torch.dtype:
    """The dtype that a new checkpoint is stored in: config.json's, else bfloat16."""
    dtype: torch.dtype = getattr(torch, config.dtype or "bfloat16")
    return dtype


def write_checkpoint(model: Qwen, source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """``model`` as a complete Qwen-1 directory: its weights in ``dtype`` (None: as `dtype_of`
    says) under the checkpoint's names, and the configuration and tokenizer files of ``source``."""
    stored = dtype or dtype_of(model.config)
    names = table_for(model.config.model_type)
    tensors: dict[str, torch.Tensor] = {}
    for param in model.tensor_specs:
        tensor = model.get(param)
        assert isinstance(tensor, torch.Tensor)
        tensors[names.source(param)] = tensor.detach().to(stored).contiguous()
    for param, spec in model.linear_specs.items():
        packed = model.get(param)
        assert isinstance(packed, Packed)
        blocks = names.parts(param)
        rows = [spec.out_features] if len(blocks) == 1 else [count for _, count in spec.parts]
        for kind, whole in (("weight", packed.data["weight"]), ("bias", packed.bias)):
            if whole is not None:
                for block, part in zip(blocks, whole.detach().split(rows), strict=True):
                    tensors[names.source(param, block, kind)] = part.to(stored).contiguous()
    if source.resolve() != target.resolve():
        for pattern in _COPIED:
            for file in sorted(source.glob(pattern)):
                with opened(file, CheckpointError) as given, (target / file.name).open("wb") as copy:
                    shutil.copyfileobj(given, copy)
    save_atomically(tensors, target / "model.safetensors", {"format": "pt"})
