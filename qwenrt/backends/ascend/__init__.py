"""Ascend processors through torch_npu: by fused operators where both have them, else by the definitions."""

from qwenrt.backends.ascend.backend import AscendBackend as AscendBackend
from qwenrt.backends.ascend.device import backend_of as backend_of
