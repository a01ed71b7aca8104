"""Blocks of the cache as files of one directory: named by content, checked when read, bounded in bytes.

A block holds what a model computed of somebody's prompt, so its file is its owner's only, in a directory that nobody
else can write. A file is read whole or not at all: it is written beside its place and renamed, its header and its data
have digests, and its header says of which model and which tokens it is. One that is torn, changed or of something else
is removed. Several processes may share a directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from qwenrt.errors import ConfigError
from qwenrt.loader.packed_cache.file import digest_of

_MAGIC = b"qwenrtKV"
_DIGEST = 32  # bytes
_NAME = re.compile(r"[0-9a-f]{64}\.kv")
_PART = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.part")
_STALE = 3600  # seconds after which nobody goes on with a file that was begun
_SLACK = 16  # a sixteenth of the limit is freed at once, and may be written by others before it is noticed
_READ = os.O_RDONLY | sum(
    getattr(os, n, 0) for n in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_WRITE |= sum(getattr(os, n, 0) for n in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))


@dataclass(frozen=True)
class Label:
    """What a block is of: the model (its fingerprint, 32 bytes), the text before it (the name of the block before, or a
    digest of what a text begins with), and its own tokens. ``depth``: blocks before it."""

    model: bytes
    before: bytes
    token_ids: tuple[int, ...]
    depth: int = 0

    @cached_property
    def name(self) -> bytes:
        """32 bytes: of all that its content depends on."""
        return hashlib.blake2b(self.model + self.before + self._tokens, digest_size=_DIGEST).digest()

    @property
    def _tokens(self) -> bytes:
        return struct.pack(f"<{len(self.token_ids)}I", *self.token_ids)

    def header(self, size: int, digest: bytes) -> bytes:
        """What stands before ``size`` bytes of data whose digest it is."""
        count = struct.pack("<IQ", len(self.token_ids), size)
        head = b"".join((_MAGIC, count, self.model, self.before, self._tokens, digest))
        return head + hashlib.blake2b(head, digest_size=_DIGEST).digest()


class BlockFiles:
    """The directory. ``limit``: bytes of its blocks, those of other models included; what was used least lately goes
    first, and of one text its end. Made where it is not there. Raises ConfigError where it is none, another user's, or
    such that others can write in it.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self._fd = _opened(path)
        self._touched: dict[bytes, int] = {}
        self._lock = threading.Lock()  # one thread writes, another reads and touches
        self._written = 0  # since the directory was last looked through
        self._size = 0
        self.prune()

    def close(self) -> None:
        """Note what was used, and let go of the directory."""
        self._apply_touches()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def holds(self, label: Label) -> bool:
        """Whether there is a file of this name; what is in it `read` tells."""
        try:
            return stat.S_ISREG(self._stat(_file_name(label)).st_mode)
        except OSError:
            return False

    def read(self, label: Label, data: torch.Tensor) -> bool:
        """The block's bytes into ``data`` uint8 [n]; False where there is none, or a bad one, which is removed then."""
        name = _file_name(label)
        try:
            fd = self._open(name, _READ)
        except OSError:  # absent, a link, or not ours to read
            return False
        try:
            good = _read_checked(fd, label, data)
        except OSError:
            good = False
        finally:
            os.close(fd)
        if not good:
            self._remove(name)
        return good

    def write(self, label: Label, data: torch.Tensor, used_ns: int | None = None) -> None:
        """Keep a block's bytes uint8 [n] on the CPU; its text was used at ``used_ns``, or now. Raises OSError: a full
        disk, above all."""
        header = label.header(data.numel(), bytes.fromhex(digest_of(data)))
        size = len(header) + data.numel()
        if size > self.limit:
            return
        if self._size + size > self.limit or self._written > self.limit // _SLACK:
            self.prune(size)
        part = f".{label.name.hex()}.{secrets.token_hex(8)}.part"
        try:
            fd = self._open(part, _WRITE)
            try:
                _write_all(fd, memoryview(header))
                _write_all(fd, memoryview(data.numpy()))  # type: ignore[arg-type,unused-ignore]
            finally:
                os.close(fd)
            self._set_time(part, _moment(label, used_ns or time.time_ns()))
            self._rename(part, _file_name(label))
        except OSError:
            self._remove(part)
            raise
        self._size += size
        self._written += size

    def touch(self, labels: list[Label]) -> None:
        """These were used now."""
        now = time.time_ns()
        with self._lock:
            self._touched.update((label.name, _moment(label, now)) for label in labels)

    def prune(self, coming: int = 0) -> None:
        """Look through the directory; where there is no room for ``coming`` bytes more, remove what was used longest
        ago, and some more."""
        self._apply_touches()
        found = sorted(self._listed())
        self._size, self._written = sum(size for _, size, _ in found), 0
        if self._size + coming <= self.limit:
            return
        for _, size, name in found:
            if self._size + coming <= self.limit - self.limit // _SLACK:
                break
            self._remove(name)
            self._size -= size

    def _listed(self) -> Iterator[tuple[int, int, str]]:
        """(time of use, size, name) of each block. What was begun long ago and never finished is removed."""
        with contextlib.suppress(OSError), os.scandir(self.path if self._fd is None else self._fd) as entries:
            for entry in entries:
                part = _PART.fullmatch(entry.name)
                if not part and not _NAME.fullmatch(entry.name):
                    continue
                with contextlib.suppress(OSError):  # another process removed it
                    found = entry.stat(follow_symlinks=False)
                    if part:
                        if time.time() - found.st_mtime > _STALE:
                            self._remove(entry.name)
                    elif stat.S_ISREG(found.st_mode):
                        yield found.st_mtime_ns, found.st_size, entry.name

    def _apply_touches(self) -> None:
        with self._lock:
            touched, self._touched = self._touched, {}
        for name, moment in touched.items():
            with contextlib.suppress(OSError):
                self._set_time(f"{name.hex()}.kv", moment)

    # Names are looked up in the directory that was opened and checked, not again by its path, where the system can.

    def _place(self, name: str) -> str | Path:
        return self.path / name if self._fd is None else name

    def _open(self, name: str, flags: int) -> int:
        return os.open(self._place(name), flags, 0o600, dir_fd=self._fd)

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(self._place(name), dir_fd=self._fd, follow_symlinks=False)

    def _set_time(self, name: str, moment: int) -> None:
        follows = os.utime not in os.supports_follow_symlinks  # Windows knows no other way
        os.utime(self._place(name), ns=(moment, moment), dir_fd=self._fd, follow_symlinks=follows)

    def _rename(self, name: str, to: str) -> None:
        os.replace(self._place(name), self._place(to), src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._place(name), dir_fd=self._fd)


def _file_name(label: Label) -> str:
    return f"{label.name.hex()}.kv"


def _moment(label: Label, used_ns: int) -> int:
    """The time that a file has: a text's beginning counts as used later than its end, and goes later."""
    return used_ns - 1000 * label.depth


def _opened(path: Path) -> int | None:
    """The directory, made and checked; None on a system that cannot look names up in an open one."""
    asked = f"prefix_store={str(path)!r:.200}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            asked, f"it cannot be made ({error})", "Choose a directory that you may write in."
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(asked, "it is no directory", "Choose a directory, not a link to one.")
    if os.open not in os.supports_dir_fd:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            asked, f"it cannot be opened ({error})", "Choose a directory that you may read."
        ) from error
    found = os.fstat(fd)
    wrong = None
    if found.st_uid != os.geteuid():
        wrong = f"it belongs to user {found.st_uid}"
    elif found.st_mode & 0o022:
        wrong = f"others can write in it (mode {stat.S_IMODE(found.st_mode):o})"
    if wrong is not None:
        os.close(fd)
        raise ConfigError(
            asked, wrong, "Prompts are kept there: choose a directory of your own with mode 700."
        )
    return fd


def _read_checked(fd: int, label: Label, data: torch.Tensor) -> bool:
    """Whether an open file is of ``label``, whole and unchanged; its data are in ``data`` then."""
    blank = label.header(data.numel(), bytes(_DIGEST))
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != len(blank) + data.numel():
        return False
    header = bytearray(len(blank))
    if not _read_all(fd, memoryview(header)):
        return False
    digest = bytes(header[-2 * _DIGEST : -_DIGEST])
    if bytes(header) != label.header(data.numel(), digest):
        return False
    if not _read_all(fd, memoryview(data.numpy())):  # type: ignore[arg-type,unused-ignore]
        return False
    return digest_of(data) == digest.hex()


def _read_all(fd: int, into: memoryview) -> bool:
    while into:
        count = os.readv(fd, [into]) if hasattr(os, "readv") else _read_some(fd, into)
        if count == 0:
            return False
        into = into[count:]
    return True


def _read_some(fd: int, into: memoryview) -> int:
    piece = os.read(fd, min(len(into), 1 << 24))
    into[: len(piece)] = piece
    return len(piece)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data[: 1 << 28]) :]
