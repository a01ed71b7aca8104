"""What the tests of the CPU's backend share."""

from __future__ import annotations

import pytest
import torch

from qwenrt.backends.cpu import CPUBackend


@pytest.fixture
def cpu() -> CPUBackend:
    """A CPU backend with two threads and the best kernels."""
    made = CPUBackend(torch.device("cpu"))
    made.configure(num_threads=2)
    return made
