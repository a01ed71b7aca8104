"""The state of a run in a file, from which one that was cut goes on; and fingerprints of what a run begins with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qwenrt.errors import CheckpointError, shown
from qwenrt.loader.checkpoint.header import read_shard
from qwenrt.loader.checkpoint.writing import save_atomically
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import Packed

STATE_FILE = "training_state.safetensors"  # in the output directory while training goes on
BEST_FILE = "best_step.safetensors"  # the weights of the best step so far
CURVE_FILE = "loss_curve.json"
OUR_FILES = frozenset((STATE_FILE, BEST_FILE, CURVE_FILE))
_HASHED = 2**18  # numbers of a tensor that are hashed


def write_state(
    path: Path, tensors: Mapping[str, torch.Tensor], identity: Mapping[str, object], about: Mapping[str, Any]
) -> None:
    """In one file, which is replaced whole. ``identity``: all that decides the result, by name."""
    on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_atomically(on_host, path, {"identity": json.dumps(identity), "state": json.dumps(about)})


def read_state(path: Path, identity: Mapping[str, object]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, about) of what write_state wrote. CheckpointError where it belongs to another run or is damaged."""
    try:
        read_shard(path)  # a regular file whose header holds what it says
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about, theirs = dict(json.loads(metadata["state"])), dict(json.loads(metadata["identity"]))
    except Exception as error:  # the library has no base class of its own
        raise CheckpointError(
            f"resuming from {path}", f"not readable ({str(error)[:80]})", "Delete it to begin anew."
        ) from error
    ours = json.loads(json.dumps(identity))
    other = [
        f"another {name}" if name in ("data", "model", "held_out") else f"{name}={shown(theirs.get(name))}"
        for name, value in ours.items()
        if name not in theirs or theirs[name] != value
    ]
    if other:
        raise CheckpointError(
            f"resuming from {path}",
            f"it belongs to a run with {', '.join(other)}",
            "Use the same, another output directory, or resume=False (--no-resume).",
        )
    return tensors, about


def fingerprint(model: Qwen) -> str:
    """Of the configuration and the weights that training begins with; of large tensors every n-th number."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in _tensors(model):
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // _HASHED)].cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sampled.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(model: Qwen) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.tensors()
    for name in model.linear_specs:
        packed = model.get(name)
        assert isinstance(packed, Packed)
        if packed.kind != "dense":
            yield from _codes(name, packed)


def _codes(name: str, packed: Packed) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in packed.data.items():
        if isinstance(value, torch.Tensor):
            yield f"{name}.{key}", value
        elif isinstance(value, list):
            for number, part in enumerate(value):
                yield from _codes(f"{name}.{number}", part)
