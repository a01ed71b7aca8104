"""NVIDIA's and AMD's GPUs, which torch calls "cuda" both."""

from qwenrt.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
