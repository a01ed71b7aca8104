"""A trained network as a complete directory, which qwenrt, transformers and vLLM read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from qwenrt.config import ModelConfig, read_json
from qwenrt.config.layers import file_rows, is_zero_centred
from qwenrt.errors import ConfigError
from qwenrt.files import is_there
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, TensorReader
from qwenrt.loader.checkpoint.directory import Planned, copy_files, write_json, write_shards
from qwenrt.loader.checkpoint.names import table_for
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import Packed
from qwenrt.text.tokenizer.vocabulary import IM_END

_BUFFERS = re.compile(r".*(inv_freq|masked_bias|logn_tensor|attn\.bias)")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dtype_of(config: ModelConfig) -> torch.dtype:
    """The dtype that a new checkpoint is stored in: config.json's, else bfloat16."""
    dtype: torch.dtype = getattr(torch, config.dtype or "bfloat16")
    return dtype


def write_checkpoint(
    model: Qwen,
    source: Path,
    target: Path,
    checkpoint: Checkpoint | None = None,
    values: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """``model`` as a complete directory -> its weight files. Weights go under the names of the generation, each in the
    dtype that it has in ``checkpoint``, what was trained, else in ``dtype`` (None: as `dtype_of` says); what that has
    besides and no text network needs, as a vision tower, is taken as it is. ``values``: more exact ones than the
    model's, by name. All other files are copied from ``source``; code among them is never run."""
    copy_files(source, target)
    entries = {} if checkpoint is None else checkpoint.tensors
    default = dtype or dtype_of(model.config)
    tensors = _tensors(model, values or {}, _prefix(model.config, checkpoint))
    stored = (
        Planned.of(
            name, tensor, default if name not in entries else _DTYPES.get(entries[name].dtype, default)
        )
        for name, tensor in tensors
    )
    return write_shards(_with_the_rest(stored, model, checkpoint), target)


def _tensors(
    model: Qwen, values: dict[str, torch.Tensor], prefix: tuple[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under its name in files, as files have it."""
    names, config = table_for(model.config.model_type), model.config

    def named(param: str, part: str = "", kind: str = "weight") -> str:
        name = names.source(param, part, kind)
        return prefix[1] + name.removeprefix(prefix[0]) if name.startswith(prefix[0]) else name

    for param in model.tensor_specs:
        tensor = model.get(param)
        assert isinstance(tensor, torch.Tensor)
        value = values.get(param, tensor).detach()
        yield named(param), value.float() - 1 if is_zero_centred(config, param) else value
    for param, spec in model.linear_specs.items():
        if param == "lm_head" and config.tie_word_embeddings:
            continue
        packed = model.get(param)
        assert isinstance(packed, Packed)
        blocks = names.parts(param)
        if len(blocks) != len(spec.parts):  # the file has it in one piece
            blocks = [""]
        rows = [spec.out_features] if len(blocks) == 1 else [count for _, count in spec.parts]
        for kind, whole in (("weight", packed.data["weight"]), ("bias", packed.bias)):
            if whole is None:
                continue
            value = values.get(f"{param}.{kind}", whole).detach()
            order = file_rows(config, param, blocks[0]) if len(blocks) == 1 else None
            if order is not None:
                as_in_file = torch.empty_like(value)
                as_in_file[torch.tensor(order, device=value.device)] = value
                value = as_in_file
            for block, part in zip(blocks, torch.split(value, rows), strict=True):
                yield named(param, block, kind), part


def _prefix(config: ModelConfig, checkpoint: Checkpoint | None) -> tuple[str, str]:
    """(what names of the generation begin with, what those of this checkpoint do)."""
    table = table_for(config.model_type)
    within = [
        p for p in table.other_prefixes if checkpoint and any(n.startswith(p) for n in checkpoint.tensors)
    ]
    return table.prefix, within[0] if within else table.prefix


def _with_the_rest(
    tensors: Iterable[Planned], model: Qwen, checkpoint: Checkpoint | None
) -> Iterator[Planned]:
    yield from tensors
    if checkpoint is None:
        return
    reader, table = TensorReader(checkpoint), table_for(model.config.model_type)
    for name in checkpoint.tensors:
        slot = table.locate(name)
        if slot is not None and slot.ignored and not _BUFFERS.fullmatch(name):
            yield Planned.stored(name, reader)


def make_it_chat(target: Path, model_type: str, im_end_id: int) -> str | None:
    """Let a base model that was trained on conversations be talked to, and end its turns -> what was changed, in words,
    or None. Qwen-1: chat_format "chatml"; later ones: <|im_end|> ends texts."""
    path = target / "generation_config.json"
    generation: dict[str, Any] = read_json(path) if is_there(path, ConfigError) else {}
    if model_type == "qwen":
        if generation.get("chat_format") == "chatml":
            return None
        write_json(path, {**generation, "chat_format": "chatml", "eos_token_id": im_end_id})
        return 'generation_config.json: chat_format is "chatml" now, and <|im_end|> ends a text'
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if im_end_id in ends:
        return None
    write_json(path, {**generation, "eos_token_id": [im_end_id, *ends]})
    about = target / "tokenizer_config.json"
    if is_there(about, ConfigError):
        write_json(about, {**read_json(about), "eos_token": IM_END})
    return "generation_config.json and tokenizer_config.json: <|im_end|> ends a text now"
