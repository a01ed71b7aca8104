"""Files known again by samples of their bytes, without reading all of them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from qwenrt.errors import CheckpointError
from qwenrt.files import opened
from qwenrt.loader.checkpoint.checkpoint import Checkpoint
from qwenrt.loader.checkpoint.header import Shard

if TYPE_CHECKING:
    from hashlib import _Hash

_SAMPLES = 16  # places of each shard that are looked at
_SAMPLE = 64 * 1024  # bytes at each


def add_shard(digest: _Hash, shard: Shard) -> None:
    """Every tensor's name, dtype, shape and place in a file, and samples of its bytes."""
    for entry in shard.tensors:
        digest.update(f"{entry.name} {entry.dtype} {entry.shape} {entry.begin} {entry.end}\n".encode())
    with opened(shard.path, CheckpointError) as file:
        for i in range(_SAMPLES):
            file.seek(max(0, shard.size - _SAMPLE) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))


def digest_of(checkpoint: Checkpoint) -> str:
    """What tells one checkpoint from another, wherever its files lie and whenever they were written."""
    digest = hashlib.sha256()
    for shard in checkpoint.shards:
        add_shard(digest, shard)
    return digest.hexdigest()
