"""The compiled library of csrc/: found, checked and loaded, and what its calls answer."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwenrt.errors import BackendError

ABI = 22
LIBRARY = Path(__file__).parent / {
    "win32": "_qwenrt_cpu.dll",
    "darwin": "_qwenrt_cpu.dylib",
}.get(sys.platform, "_qwenrt_cpu.so")
NOT_BUILT = "_not_built.txt"  # beside it where it is missing: why setup.py could not build it
HOW_TO_BUILD = (
    "install a C++ compiler and reinstall qwenrt, or run `python setup.py build_kernels` in its source"
)
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# Function -> its arguments, after the handle that each call gets.
_COMPUTE: dict[str, list[type[Any]]] = {
    "linear": [_POINTER, _POINTER, _POINTER, _SIZE],
    "pack": [_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _INT],
    "repack": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _INT],
    "quantize": [_POINTER],
    "rounds_dense": [_INT],
    "dense12_serves": [],
    "dense12_pack": [_POINTER, _POINTER],
    "dense12_pack_others": [_POINTER, _POINTER],
    "dense12_unpack": [_POINTER, _POINTER, _SIZE, _SIZE],
    "attention": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _FLOAT, _SIZE],
    "rms_norm": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT],
    "silu_and_mul": [_POINTER, _POINTER, _SIZE, _SIZE],
    "gate_output": [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE],
    "rotary_store": [_POINTER, _POINTER, _SIZE],
    "delta_net": [_POINTER, _POINTER],
    "lora": [_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE],
    "forward": [_POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER],
    "topk": [_POINTER, _SIZE, _FLOAT, _FLOAT, _SIZE, _POINTER, _POINTER, _POINTER],
    "read": [_POINTER, _SIZE],
}

_OK, _NOT_FINITE, _NO_MEMORY, _BAD_ARGUMENT, _NOT_SERVED = range(5)


class KernelsUnavailable(Exception):
    """Why the compiled kernels cannot serve; the text is what doctor prints."""


def load(path: Path, structs: Iterable[type[ctypes.Structure]] = ()) -> ctypes.CDLL:
    """The library with its functions declared. Raises KernelsUnavailable where it is missing, damaged, of another
    version, or has another size for one of ``structs``, whose docstrings begin with their names in csrc."""
    if sys.byteorder != "little":
        raise KernelsUnavailable("the layouts of csrc are little-endian, this machine is not")
    if not path.is_file():
        raise KernelsUnavailable(f"the C++ kernels were not built ({_why_missing(path)}): {HOW_TO_BUILD}")
    try:
        _check_complete(path)
        library = ctypes.CDLL(str(path))
        abi = int(library.qwenrt_abi())
    except (OSError, AttributeError) as error:
        reason = str(error).replace(str(path.parent), "").strip(": /")
        raise KernelsUnavailable(f"{path.name} does not load ({reason}): {HOW_TO_BUILD}") from error
    if abi != ABI:
        raise KernelsUnavailable(f"{path.name} has interface {abi}, expected {ABI}: {HOW_TO_BUILD}")
    _check_sizes(library, path, structs)
    for name, arguments in _COMPUTE.items():
        getattr(library, f"qwenrt_{name}").argtypes = [_POINTER, *arguments]
    library.qwenrt_read.restype = ctypes.c_uint64
    library.qwenrt_open.argtypes = [ctypes.c_char_p, _INT]
    library.qwenrt_open.restype = _POINTER
    library.qwenrt_isa.argtypes = library.qwenrt_threads.argtypes = [_POINTER]
    library.qwenrt_isa.restype = library.qwenrt_isa_at.restype = ctypes.c_char_p
    library.qwenrt_isa_at.argtypes = [_INT]
    library.qwenrt_argmax_finite.argtypes = [_POINTER, _SIZE, _POINTER, _POINTER]
    return library


def _why_missing(path: Path) -> str:
    """What the installation noted; else that the file is not there."""
    try:
        noted = path.with_name(NOT_BUILT).read_text(encoding="utf-8", errors="replace").split("\n")[0].strip()
    except OSError:
        noted = ""
    return noted[:300] if noted.isprintable() and noted else f"{path.name} is missing"


def _check_complete(path: Path) -> None:
    """Refuses an ELF file that was cut short: mapping one can kill the process instead of failing."""
    if path.suffix != ".so":
        return
    header = path.read_bytes()[:64]
    if len(header) < 64 or header[:4] != b"\x7fELF":
        raise KernelsUnavailable(f"{path.name} is not a library: {HOW_TO_BUILD}")
    sections_at = int.from_bytes(header[40:48], "little")
    entry, count = int.from_bytes(header[58:60], "little"), int.from_bytes(header[60:62], "little")
    if path.stat().st_size < sections_at + entry * count:
        raise KernelsUnavailable(f"{path.name} is cut short: {HOW_TO_BUILD}")


def _check_sizes(library: ctypes.CDLL, path: Path, structs: Iterable[type[ctypes.Structure]]) -> None:
    """Refuses a library whose structs are laid out otherwise: it would read past what it is pointed at."""
    library.qwenrt_size_of.argtypes, library.qwenrt_size_of.restype = [ctypes.c_char_p], _SIZE
    for struct in structs:
        name = (struct.__doc__ or "").split(" ", 1)[0]
        theirs, ours = int(library.qwenrt_size_of(name.encode())), ctypes.sizeof(struct)
        if theirs != ours:
            has = "no such struct" if theirs < 0 else f"{theirs} bytes"
            raise KernelsUnavailable(
                f"{path.name} has {has} for {name}, expected {ours} bytes: it was built from another csrc; rebuild it: "
                f"{HOW_TO_BUILD}"
            )


def check(status: int, what: str) -> None:
    """Every call's answer comes here, or to `finite` or `served` first. ``what`` the memory would have been for.

    Raises MemoryError where there was none, and BackendError for any other answer but "done": results are then half
    written, and the caller's arguments were wrong.
    """
    if status == _OK:
        return
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory for {what}")
    found = {_NOT_FINITE: "numbers that are not finite", _BAD_ARGUMENT: "an argument that cannot be"}
    raise BackendError(
        f"a kernel of csrc, which was to give {what}",
        f"it refused {found.get(status, 'its arguments')} (status {status})",
        "This is a fault of qwenrt: please report it. QWENRT_KERNELS=off serves without these kernels.",
    )


def finite(status: int, what: str) -> bool:
    """`check` of a call that may find numbers which are not finite, or too large -> whether it found none."""
    if status != _NOT_FINITE:
        check(status, what)
    return status != _NOT_FINITE


def served(status: int, what: str) -> bool:
    """`check` of a call that some numbers are nothing for -> whether these were."""
    if status != _NOT_SERVED:
        check(status, what)
    return status != _NOT_SERVED
