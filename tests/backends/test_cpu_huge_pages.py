"""Memory for weights and cache: of the size asked for, aligned where it is large, as good where advice is refused."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from qwenrt.backends.cpu import CPUBackend, huge_pages


@pytest.mark.parametrize("nbytes", [0, 1, 4096, (4 << 20) - 1, 4 << 20, (6 << 20) + 12])
def test_a_buffer_has_the_size_asked_for_and_can_be_written(nbytes: int) -> None:
    buffer = huge_pages.huge_buffer(nbytes)
    assert buffer.shape == (nbytes,) and buffer.dtype == torch.uint8
    buffer.fill_(7)
    assert int(buffer.sum()) == 7 * nbytes
    if sys.platform == "linux" and nbytes >= 4 << 20:
        assert buffer.data_ptr() % (2 << 20) == 0


def test_a_system_without_the_advice_gives_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    buffer = huge_pages.huge_buffer(5 << 20).fill_(1)
    assert int(buffer.sum()) == 5 << 20


def test_a_cache_lies_on_huge_pages() -> None:
    cpu = CPUBackend(torch.device("cpu"))
    for layer in cpu.alloc_kv(2, 64, 16, 8, 128, torch.float32, False):
        for side in (layer.k, layer.v):
            assert side.shape == (64, 16, 8, 128) and side.dtype == torch.float32 and side.is_contiguous()
            assert sys.platform != "linux" or side.data_ptr() % (2 << 20) == 0
    codes = cpu.alloc_kv(1, 3, 4, 2, 8, torch.float32, True)[0]
    assert codes.quantized and codes.k.dtype == torch.uint8 and codes.k.shape == (3, 4, 2, 8)
    assert codes.v_zero is not None and codes.v_zero.shape == (3, 4, 2)
