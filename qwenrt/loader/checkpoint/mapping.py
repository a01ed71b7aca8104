"""Files mapped into memory, and a watch for those of a loaded model being truncated."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from qwenrt.errors import CheckpointError

if TYPE_CHECKING:
    from qwenrt.backends.cpu.mapped_memory import Guarded

_LOOKS_EVERY = 1.0  # seconds; a read past the end of a cut file is noticed at once
_collecting = threading.local()


def map_file(file: BinaryIO, path: Path) -> mmap.mmap:
    """The whole file, copy-on-write; without reserving swap, so that a file larger than memory can be mapped."""
    from qwenrt.backends.cpu.mapped_memory import guard  # which imports torch

    fd = file.fileno()
    if hasattr(mmap, "MAP_PRIVATE"):
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        mapped = mmap.mmap(fd, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    else:
        mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    guarded = guard(mapped, path)
    watch: Watch | None = getattr(_collecting, "watch", None)
    if watch is not None:
        watch.files.append(guarded)
    return mapped


class Watch:
    """Watches the files that a thread maps within `collecting`."""

    def __init__(self) -> None:
        from qwenrt.backends.cpu.mapped_memory import lost_mappings

        self.files: list[Guarded] = []
        self._lost_mappings = lost_mappings
        self._lost, self._next = lost_mappings(), 0.0
        self._error: CheckpointError | None = None  # data that was lost once does not come back

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Files that this thread maps within the block are watched; they are checked at its end."""
        before = getattr(_collecting, "watch", None)
        _collecting.watch = self
        try:
            yield
        finally:
            _collecting.watch = before
        self.check()

    def check(self) -> None:
        """Raise CheckpointError where one of the files was truncated. Cheap: looks only after a fault, or once a
        second."""
        if self._error is not None:
            raise self._error
        lost, now = self._lost_mappings(), time.monotonic()
        if lost != self._lost or now >= self._next:
            self._lost, self._next = lost, now + _LOOKS_EVERY
            try:
                for file in self.files:
                    file.check()
            except CheckpointError as error:
                self._error = error
                raise
