"""The backend of torch's "cuda" devices: ops as defined, steps that decode captured once and replayed."""

from __future__ import annotations

import numpy as np
import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.cuda.graphs import CudaGraphs
from qwenrt.backends.graphs import Graphs


class CudaBackend(Backend):
    """Runs on one NVIDIA or AMD GPU."""

    name = "cuda"
    device_type = "cuda"

    def graphs(self) -> Graphs | None:
        return CudaGraphs(self.device)

    def send(self, values: list[int] | np.ndarray) -> torch.Tensor:
        """As Backend.send, by pinned memory: from other memory the host would wait for the copy."""
        host = (
            torch.tensor(values, dtype=torch.int64) if isinstance(values, list) else torch.from_numpy(values)
        )
        # torch keeps the pinned memory until the copy is done.
        return host.pin_memory().to(self.device, non_blocking=True)

    def default_dtype(self, stored: str | None, nbytes_float32: int, quantized: bool) -> torch.dtype:
        """As Backend.default_dtype. Before sm_80 torch emulates bfloat16, slowly: float16 there."""
        dtype = super().default_dtype(stored, nbytes_float32, quantized)
        if dtype != torch.bfloat16:
            return dtype
        with torch.cuda.device(self.device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16

    def describe(self) -> str:
        return f"plain torch on {torch.cuda.get_device_properties(self.device).name}, decoding captured"
