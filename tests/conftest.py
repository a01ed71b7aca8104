"""What all tests share: fixed seeds, one thread, no network, the recorded checkpoints."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
DENSE_GOLDENS = ("plain", "ntk_only", "logn_only", "ntk_logn", "big_base")
GPTQ_GOLDENS = ("gptq_int4", "gptq_int8", "gptq_int4_act_order")


@pytest.fixture(autouse=True)
def _same_every_time() -> Iterator[None]:
    """Seed, default dtype and thread count are reset around every test."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _loopback_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not marked `network` may connect to this machine only."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "local"
        if host not in ("local", "127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests open no connection to {host!r}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The directory of tiny checkpoints with recorded logits and tokens."""
    return GOLDEN
