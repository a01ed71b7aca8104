"""Memory-mapped files that may be cut while they are used: csrc/abi/mapped_files.cpp, called from Python.

Without the compiled library nothing is guarded, and such a file ends the process, as the system has it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import weakref
from dataclasses import dataclass
from pathlib import Path

from qwenrt.backends.cpu.library import LIBRARY
from qwenrt.errors import CheckpointError


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, where it is there and knows how; whether its kernels serve does not matter here."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.qwenrt_guard_mapping.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        library.qwenrt_lost_mappings.restype = ctypes.c_int64
        return library
    except (OSError, AttributeError):
        return None


def lost_mappings() -> int:
    """How many reads of guarded memory found that the file had been cut; rises, never falls."""
    library = _library()
    return 0 if library is None else int(library.qwenrt_lost_mappings())


@dataclass(frozen=True)
class Guarded:
    """A mapped file. It does not keep the mapping alive, and is whole where that has gone."""

    path: Path
    place: int
    _mapped: weakref.ref[mmap.mmap]

    def check(self) -> None:
        """Raise CheckpointError where the file was cut: what was read of it since may be zeros."""
        mapped = self._mapped()
        if mapped is None:
            return
        size, now = len(mapped), mapped.size()
        library = _library()
        if now < size or (library is not None and library.qwenrt_mapping_lost(self.place)):
            raise CheckpointError(
                f"using the weights in {self.path}",
                f"the file was cut or overwritten while it was mapped: {size} bytes when it was loaded, {now} now",
                "Load the model again. A file that is in use must be replaced by another one, never written into: "
                "write beside it and rename.",
            )


def guard(mapped: mmap.mmap, path: Path) -> Guarded:
    """Let reads of ``mapped`` find zeros, and `Guarded.check` the reason, where the file is cut."""
    library, place = _library(), -1
    if library is not None:
        first = (ctypes.c_char * 1).from_buffer(mapped)
        place = int(library.qwenrt_guard_mapping(ctypes.addressof(first), len(mapped)))
        del first
        if place >= 0:
            weakref.finalize(mapped, library.qwenrt_unguard_mapping, place).atexit = False
    return Guarded(path, place, weakref.ref(mapped))
