"""What the tests of the CPU's backend share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qwenrt.backends.cpu import CPUBackend


@pytest.fixture
def cpu() -> Iterator[CPUBackend]:
    """A CPU backend with two threads and the best kernels; what it set for the process is set back."""
    made = CPUBackend(torch.device("cpu"))
    made.configure(num_threads=2)
    yield made
    CPUBackend(torch.device("cpu")).configure()


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    """For tests that choose the kernels' threads themselves."""
    yield
    CPUBackend(torch.device("cpu")).configure()
