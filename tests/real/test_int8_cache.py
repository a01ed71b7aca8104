"""What an int8 cache may cost a released model, whose keys have channels that are huge at every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwenrt.backends.cpu import CPUBackend
from qwenrt.config import read_model_config
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from tests.steps import run_step

real: Any = pytest.importorskip("tests.real.conftest")  # where checkpoints lie

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
TEXTS = ("README.md", "README_zh.md", "qwenrt/engine/sampler.py", "csrc/attention_tile.h")
TOKENS = 192  # of each
MOST_DIVERGENCE = 3e-4


@torch.no_grad()
def log_probabilities(model: Qwen, ids: list[int], quantized: bool) -> torch.Tensor:
    """Of every next token, with keys and values in a cache of float32 or of codes -> [len(ids), vocab_size]."""
    c, n, backend = model.config, len(ids), model.backend
    blocks = list(range(-(-n // 16)))
    shape = (c.num_layers, len(blocks), 16, c.num_kv_heads, c.head_dim, torch.float32)
    kv = backend.alloc_kv(*shape, quantized)
    if quantized:
        model.fit_key_codes(kv)
    return run_step(model, kv, ids, [n], [n], [blocks]).logits.log_softmax(-1)


@pytest.mark.parametrize("size", ["0.5B", "1.5B"])
def test_an_int8_cache_costs_next_to_nothing(size: str) -> None:
    directory: Path = real.directory_of(size)
    config, backend = read_model_config(directory), CPUBackend(torch.device("cpu"))
    backend.configure(activations="exact")
    model = Qwen(config, backend, torch.float32)
    load_weights(model, directory, config, backend, torch.float32, progress=False)
    model.bind()
    tokenizer, divergences = Tokenizer.from_dir(directory), []
    for name in TEXTS:
        ids = tokenizer.encode((ROOT / name).read_text(encoding="utf-8"))[:TOKENS]
        wanted, got = (log_probabilities(model, ids, quantized) for quantized in (False, True))
        divergences.append((wanted.exp() * (wanted - got)).sum(-1))
    assert float(torch.cat(divergences).mean()) < MOST_DIVERGENCE
