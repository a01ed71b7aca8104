"""Writing a safetensors file so that it is whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qwenrt.errors import CheckpointError


def save_atomically(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str], then: str = "train again"
) -> None:
    """Write to a temporary file and rename it, so that ``path`` is never half written. CheckpointError on failure,
    which asks the reader to make room and ``then`` do so again."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial, metadata)
        with partial.open("ab") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        raise CheckpointError(
            f"writing {path}",
            f"{str(error)[:120]} ({size:.1f} MB were to be written)",
            f"See that the disk has room and the directory can be written to, then {then}.",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it may be the directory that is gone
            partial.unlink()
