"""Packed weights kept on disk: the next load of the same checkpoint maps them instead of packing again.

Only the tensors that packing made are written. One that still is the checkpoint's mapped memory (a dense matrix in its
dtype) is named, not copied: the checkpoint has to be there anyway. A file is found by the checkpoint's directory and by
the settings of packing; the content that it was made of is described inside, so that a changed checkpoint replaces it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig
from qwenrt.errors import QwenrtError
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, TensorReader
from qwenrt.loader.checkpoint.digest import add_shard
from qwenrt.loader.checkpoint.inventory import Loadable
from qwenrt.loader.packed_cache import file as packed_file
from qwenrt.loader.packed_cache.file import Damaged
from qwenrt.ops.types import Packed

FORMAT = 1
_PLAIN = (int, float, str, bool)
logger = logging.getLogger("qwenrt")


@dataclass(frozen=True)
class PackedCache:
    """The file of one checkpoint's packed weights. Nothing here raises: without the cache a load is only slower."""

    path: Path
    wanted: dict[str, Any]

    @classmethod
    def of(
        cls,
        directory: Path,
        checkpoint: Checkpoint,
        config: ModelConfig,
        backend: Backend,
        dtype: torch.dtype,
        quantize: dict[str, str | None],
    ) -> PackedCache:
        """The file under ``directory`` for the weights of ``checkpoint`` packed with these settings."""
        settings = {
            "format": FORMAT,
            "qwenrt": str(sys.modules["qwenrt"].__version__),
            "packing": backend.packing_id(),
            "dtype": str(dtype).removeprefix("torch."),
            "quantize": quantize,
        }
        home = checkpoint.directory.resolve()
        key = hashlib.sha256(json.dumps([str(home), settings]).encode()).hexdigest()[:24]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", home.name)[:64].strip(".-") or "model"
        content = _content(checkpoint, config)
        return cls(directory / f"{name}-{key}.safetensors", {**settings, "content": content})

    def load_into(self, model: Loadable, checkpoint: Checkpoint, backend: Backend) -> bool:
        """Set the weights of ``model`` from the file; False where it is absent, damaged or of other content."""
        try:
            found = packed_file.open_file(self.path, self.wanted)
            if found is None:
                return False
            reading = _Restorer(found, TensorReader(checkpoint), backend)
            made = reading.weights(model)
        except (Damaged, QwenrtError) as reason:
            logger.warning("the packed weights in %s are ignored: %s", self.path, reason)
            return False
        for name, weight in made.items():
            if isinstance(weight, Packed):
                model.set_linear(name, weight)
            else:
                model.set_tensor(name, weight)
        logger.info("weights mapped from %s", self.path)
        return True

    def save(self, model: Loadable, reader: TensorReader) -> bool:
        """Write the weights of ``model``, which ``reader`` read, for the next load; False, with a warning, where
        that fails."""
        writing = _Description(reader)
        try:
            weights = {
                name: writing.weight(name, model.get(name))
                for name in (*model.tensor_specs, *model.linear_specs)
            }
            size = packed_file.write(self.path, writing.tensors, {**self.wanted, "weights": weights})
        except (OSError, _NotStorable) as error:
            logger.warning("the packed weights are not kept in %s: %s", self.path.parent, error)
            return False
        logger.info("packed weights kept in %s (%.0f MiB)", self.path, size / 2**20)
        return True


def _content(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """A digest of what a checkpoint holds, without reading all of it.

    Of each file: its name, size, time of change, every tensor's name, dtype, shape and place, and samples of its bytes.
    The time catches any change by a program; the samples catch another file under an old time (cp -p, unpacked
    archives). config.json and quantize_config.json count as what was read from them.
    """
    digest = hashlib.sha256(repr(config).encode())
    for shard in checkpoint.shards:
        digest.update(f"{shard.path.name} {shard.size} {shard.mtime_ns}\n".encode())
        add_shard(digest, shard)
    return digest.hexdigest()


class _NotStorable(Exception):
    """Some weight cannot be described; the text says why."""


@dataclass
class _Description:
    """Weights -> a description of them; their tensors are collected by name, each memory once."""

    reader: TensorReader
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def weight(self, name: str, value: Packed | torch.Tensor) -> dict[str, Any]:
        return self._packed(name, value) if isinstance(value, Packed) else self._tensor(name, value)

    def _packed(self, name: str, packed: Packed) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        private = []
        for key, value in packed.data.items():
            if value is None or isinstance(value, _PLAIN):
                kept[key] = {"plain": value}
            elif isinstance(value, torch.Tensor):
                kept[key] = self._tensor(f"{name}.{key}", value)
            elif isinstance(value, list):
                kept[key] = {"list": [self.weight(f"{name}.{key}.{i}", each) for i, each in enumerate(value)]}
            else:
                private.append(key)
        fields: dict[str, Any] = {"kind": packed.kind, "shape": [packed.out_features, packed.in_features]}
        fields |= {"bits": packed.bits, "group_size": packed.group_size}
        if packed.bias is not None:
            fields["bias"] = self._tensor(f"{name}.bias", packed.bias)
        return {"packed": {**fields, "data": kept, "private": private}}

    def _tensor(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        if not isinstance(tensor, torch.Tensor):
            raise _NotStorable(f"{name} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.dtype not in packed_file.STORED:
            raise _NotStorable(f"{name} is a {tensor.layout} tensor of {tensor.dtype}")
        dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        source = self.reader.origin(tensor)
        if source is not None:
            return {"checkpoint": source, "dtype": dtype, "shape": shape}
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key not in self._names:
            self._names[key] = name
            self.tensors[name] = tensor.detach().to("cpu")
        return {"kept": self._names[key], "dtype": dtype, "shape": shape}


@dataclass
class _Restorer:
    """The inverse of _Description over a checked file; raises Damaged for what does not fit."""

    file: packed_file.PackedFile
    reader: TensorReader
    backend: Backend
    _moved: dict[str, torch.Tensor] = field(default_factory=dict)

    def weights(self, model: Loadable) -> dict[str, Packed | torch.Tensor]:
        """Every weight of ``model``, of the right shape."""
        described = self.file.description.get("weights")
        names = {*model.tensor_specs, *model.linear_specs}
        if not isinstance(described, dict) or described.keys() != names:
            raise Damaged("it describes another model")
        made: dict[str, Packed | torch.Tensor] = {}
        try:
            for name, wanted in model.tensor_specs.items():
                made[name] = tensor = self._tensor(described[name])
                if tuple(tensor.shape) != wanted:
                    raise Damaged(f"{name} has shape {list(tensor.shape)}")
            for name, spec in model.linear_specs.items():
                made[name] = packed = self._packed(described[name]["packed"])
                if (packed.out_features, packed.in_features) != (spec.out_features, spec.in_features):
                    raise Damaged(f"{name} has shape {[packed.out_features, packed.in_features]}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise Damaged(f"its description is invalid ({type(error).__name__}: {error})") from error
        return made

    def _packed(self, fields: dict[str, Any]) -> Packed:
        rows, columns = (int(size) for size in fields["shape"])
        data = {name: self._value(value) for name, value in fields["data"].items()}
        bias = self._tensor(fields["bias"]) if "bias" in fields else None
        packed = Packed(
            str(fields["kind"]), rows, columns, data, bias, int(fields["bits"]), int(fields["group_size"])
        )
        why = self.backend.restore_packed(packed)
        if why is not None:
            raise Damaged(why)
        missing = [name for name in fields["private"] if name not in packed.data]
        if missing:
            raise Damaged(f"{', '.join(missing)} of {packed.kind} is not restored by {self.backend.name}")
        return packed

    def _value(self, value: dict[str, Any]) -> Any:
        if "plain" in value:
            return value["plain"]
        if "list" in value:
            return [self._value(each) for each in value["list"]]
        return self._packed(value["packed"]) if "packed" in value else self._tensor(value)

    def _tensor(self, value: dict[str, Any]) -> torch.Tensor:
        if "checkpoint" in value:
            tensor = self.reader.tensor(value["checkpoint"])
        else:
            name = value["kept"]
            if name not in self._moved:
                self._moved[name] = self.file.tensors[name].to(self.backend.device)
            tensor = self._moved[name]
        if str(tensor.dtype) != f"torch.{value['dtype']}" or list(tensor.shape) != value["shape"]:
            raise Damaged(f"a tensor is {tensor.dtype} {list(tensor.shape)} and described otherwise")
        return tensor
