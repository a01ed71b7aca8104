"""Writing a Qwen-1 directory."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qwenrt.config import ModelConfig
from qwenrt.errors import CheckpointError
from qwenrt.files import opened
from qwenrt.loader.checkpoint.names import table_for
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


def save_atomically(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write to a temporary file and rename it, so that ``path`` is never half written. CheckpointError on failure."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        raise CheckpointError(
            f"writing {path}",
            f"{str(error)[:120]} ({size:.1f} MB were to be written)",
            "See that the disk has room and the directory can be written to, then train again.",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it may be the directory that is gone
            partial.unlink()
