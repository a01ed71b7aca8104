"""The compiled library of csrc/: found, checked and loaded, and what its calls answer."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

from qwenrt.errors import BackendError

ABI = 14
LIBRARY = Path(__file__).parent / {
    "win32": "_qwenrt_cpu.dll",
    "darwin": "_qwenrt_cpu.dylib",
}.get(sys.platform, "_qwenrt_cpu.so")
HOW_TO_BUILD = (
    "install a C++ compiler and reinstall qwenrt, or run `python setup.py build_kernels` in its source"
)
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# Function -> its arguments, after the handle that each call gets.
_COMPUTE: dict[str, list[type[Any]]] = {
    "quant_linear": [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER],
    "pack": [_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _INT],
    "repack": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _INT],
    "quantize": [_POINTER],
    "rounds_dense": [_INT],
    "dense16_linear": [_POINTER] * 4 + [_SIZE] * 3 + [_INT] * 2,
    "dense12_serves": [],
    "dense12_pack": [_POINTER, _POINTER],
    "dense12_pack_others": [_POINTER, _POINTER],
    "dense12_linear": [_POINTER, _POINTER, _POINTER, _SIZE, _INT],
    "dense12_unpack": [_POINTER, _POINTER, _SIZE, _SIZE],
    "attention": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _FLOAT, _SIZE],
    "rms_norm": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT],
    "silu_and_mul": [_POINTER, _POINTER, _SIZE, _SIZE],
    "rotary_store": [_POINTER, _POINTER, _SIZE],
    "decoder": [_POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER],
    "top": [_POINTER, _SIZE, _FLOAT, _FLOAT, _SIZE, _POINTER, _POINTER, _POINTER],
    "read": [_POINTER, _SIZE],
}

_OK, _NOT_FINITE, _NO_MEMORY, _BAD_ARGUMENT, _NOT_SERVED = range(5)


class KernelsUnavailable(Exception):
    """Why the compiled kernels cannot serve; the text is what doctor prints."""


def load(path: Path) -> ctypes.CDLL:
    """The library with its functions declared. Raises KernelsUnavailable where it is missing, damaged or of another
    version."""
    if sys.byteorder != "little":
        raise KernelsUnavailable("the layouts of csrc are little-endian, this machine is not")
    if not path.is_file():
        raise KernelsUnavailable(f"csrc was not built ({path.name} is missing): {HOW_TO_BUILD}")
    try:
        _check_complete(path)
        library = ctypes.CDLL(str(path))
        abi = int(library.qwenrt_abi())
    except (OSError, AttributeError) as error:
        reason = str(error).replace(str(path.parent), "").strip(": /")
        raise KernelsUnavailable(f"{path.name} does not load ({reason}): {HOW_TO_BUILD}") from error
    if abi != ABI:
        raise KernelsUnavailable(f"{path.name} has interface {abi}, expected {ABI}: {HOW_TO_BUILD}")
    for name, arguments in _COMPUTE.items():
        getattr(library, f"qwenrt_{name}").argtypes = [_POINTER, *arguments]
    library.qwenrt_read.restype = ctypes.c_uint64
    library.qwenrt_open.argtypes = [ctypes.c_char_p, _INT]
    library.qwenrt_open.restype = _POINTER
    library.qwenrt_isa.argtypes = library.qwenrt_threads.argtypes = [_POINTER]
    library.qwenrt_isa.restype = library.qwenrt_isa_at.restype = ctypes.c_char_p
    library.qwenrt_isa_at.argtypes = [_INT]
    library.qwenrt_likeliest.argtypes = [_POINTER, _SIZE, _POINTER, _POINTER]
    return library


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
