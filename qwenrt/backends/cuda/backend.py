"""The backend of torch's "cuda" devices: ops by kernels in Triton or as defined, steps that decode captured once and
replayed."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import torch

from qwenrt.backends.cuda import streaming, tuned
from qwenrt.backends.cuda.graphs import CudaGraphs
from qwenrt.backends.cuda.overrides import TritonBackend
from qwenrt.backends.cuda.profiles import Profile, profile_of
from qwenrt.backends.cuda.tables import TILES, Tiles
from qwenrt.backends.graphs import Graphs
from qwenrt.config import Environment

_THREADS = 256  # of a program: as many as AMD's and Hygon's compilers take for granted


class CudaBackend(TritonBackend):
    """Runs on one NVIDIA or AMD GPU."""

    name = "cuda"
    device_type = "cuda"

    @cached_property
    def profile(self) -> Profile:
        """What the device's architecture is like."""
        return profile_of(self.device)

    @cached_property
    def tiles(self) -> Tiles:
        # Triton compiles products for sm_80 and later; on sm_75 they spill as they do where there are no units.
        units = self.profile.matrix and self.profile.bfloat16
        state_warps = min(TILES.state_warps, _THREADS // self.profile.wave)
        usual = dataclasses.replace(TILES, matrix_units=units, state_warps=state_warps)
        if not self.gluon:
            return usual
        kept = Environment.read().cache_dir
        return tuned.tiles(usual, kept, self.device_name(), tuned.version_of_triton())

    def device_name(self) -> str:
        """As torch says it: "NVIDIA H200"."""
        return str(torch.cuda.get_device_properties(self.device).name)

    @cached_property
    def gluon(self) -> bool:
        # Its tensor products want sm_80 and Triton for NVIDIA.
        modern = self.profile.vendor == "nvidia" and self.profile.bfloat16
        return modern and self.provides("triton") is None and streaming.missing() is None

    def graphs(self) -> Graphs | None:
        return CudaGraphs(self.device, self.profile.graph_sizes)

    def send(self, values: list[int] | np.ndarray) -> torch.Tensor:
        """As Backend.send, by pinned memory: from other memory the host would wait for the copy."""
        host = (
            torch.tensor(values, dtype=torch.int64) if isinstance(values, list) else torch.from_numpy(values)
        )
        # torch keeps the pinned memory until the copy is done.
        return host.pin_memory().to(self.device, non_blocking=True)

    def read(self, memory: torch.Tensor) -> None:
        """As Backend.read, by a kernel that only reads. Without Triton half of it is copied: as many bytes go over the
        bus, and faster than torch sums."""
        if self.provides("triton") is None:
            from qwenrt.backends.cuda.kernels import read

            read.read(memory.view(torch.int32))
        else:
            half = memory[: len(memory) // 2]
            torch.empty_like(half).copy_(half)
        self.synchronize()

    def default_dtype(self, stored: str | None, nbytes_float32: int, quantized: bool) -> torch.dtype:
        """As Backend.default_dtype. Where torch only emulates bfloat16, which it does not tell: float16."""
        if stored in ("float16", "float32"):
            return super().default_dtype(stored, nbytes_float32, quantized)
        return torch.bfloat16 if self.profile.bfloat16 else torch.float16

    def describe(self) -> str:
        name = self.device_name()
        kernels = "plain torch" if self.provides("triton") else "Triton kernels"
        kernels += ", linears in Gluon" if self.gluon else ""
        return f"{kernels} on {name} ({self.profile.arch}), decoding captured"
