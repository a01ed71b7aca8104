"""The CPU: kernels of csrc/ through ctypes, and plain torch where csrc was not built."""

from qwenrt.backends.cpu.backend import CPUBackend, kernel_status

__all__ = ["CPUBackend", "kernel_status"]
