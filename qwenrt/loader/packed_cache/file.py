"""One safetensors file of tensors and a description, written atomically: a reader sees all of it or nothing.

``write`` makes a temporary file beside its target, syncs it and renames it, so that a crash, a full disk or a second
writer leaves the old file or the new one. ``open_file`` maps a file and checks everything before it is used: the
header against a digest of its own, every byte of data against sums of its pages. The first use would read
each page anyway, so the check costs little more than mapping the pages early.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from qwenrt.errors import CheckpointError
from qwenrt.files import is_there, opened
from qwenrt.loader.checkpoint.checkpoint import TORCH_DTYPES
from qwenrt.loader.checkpoint.header import MAX_HEADER_BYTES, TensorEntry, metadata_of, parse_header
from qwenrt.loader.checkpoint.mapping import map_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ALIGNMENT = 64  # bytes: where each tensor begins, so that kernels load whole cache lines
_PAGE_WORDS = 512  # int64 words that share a sum: 4 KiB
_SUMMED_AT_ONCE = 1 << 21  # words
_DIGEST = "0" * 64  # in the place of the digest while it is computed
STORED = {getattr(torch, name): code for code, name in TORCH_DTYPES.items() if hasattr(torch, name)}
# Linux's MADV_POPULATE_READ: all pages at once, which is quicker than a fault for every few; all are read below anyway.
_POPULATE_READ = 22
_PART = ".part"


class Damaged(Exception):
    """The file cannot be used; the text says why."""


@dataclass(frozen=True)
class PackedFile:
    """A checked file: its description, and its tensors as views of private memory-mapped pages."""

    description: dict[str, Any]
    tensors: dict[str, torch.Tensor]


# ---- writing


def write(path: Path, tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> int:
    """Write ``tensors`` (on the CPU) and a description that JSON can hold -> bytes written. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    flat = {name: _bytes_of(tensor) for name, tensor in tensors.items()}
    header = _header(tensors, flat, description)
    size = len(header) + sum(-(-part.numel() // ALIGNMENT) * ALIGNMENT for part in flat.values())
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(f"it takes {size / 2**20:.0f} MiB, {free / 2**20:.0f} are free")
    file, part = _new_part(path)
    try:
        with file:
            _write_all(file.fileno(), memoryview(header))
            for each in flat.values():
                _write_all(file.fileno(), _buffer(each))
                _write_all(file.fileno(), memoryview(bytes(-each.numel() % ALIGNMENT)))
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    _sync_directory(path.parent)
    return size


def _new_part(path: Path) -> tuple[FileIO, Path]:
    """A new file beside ``path``, locked as long as it is being written."""
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PART}")
        file = part.open("xb", buffering=0)
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:  # taken for a leftover before it was locked
                file.close()
                continue
        return file, part


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _header(
    tensors: dict[str, torch.Tensor], flat: dict[str, torch.Tensor], description: dict[str, Any]
) -> bytes:
    """The 8 bytes of length and the JSON, padded so that the data begins aligned."""
    entries: dict[str, Any] = {}
    sums: dict[str, str] = {}
    at = 0
    for number, (name, part) in enumerate(flat.items()):
        tensor, end = tensors[name], at + part.numel()
        entries[name] = {
            "dtype": STORED[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        sums[name] = digest_of(part)
        at = -(-end // ALIGNMENT) * ALIGNMENT
        if at > end:
            entries[f"pad.{number}"] = {"dtype": "U8", "shape": [at - end], "data_offsets": [end, at]}
    texts = {
        "description": json.dumps(description),
        "sums": json.dumps(sums),
        "digest": _DIGEST,
    }
    raw = json.dumps({"__metadata__": texts, **entries}).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    if len(raw) > MAX_HEADER_BYTES:
        raise OSError(f"its header would take {len(raw)} bytes")
    raw = raw.replace(_DIGEST.encode(), hashlib.sha256(raw).hexdigest().encode(), 1)
    return len(raw).to_bytes(8, "little") + raw


def _buffer(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy())  # type: ignore[arg-type,unused-ignore]


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data[: 1 << 28]) :]


def _sync_directory(directory: Path) -> None:
    """Make the new name survive a power cut, where the system supports that."""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove_leftovers(path: Path) -> None:
    """Delete parts of this file whose writers were killed: they are not locked any more."""
    if fcntl is None:
        return
    for part in path.parent.glob(f".{path.name}.*{_PART}"):
        with contextlib.suppress(OSError, CheckpointError), opened(part, CheckpointError) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


# ---- reading


def open_file(path: Path, wanted: dict[str, Any]) -> PackedFile | None:
    """The file if it is there, undamaged, and its description has the items of ``wanted``; None if there is no file.

    Raises Damaged for any other file: nothing of it was used then.
    """
    try:
        if not is_there(path, CheckpointError):
            return None
        with opened(path, CheckpointError) as file:
            mapped = map_file(file, path)
    except CheckpointError as error:
        raise Damaged(error.found) from error
    except (OSError, ValueError) as error:  # an empty file
        raise Damaged(str(error)) from error
    if hasattr(mapped, "madvise"):
        with contextlib.suppress(OSError):  # a system that has no such advice
            mapped.madvise(_POPULATE_READ)
    entries, texts = _checked_header(path, mapped)
    description, sums = (_object(texts, name) for name in ("description", "sums"))
    for name, value in wanted.items():
        if description.get(name) != value:
            raise Damaged(f"it is of another {name}")
    tensors = {}
    for entry in entries:
        if entry.name.startswith("pad."):
            continue
        flat = _view(mapped, entry)
        if sums.get(entry.name) != digest_of(flat):
            raise Damaged(f"{entry.name} is not what was written")
        tensors[entry.name] = flat.view(getattr(torch, TORCH_DTYPES[entry.dtype])).view(entry.shape)
    return PackedFile(description, tensors)


def _checked_header(path: Path, mapped: mmap.mmap) -> tuple[tuple[TensorEntry, ...], dict[str, Any]]:
    length, size = int.from_bytes(mapped[:8], "little"), len(mapped)
    if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise Damaged(f"its {size} bytes are not a safetensors file")
    raw = mapped[8 : 8 + length]
    try:
        entries, texts = parse_header(path, raw, size), metadata_of(raw)
    except CheckpointError as error:
        raise Damaged(error.found) from error
    digest = texts.get("digest")
    blank = raw.replace(str(digest).encode(), _DIGEST.encode(), 1)
    if digest == _DIGEST or hashlib.sha256(blank).hexdigest() != digest:
        raise Damaged("its header does not match its digest")
    return entries, texts


def _object(texts: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        value = json.loads(texts[name])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Damaged(f"its {name} cannot be read") from error
    if not isinstance(value, dict):
        raise Damaged(f"its {name} is no object")
    return value


def _view(mapped: mmap.mmap, entry: TensorEntry) -> torch.Tensor:
    if entry.dtype not in TORCH_DTYPES or not hasattr(torch, TORCH_DTYPES[entry.dtype]):
        raise Damaged(f"torch has no {entry.dtype}")
    if entry.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin)


def digest_of(flat: torch.Tensor) -> str:
    """A digest of bytes, uint8 [n]: of the sum of each 4 KiB of them as 64-bit words.

    Integer sums are the same on every machine and run at the memory's speed. A changed bit changes its page's sum, and
    pages that changed places change the digest; a forgery, or words that changed places within a
    page, are not noticed.
    """
    digest = hashlib.sha256(str(flat.numel()).encode())
    words = flat.numel() // 8
    whole = words // _PAGE_WORDS * _PAGE_WORDS
    for sums in _page_sums(flat[: whole * 8], whole):
        digest.update(_buffer(sums))
    digest.update(_buffer(flat[whole * 8 :]))
    return digest.hexdigest()


def _page_sums(flat: torch.Tensor, words: int) -> Iterator[torch.Tensor]:
    if not words:
        return
    if flat.data_ptr() % 8:  # a view that is not aligned; the data of our files is
        flat = flat.clone()
    pages = flat.view(torch.int64).view(-1, _PAGE_WORDS)
    step = _SUMMED_AT_ONCE // _PAGE_WORDS
    for start in range(0, pages.shape[0], step):
        yield pages[start : start + step].sum(dim=1)
