"""The CPU: kernels of csrc/ through ctypes, and plain torch where csrc was not built."""

from qwenrt.backends.cpu.backend import CPUBackend, kernel_status
from qwenrt.backends.cpu.library import HOW_TO_BUILD

__all__ = ["HOW_TO_BUILD", "CPUBackend", "kernel_status"]
