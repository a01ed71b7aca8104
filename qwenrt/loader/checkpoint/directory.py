"""A new checkpoint's directory: weights in shards, one tensor in memory at a time, and all other files of another."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenrt.errors import CheckpointError
from qwenrt.files import opened
from qwenrt.loader.checkpoint.checkpoint import INDEX, TORCH_DTYPES, WHOLE, TensorReader
from qwenrt.loader.checkpoint.writing import write_atomically

SHARD_BYTES = 5 * 10**9
_LARGEST_COPIED = 256 * 2**20  # bytes of a file beside the weights
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack)(\.index\.json)?(\..*)?")
_CODES = {getattr(torch, name): code for code, name in TORCH_DTYPES.items() if hasattr(torch, name)}


@dataclass(frozen=True)
class Planned:
    """A tensor of a new checkpoint, made when it is its turn to be written; ``done`` is called when it is."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    done: Callable[[], object] = tuple

    @classmethod
    def stored(cls, name: str, reader: TensorReader) -> Planned:
        """One of another checkpoint, as it is there."""
        tensor = reader.tensor(name)
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor, lambda: reader.release(name))

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Planned:
        """One that is there, to be stored in ``dtype`` (None: in its own)."""
        stored = dtype or tensor.dtype
        return cls(name, stored, tuple(tensor.shape), lambda: tensor.detach().to(stored))

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(tensors: Iterable[Planned], target: Path, then: str = "train again") -> list[Path]:
    """Files of at most SHARD_BYTES, and an index where there are several -> these files. Older weight files of
    ``target`` go away when all are written. CheckpointError on failure, which asks to make room and ``then`` do so."""
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [WHOLE]
    partial = [target / f"model-{i:05d}.partial.safetensors" for i in range(1, count + 1)]
    for path, shard in zip(partial, shards, strict=True):
        _write_file(path, shard, then)
    for left in target.glob("model*.safetensors*"):  # of another model, where overwriting was asked for
        if not left.name.endswith(".partial.safetensors"):
            left.unlink()
    for path, name in zip(partial, names, strict=True):
        os.replace(path, target / name)
    if count > 1:
        places = {each.name: name for name, shard in zip(names, shards, strict=True) for each in shard}
        total = sum(each.nbytes for shard in shards for each in shard)
        write_json(
            target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        )
    return [target / name for name in names]


def _write_file(path: Path, tensors: list[Planned], then: str) -> None:
    """A safetensors file, tensor by tensor. Those of large elements come first, so that all are aligned."""
    ordered = sorted(tensors, key=lambda each: -each.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for each in ordered:
        offsets = [at, at + each.nbytes]
        header[each.name] = {"dtype": _CODES[each.dtype], "shape": list(each.shape), "data_offsets": offsets}
        at += each.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for each in ordered:
                made = each.make().detach().to("cpu").contiguous()
                assert (made.dtype, tuple(made.shape)) == (each.dtype, each.shape), each.name
                if made.numel():
                    file.write(memoryview(made.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
                each.done()
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise CheckpointError(
            f"writing {path}",
            f"{str(error)[:120]} ({at / 1e6:.1f} MB were to be written)",
            f"See that the disk has room and the directory can be written to, then {then}.",
        ) from error


def copy_files(source: Path, target: Path, leave_out: Collection[str] = ()) -> None:
    """All files of a model's directory but its weights, and but ``leave_out``. Code among them is never run."""
    if source.resolve() == target.resolve():
        return
    for file in sorted(source.iterdir()):
        taken = _WEIGHTS.fullmatch(file.name) or file.name.startswith(".") or file.name in leave_out
        if taken or os.path.isdir(file) or os.path.getsize(file) > _LARGEST_COPIED:
            continue
        with opened(file, CheckpointError) as given, (target / file.name).open("wb") as copy:
            shutil.copyfileobj(given, copy)


def write_json(path: Path, content: dict[str, Any], then: str = "train again") -> None:
    """Replaced whole. ``then``: what to do once there is room, where it cannot be written."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(), then)
