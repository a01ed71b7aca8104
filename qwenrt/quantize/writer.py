"""The finished directory: complete, and as AutoGPTQ, GPTQModel, vLLM and transformers read it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenrt.config import read_json
from qwenrt.config.layers import LinearSpec
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, TensorReader
from qwenrt.loader.checkpoint.directory import Planned, copy_files, write_json, write_shards
from qwenrt.loader.checkpoint.header import read_shard
from qwenrt.loader.weights import WeightReader
from qwenrt.quantize.finished import FinishedLayers
from qwenrt.quantize.settings import QuantizeSettings

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
    tensors = list(_tensors(reader, finished, quantized))
    write_shards(tensors, target, _AGAIN)
    dense, patterns = map(sorted, _left_dense(reader, quantized))
    config = read_json(source / "config.json")
    about = _of_awq(settings, dense) if settings.method == "awq" else _of_gptq(settings, patterns, producer)
    contents = {"config.json": {**config, "quantization_config": about}}
    if settings.method != "awq":
        contents["quantize_config.json"] = about
    for name, content in contents.items():
        write_json(target / name, content)
    copy_files(source, target, _OURS)
    return sum(tensor.nbytes for tensor in tensors)


def _tensors(
    reader: WeightReader, finished: FinishedLayers, quantized: Sequence[LinearSpec]
) -> Iterator[Planned]:
    """Every tensor of the new checkpoint: those of the source that are not quantised, as they are, then the layers."""
    replaced = {
        name
        for spec in quantized
        for (_, kind), name in reader.inventory.slots[spec.name].items()
        if kind != "bias"
    }
    kept = {name for slots in reader.inventory.slots.values() for name in slots.values()}
    shards = [
        read_shard(finished.path(index))
        for index in sorted({int(spec.name.split(".")[1]) for spec in quantized})
    ]
    made = {entry.name: entry for shard in shards for entry in shard.tensors}
    for name in sorted({*kept, *reader.inventory.ignored} - replaced - made.keys()):
        yield Planned.stored(name, reader.reader)
    layers = TensorReader(Checkpoint(finished.directory, tuple(shards), made))
    for name in made:
        yield Planned.stored(name, layers)


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
