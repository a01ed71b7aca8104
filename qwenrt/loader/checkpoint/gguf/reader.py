"""Read and check the header of one GGUF file before any of its bytes is trusted.

Every count and length is compared with what is left of the file before anything of that size is made, as an attacker
may write any number there. Tensors must follow each other as GGML's own writer lays them out.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from qwenrt.errors import CheckpointError
from qwenrt.files import not_the_file, opened
from qwenrt.loader.checkpoint.header import DOWNLOAD_AGAIN, MAX_TENSORS, Shard, TensorEntry
from qwenrt.ops.ggml_types import BY_ID, NOT_READ, GgmlType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_KEYS = 4096  # released files have about 40
MAX_ELEMENTS = 2**22  # of all arrays together; the largest vocabulary has 250,000 tokens and as many merges
MAX_HEADER_BYTES = 2**28
MAX_NAME_BYTES = 1024
MAX_DEPTH = 2  # arrays of arrays
_LARGEST_DIM = 2**40
_ALIGNMENT = "general.alignment"
_CONVERT_AGAIN = "Convert the model again with a current llama.cpp, or fetch another file of it."
_SCALARS = {  # type -> how struct reads it
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_TYPES = {*_SCALARS, _STRING, _ARRAY}


@dataclass(frozen=True)
class GgufFile:
    """One checked file: its metadata, texts as bytes, and its tensors under GGML's names, sizes outermost first."""

    shard: Shard
    metadata: Mapping[str, object]


def read_gguf(path: Path) -> GgufFile:
    """Check a GGUF file's header and return what it says. No tensor data is read.

    Raises CheckpointError: not a regular file, something else in its place, versions that are not read, counts,
    lengths or types that cannot be, duplicate names, tensors of types that are not read, tensors that overlap, leave a
    hole or pass the end of the file.
    """
    asked = f"cannot read {path.name}"
    try:
        with opened(path, CheckpointError, asked=asked) as file:
            info = os.fstat(file.fileno())
            reading = _Reading(path, file, info.st_size)
            metadata, entries = reading.header()
    except OSError as error:
        found = f"{error.strerror or error} ({path})"
        raise CheckpointError(asked, found, "Check the disk it is on.") from error
    return GgufFile(Shard(path, info.st_size, info.st_mtime_ns, entries), metadata)


class _Reading:
    """One pass over a header, from the file's first byte to its last tensor."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at = 0
        self.elements = 0  # of arrays so far

    def fail(self, found: str, remedy: str = DOWNLOAD_AGAIN) -> NoReturn:
        raise CheckpointError(f"{self.path.name} is not a valid GGUF file", found, remedy)

    # ---- bytes

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            left = self.size - self.at
            self.fail(
                f"{what} at byte {self.at} takes {count} bytes, and {left} are left: it is cut or damaged"
            )
        if self.at + count > MAX_HEADER_BYTES:
            self.fail(f"its header has more than {MAX_HEADER_BYTES} bytes")
        raw = self.file.read(count)
        if len(raw) != count:
            self.fail(f"it ended at byte {self.at + len(raw)} of {self.size}: it was cut while being read")
        self.at += count
        return raw

    def number(self, form: str, what: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """A number of things of at least ``least_bytes`` each that follow."""
        value = self.number("<Q", f"the number of {what}")
        if value > most:
            self.fail(f"it claims {value} {what}; at most {most} are allowed")
        if value * least_bytes > self.size - self.at:
            self.fail(
                f"it claims {value} {what}, and {self.size - self.at} bytes are left: it is cut or damaged"
            )
        return value

    def string(self, what: str, most: int = MAX_HEADER_BYTES) -> bytes:
        length = self.number("<Q", f"the length of {what}")
        if length > most:
            self.fail(f"{what} claims {length} bytes; at most {most} are allowed")
        return self.take(length, what)

    def name(self, what: str) -> str:
        raw = self.string(what, MAX_NAME_BYTES)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is {raw[:40]!r}, which is not UTF-8")

    # ---- the header

    def header(self) -> tuple[dict[str, object], tuple[TensorEntry, ...]]:
        self.magic()
        tensors = self.count("tensors", MAX_TENSORS, 8 + 4 + 8 + 4 + 8)
        keys = self.count("keys", MAX_KEYS, 8 + 4 + 1)
        metadata: dict[str, object] = {}
        for _ in range(keys):
            key = self.name("a key")
            if key in metadata:
                self.fail(f"the key {key[:80]!r} occurs twice")
            metadata[key] = self.value(
                self.number("<I", f"the type of {key[:80]!r}"), f"the value of {key[:80]!r}"
            )
        infos = [self.tensor() for _ in range(tensors)]
        return metadata, self.placed(infos, self.alignment(metadata))

    def magic(self) -> None:
        head = self.file.read(256) or b""
        self.file.seek(0)
        if not head.startswith(MAGIC):
            unlike = not_the_file(head)
            if unlike:
                self.fail(f"it is {unlike[0]} ({self.size} bytes)", unlike[1])
            self.fail(f"it begins with {head[:4]!r}, not with {MAGIC!r}")
        self.take(len(MAGIC), "its magic number")
        version = self.number("<I", "its version")
        if version in VERSIONS:
            return
        if version and version & 0xFFFF == 0:
            self.fail(
                "its numbers are big-endian",
                "Fetch the file for little-endian machines, which all others are.",
            )
        self.fail(f"it is of version {version}; {' and '.join(map(str, VERSIONS))} are read", _CONVERT_AGAIN)

    def alignment(self, metadata: Mapping[str, object]) -> int:
        value = metadata.get(_ALIGNMENT, 32)
        if type(value) is not int or not 1 <= value <= 2**20 or value & value - 1:
            self.fail(f"{_ALIGNMENT} is {value!r:.40}, not a power of two")
        return value

    # ---- values

    def value(self, kind: int, what: str, depth: int = 0) -> object:
        if kind in _SCALARS:
            form = _SCALARS[kind]
            number: int | float = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
            return self.flag(number, what) if kind == _BOOL else number
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, depth)
        self.fail(f"{what} has type {kind}, which the format has not")

    def flag(self, number: int | float, what: str) -> bool:
        if number not in (0, 1):
            self.fail(f"{what} is {number}, not true or false")
        return bool(number)

    def array(self, what: str, depth: int) -> list[object]:
        kind = self.number("<I", f"the type of {what}")
        if kind not in _TYPES:
            self.fail(f"{what} is an array of type {kind}, which the format has not")
        if kind == _ARRAY and depth + 1 >= MAX_DEPTH:
            self.fail(f"{what} is an array nested more than {MAX_DEPTH} deep")
        form = _SCALARS.get(kind)
        least = struct.calcsize(form) if form else 12 if kind == _ARRAY else 8
        count = self.count(f"elements in {what}", MAX_ELEMENTS - self.elements, least)
        self.elements += count
        if kind == _STRING:
            return self.strings(count, what)
        if form is None:
            return [self.array(what, depth + 1) for _ in range(count)]
        numbers: list[object] = list(struct.unpack(f"<{count}{form[1:]}", self.take(count * least, what)))
        return [self.flag(number, what) for number in numbers] if kind == _BOOL else numbers  # type: ignore[arg-type]

    def strings(self, count: int, what: str) -> list[object]:
        """As many calls of `string`, without the calls: a vocabulary has 300,000 strings."""
        found: list[object] = []
        read, length_of, at = self.file.read, struct.Struct("<Q").unpack, self.at
        last = min(self.size, MAX_HEADER_BYTES)
        for _ in range(count):
            raw = read(8)
            length = length_of(raw)[0] if len(raw) == 8 else -1
            at += 8
            if not 0 <= length <= last - at:
                self.at = at
                self.fail(f"a string in {what} at byte {at} claims {length} bytes: it is cut or damaged")
            raw = read(length)
            if len(raw) != length:
                self.fail(f"it ended at byte {at + len(raw)} of {self.size}: it was cut while being read")
            at += length
            found.append(raw)
        self.at = at
        return found

    # ---- tensors

    def tensor(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        """(name, type, sizes outermost first, offset in the data) of the next one."""
        name = self.name("the name of a tensor")
        label = repr(name[:80])
        count = self.number("<I", f"the number of sizes of {label}")
        if not 1 <= count <= MAX_DIMS:
            self.fail(f"tensor {label} has {count} sizes, not 1 to {MAX_DIMS}")
        dims = struct.unpack(f"<{count}Q", self.take(8 * count, f"the sizes of {label}"))
        if not all(1 <= dim <= _LARGEST_DIM for dim in dims) or math.prod(dims) > _LARGEST_DIM:
            self.fail(f"tensor {label} has the sizes {list(dims)}")
        number = self.number("<I", f"the type of {label}")
        if number in NOT_READ:
            kind, why = NOT_READ[number]
            raise CheckpointError(
                f"cannot read {self.path.name}",
                f"tensor {label} is of type {kind}: {why}",
                "Take another file of the model: Q4_K_M, Q5_K_M, Q6_K, Q8_0, BF16 or F16.",
            )
        if number not in BY_ID:
            self.fail(f"tensor {label} is of type {number}, which is unknown", _CONVERT_AGAIN)
        type_ = BY_ID[number]
        if dims[0] % type_.block:
            self.fail(
                f"tensor {label} has rows of {dims[0]} values, and {type_.name} has blocks of {type_.block}"
            )
        return name, type_, dims[::-1], self.number("<Q", f"the place of {label}")

    def placed(
        self, infos: list[tuple[str, GgmlType, tuple[int, ...], int]], alignment: int
    ) -> tuple[TensorEntry, ...]:
        """The tensors in file order, each behind the one before it and all within the file."""
        start = _aligned(self.at, alignment)
        entries: dict[str, TensorEntry] = {}
        at = 0
        for name, type_, shape, offset in sorted(infos, key=lambda info: info[3]):
            if name in entries:
                self.fail(f"the tensor {name[:80]!r} occurs twice")
            if offset != at:
                what = "overlaps the tensor before it" if offset < at else "leaves a hole before it"
                self.fail(f"tensor {name[:80]!r} {what}: it begins at {offset} of the data, not at {at}")
            nbytes = math.prod(shape) // type_.block * type_.nbytes
            end = start + offset + nbytes
            if end > self.size:
                found = f"tensor {name[:80]!r} ends at byte {end}, and the file has {self.size}"
                self.fail(f"it is truncated: {found} ({end - self.size} missing)")
            entries[name] = TensorEntry(name, type_.name, shape, start + offset, end, self.path)
            at = _aligned(offset + nbytes, alignment)
        return tuple(entries.values())


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
