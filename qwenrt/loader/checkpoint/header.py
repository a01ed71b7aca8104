"""Read and check the header of one safetensors file before any of its bytes is trusted."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from qwenrt.errors import CheckpointError, shown
from qwenrt.files import not_the_file, opened

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 100_000  # in one file; the largest released Qwen has about 40,000 in all its files
MAX_DIMS = 16
_MAX_PUNCTUATION = 16 * MAX_TENSORS  # commas and colons: bounds the parse to about a second

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

DOWNLOAD_AGAIN = (
    "Download the file again (qwenrt pull resumes) and compare its size with the model page."  # it was cut
)
AS_WRITTEN = "X"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard: ``begin`` and ``end`` are byte offsets from the start of the file. ``transposed``: the
    file holds the transpose of a matrix of this shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    shard: Path
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """One checked safetensors file: its tensors in file order and what it looked like when it was checked."""

    path: Path
    size: int
    mtime_ns: int
    tensors: tuple[TensorEntry, ...]


# first bytes of what is found in the place of a safetensors file, beside what any file may be replaced by
_PICKLED = "qwenrt never unpickles: a pickle can run code. Use a safetensors version of the model."
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it", _PICKLED),
    (b"\x80\x02", "a Python pickle", _PICKLED),
    (b"\x80\x04", "a Python pickle", _PICKLED),
    (b"GGUF", "a GGUF file", 'Give it the name NAME.gguf and load it by that: qwenrt.load("NAME.gguf").'),
    (b'{"', "a JSON document, as a server's error message", DOWNLOAD_AGAIN),
)


def sniff(head: bytes) -> tuple[str, str] | None:
    """(found, remedy) where the first bytes show that a file is something else than safetensors; else None."""
    for start, what, remedy in _FOREIGN:
        as_length = (
            start[:1] == b"\x80" and head[8:9] == b"{"
        )  # 640 or 1152 bytes of header begin like a pickle
        if head.startswith(start) and not as_length:
            return what, remedy
    return not_the_file(head)


def read_shard(path: Path) -> Shard:
    """Check a safetensors file's header and return its tensors. No tensor data is read.

    Raises CheckpointError: not a regular file, empty, a pointer or page in its place, header length out of
    bounds, invalid JSON, duplicate names, unknown dtype, shape and bytes that differ, offsets that overlap,
    leave a hole or pass the end of the file.
    """
    try:
        with opened(path, CheckpointError, asked=f"cannot read {path.name}") as file:
            info = os.fstat(file.fileno())
            entries = _read_entries(path, file, info.st_size)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path.name}",
            f"{error.strerror or error} ({path})",
            "Check the disk it is on.",
        ) from error
    return Shard(path, info.st_size, info.st_mtime_ns, entries)


def _fail(path: Path, found: str, remedy: str = AS_WRITTEN) -> NoReturn:
    raise CheckpointError(f"{path.name} is not a valid safetensors file", found, remedy)


def _read_entries(path: Path, file: BinaryIO, size: int) -> tuple[TensorEntry, ...]:
    head = file.read(256) or b""  # None: nothing can be read without waiting
    if unlike := sniff(head):
        _fail(path, f"it is {unlike[0]} ({size} bytes)", unlike[1])
    if size < 8:
        _fail(path, f"it has {size} bytes; the header length alone takes 8", DOWNLOAD_AGAIN)
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        _fail(path, f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if length < 2 or 8 + length > size:
        _fail(
            path,
            f"its header claims {length} bytes, but {size - 8} follow: the file is truncated or damaged",
            DOWNLOAD_AGAIN,
        )
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        _fail(
            path,
            f"its header ended after {len(raw)} of {length} bytes: the file was cut while being read",
            DOWNLOAD_AGAIN,
        )
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int) -> tuple[TensorEntry, ...]:
    """The tensors of a header ``raw`` (the JSON after the 8 length bytes) in a file of ``size`` bytes."""
    header = _parse_json(path, raw)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        _fail(path, "its __metadata__ is not an object")
    if len(header) > MAX_TENSORS:
        _fail(path, f"it names {len(header)} tensors; at most {MAX_TENSORS} are allowed in one file")
    start = 8 + len(raw)
    entries = [_entry(path, name, value, start) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_layout(path, entries, start, size)
    return tuple(entries)


def read_metadata(path: Path) -> dict[str, Any]:
    """The free texts of a file that read_shard accepted."""
    with opened(path, CheckpointError) as file:
        return metadata_of(file.read(int.from_bytes(file.read(8), "little")))


def metadata_of(raw: bytes) -> dict[str, Any]:
    """The free texts of a header that parse_header accepted."""
    metadata: dict[str, Any] | None = json.loads(raw).get("__metadata__")
    return metadata or {}


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        _fail(path, f"its header starts with {raw[:16]!r} instead of '{{'")
    if raw.count(b",") + raw.count(b":") > _MAX_PUNCTUATION:
        _fail(
            path, f"its header is far too long: more than {MAX_TENSORS} tensors are not allowed in one file"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the name {double[:80]!r} occurs twice")
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        _fail(path, "its header is nested too deeply")
    except ValueError as error:
        _fail(path, f"its header is not valid JSON: {error}")
    if not isinstance(header, dict):
        _fail(path, "its header is not a JSON object")
    return header


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, value: object, start: int) -> TensorEntry:
    label = repr(name[:80])
    if not isinstance(value, dict):
        _fail(path, f"tensor {label} is not described by an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _fail(path, f"tensor {label} has unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        _fail(path, f"tensor {label} has shape {str(shape)[:80]}, not a list of up to {MAX_DIMS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        _fail(path, f"tensor {label} has data_offsets {str(offsets)[:80]}, not two offsets")
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    for dim in shape:
        bits *= dim
    if begin > end or bits != 8 * (end - begin):
        needed = f"{bits / 8:g}" if bits < 2**64 else shown(bits // 8)
        _fail(
            path,
            f"tensor {label}: {dtype} of shape {shape} takes {needed} bytes, "
            f"its data_offsets {offsets} give {end - begin}",
        )
    return TensorEntry(name, dtype, tuple(shape), start + begin, start + end, path)


def _check_layout(path: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    at = start
    for entry in entries:
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else "leaves a hole before it"
            _fail(
                path,
                f"tensor {entry.name[:80]!r} {what}: it begins at {entry.begin - start}, not {at - start}",
            )
        at = entry.end
    if at > size:
        _fail(
            path,
            f"it is truncated: its header describes {at} bytes, the file has {size} ({at - size} missing)",
            DOWNLOAD_AGAIN,
        )
    if at < size:
        _fail(
            path,
            f"it is too long: its header describes {at} bytes, the file has {size} ({size - at} too many)",
        )
