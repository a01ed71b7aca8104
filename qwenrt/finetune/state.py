"""The state of a run in a file, from which one that was cut goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from qwenrt.errors import CheckpointError, shown
from qwenrt.loader.checkpoint.header import read_shard
from qwenrt.loader.checkpoint.writing import save_atomically

STATE_FILE = "training_state.safetensors"  # in the output directory while training goes on
BEST_FILE = "best_step.safetensors"  # the weights of the best step so far
CURVE_FILE = "loss_curve.json"
OUR_FILES = frozenset((STATE_FILE, BEST_FILE, CURVE_FILE))


def write_state(
    path: Path, tensors: Mapping[str, torch.Tensor], identity: Mapping[str, object], about: Mapping[str, Any]
) -> None:
    """In one file, which is replaced whole. ``identity``: all that decides the result, by name."""
    on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_atomically(on_host, path, {"identity": json.dumps(identity), "state": json.dumps(about)})


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = cast(Any, safe_open(path, framework="pt"))
        self.metadata, self._names = self._file.metadata() or {}, frozenset(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def read_state(
    path: Path, identity: Mapping[str, object]
) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """(tensors, about) of what write_state wrote. CheckpointError where it belongs to another run or is damaged."""
    try:
        read_shard(path)  # a regular file whose header holds what it says
        tensors = _Stored(path)
        metadata = tensors.metadata
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
