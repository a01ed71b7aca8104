"""The finished directory: complete, and as AutoGPTQ, GPTQModel, vLLM and transformers read it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qwenrt.config import read_json
from qwenrt.config.layers import LinearSpec
from qwenrt.errors import CheckpointError
from qwenrt.files import opened
from qwenrt.loader.checkpoint.header import read_shard
from qwenrt.loader.checkpoint.writing import save_atomically
from qwenrt.loader.weights import WeightReader
from qwenrt.quantize.finished import FinishedLayers
from qwenrt.quantize.settings import QuantizeSettings

_SHARD = 5 * 10**9  # bytes of a file
_LARGEST_COPIED = 256 * 2**20  # bytes of a file beside the weights
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack)(\.index\.json)?")
_OURS = ("config.json", "quantize_config.json")
_AGAIN = "give the same call again, which goes on"


def write_directory(
    source: Path,
    target: Path,
    reader: WeightReader,
    finished: FinishedLayers,
    quantized: Sequence[LinearSpec],
    settings: QuantizeSettings,
    producer: str,
) -> int:
    """All that ``source`` has, its ``quantized`` linears as ``finished`` holds them -> bytes of the weights."""
    shards = _shards(_tensors(reader, finished, quantized))
    total = _write_shards(shards, target)
    dense, patterns = map(sorted, _left_dense(reader, quantized))
    config = read_json(source / "config.json")
    about = _of_awq(settings, dense) if settings.method == "awq" else _of_gptq(settings, patterns, producer)
    contents = {"config.json": {**config, "quantization_config": about}}
    if settings.method != "awq":
        contents["quantize_config.json"] = about
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (target / name).write_text(text, encoding="utf-8")
    for file in sorted(source.iterdir()):
        taken = _WEIGHTS.fullmatch(file.name) or file.name.startswith(".") or file.name in _OURS
        if taken or os.path.isdir(file) or os.path.getsize(file) > _LARGEST_COPIED:
            continue
        with opened(file, CheckpointError) as given, (target / file.name).open("wb") as copy:
            shutil.copyfileobj(given, copy)
    return total


def _tensors(
    reader: WeightReader, finished: FinishedLayers, quantized: Sequence[LinearSpec]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the new checkpoint: those of the source that are not quantised, as they are, then the layers."""
    replaced = {
        name
        for spec in quantized
        for (_, kind), name in reader.inventory.slots[spec.name].items()
        if kind != "bias"
    }
    kept = {name for slots in reader.inventory.slots.values() for name in slots.values()}
    layers = [finished.path(index) for index in sorted({int(spec.name.split(".")[1]) for spec in quantized})]
    for path in layers:
        replaced |= {entry.name for entry in read_shard(path).tensors}
    for name in sorted({*kept, *reader.inventory.ignored} - replaced):
        yield name, reader.reader.tensor(name)
        reader.reader.release(name)
    for path in layers:
        yield from load_file(path).items()


def _shards(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > _SHARD:
            yield shard
            shard = {}
        shard[name] = tensor.contiguous()
    yield shard


def _write_shards(shards: Iterator[dict[str, torch.Tensor]], target: Path) -> int:
    """One file, or several with an index -> bytes of the tensors."""
    weight_map: dict[int, list[str]] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        save_atomically(shard, target / f"model-{number:05d}.partial.safetensors", {"format": "pt"}, _AGAIN)
        weight_map[number] = list(shard)
        total += sum(tensor.nbytes for tensor in shard.values())
    count = len(weight_map)
    names = {
        number: "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        for number in weight_map
    }
    for left in target.glob("*.safetensors*"):  # of another model, where overwriting was asked for
        if not left.name.endswith(".partial.safetensors"):
            left.unlink()
    for number, name in names.items():
        (target / f"model-{number:05d}.partial.safetensors").replace(target / name)
    if count > 1:
        places = {tensor: names[number] for number, tensors in weight_map.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def _left_dense(reader: WeightReader, quantized: Sequence[LinearSpec]) -> tuple[set[str], set[str]]:
    """Modules of linears in layers that stay dense; and the same as patterns, with the number of the layer left open
    where that is so in all."""
    names = {spec.name for spec in quantized}
    modules: Mapping[bool, set[str]] = {True: set(), False: set()}
    for param, part in reader.inventory.formats:
        slot = reader.inventory.slots[param][part, "weight"]
        modules[param in names].add(slot.removesuffix(".weight"))
    dense = {module for module in modules[False] if re.search(r"\.[0-9]+\.", module)}
    rounded = {_any_number(module) for module in modules[True]}
    patterns = {
        re.escape(module) if _any_number(module) in rounded else _any_number(module) for module in dense
    }
    return dense, patterns


def _any_number(module: str) -> str:
    return re.sub(r"\\\.[0-9]+\\\.", r"\\.[0-9]+\\.", re.escape(module))


def _of_awq(settings: QuantizeSettings, left: Sequence[str]) -> dict[str, Any]:
    """quantization_config, with the keys of AutoAWQ."""
    return {
        "quant_method": "awq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(left) or None,
    }


def _of_gptq(settings: QuantizeSettings, left: Sequence[str], producer: str) -> dict[str, Any]:
    """quantization_config, with the keys of AutoGPTQ and GPTQModel."""
    about: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.act_order == "full",
        "sym": settings.sym,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "damp_percent": settings.damp,
        "true_sequential": settings.sequential,
        "static_groups": settings.act_order == "static",
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "meta": {"quantizer": [f"qwenrt:{producer}"]},
    }
    if left:
        about["dynamic"] = {f"-:{module}": {} for module in left}
    return about
