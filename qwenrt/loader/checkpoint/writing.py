"""A new checkpoint: the directory it may go to, the room it needs, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qwenrt.errors import CheckpointError, RequestError


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


def write_atomically(path: Path, content: bytes, then: str = "train again") -> None:
    """The same for a small file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        remedy = f"See that the disk has room and the directory can be written to, then {then}."
        raise CheckpointError(
            f"writing {path}", f"{str(error)[:120]} ({len(content)} bytes)", remedy
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def claim_directory(target: Path, overwrite: bool, is_ours: Callable[[Collection[str]], bool]) -> None:
    """Create the directory of a new checkpoint. RequestError where it cannot be written to, or holds other files than
    those of a run that was cut, which ``is_ours`` tells by their names, unless they may be overwritten."""
    asked = f"writing the new checkpoint to {target}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
        names = sorted(file.name for file in target.iterdir())
    except OSError as error:
        remedy = "Give a directory that can be made and written to."
        raise RequestError(asked, str(error.strerror), remedy) from error
    if names and not overwrite and not is_ours(names):
        found = f"it holds {len(names)} files already ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
        raise RequestError(asked, found, "Give a new directory, or overwrite=True (--overwrite).")


def check_room(target: Path, needed: int) -> None:
    """RequestError where the disk of ``target`` has fewer than ``needed`` bytes free: better now than after hours."""
    free = shutil.disk_usage(target).free
    if free < needed:
        raise RequestError(
            f"writing the new checkpoint to {target}",
            f"{needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free",
            "Make room, or give a directory on another disk.",
        )
