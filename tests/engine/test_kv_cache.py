"""The cache's size, and that its int8 form loses less than the one Qwen-1 shipped with."""

from __future__ import annotations

import pytest
import torch

from qwenrt.backends.base import Backend
from qwenrt.config import read_model_config
from qwenrt.engine.kv_cache import KVCache
from qwenrt.errors import CapacityError, ConfigError
from qwenrt.ops import reference
from qwenrt.ops.steps import LayerState
from tests.conftest import GOLDEN
from tests.engine.conftest import make_engine


def shipped_scheme(x: torch.Tensor) -> torch.Tensor:
    """Qwen-1's own quantisation of one call's tokens [T, H, hd]: a range per head for all of them, truncation."""
    high, low = x.amax((0, 2), keepdim=True), x.amin((0, 2), keepdim=True)
    scale = (high - low) / 255
    zero = -low / scale
    codes = (x / scale + zero).clamp(0, 255).to(torch.uint8)
    return scale * (codes.float() - zero)


@pytest.mark.parametrize("kind", ["normal", "outlier channel", "outlier token", "decode"])
def test_int8_error_is_smaller_than_the_shipped_schemes(kind: str) -> None:
    x = torch.randn(1 if kind == "decode" else 64, 4, 32, generator=torch.Generator().manual_seed(1))
    if kind == "outlier channel":
        x[:, :, 3] *= 20
    if kind == "outlier token":
        x[5] *= 20
    ours = reference.dequantize_kv(*reference.quantize_kv(x), torch.float32)
    error, shipped = (ours - x).square().mean(), (shipped_scheme(x) - x).square().mean()
    assert error < 0.5 * shipped
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    assert ((ours - x).abs() <= 0.501 * step).all()


def test_a_constant_row_is_exact() -> None:
    x = torch.full((2, 3, 16), -1.5)
    assert torch.equal(reference.dequantize_kv(*reference.quantize_kv(x), torch.float32), x)


def test_the_bytes_of_a_block_are_those_allocated() -> None:
    for kind in ("auto", "int8"):
        engine = make_engine(num_blocks=5, kv_cache_dtype=kind)
        held = sum(
            tensor.nbytes
            for layer in engine.runner.cache.layers
            for side, tensor in vars(layer).items()
            if tensor is not None and side not in ("k_offset", "k_factor")  # which a layer has once
        )
        assert engine.cache_bytes == held


@pytest.mark.parametrize("kind", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_and_states_are_where_their_layers_are_and_counted(kind: str, dtype: torch.dtype) -> None:
    config, backend = read_model_config(GOLDEN / "qwen3_next"), Backend(torch.device("cpu"))
    cache = KVCache(
        config, backend, dtype, kv_cache_dtype=kind, block_size=16, num_blocks=3, num_spare=2, num_states=7
    )
    assert [isinstance(layer, LayerState) for layer in cache.layers] == [True, True, True, False]
    assert cache.nbytes == sum(tensor.nbytes for layer in cache.layers for tensor in layer.tensors)


def test_unknown_kinds_and_caches_too_small_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype: got 'int3'.*auto, int8"):
        make_engine(kv_cache_dtype="int3")
    with pytest.raises(ConfigError, match="block_size: got 0"):
        make_engine(block_size=0)
    for depth in (-1, 2, True, "1"):
        with pytest.raises(ConfigError, match=f"depth: got {depth!r}.*0 or 1"):
            make_engine(depth=depth)
    for kept in (-1, True, 1.5):
        with pytest.raises(ConfigError, match=f"num_snapshots: got {kept!r}.*>= 0"):
            make_engine(num_snapshots=kept)


def test_memory_that_is_not_there_is_a_typed_error() -> None:
    with pytest.raises(CapacityError, match=r"a KV cache of \d+ blocks of 16 tokens"):
        make_engine(num_blocks=2**44)
    config, size = (
        read_model_config(GOLDEN / "qwen3_next"),
        dict(block_size=16, num_blocks=1, num_states=2**50),
    )
    with pytest.raises(
        CapacityError, match=r"1 blocks of 16 tokens and \d+ states .* a smaller max_num_seqs"
    ):
        KVCache(config, Backend(torch.device("cpu")), torch.float32, kv_cache_dtype="auto", **size)


def test_without_a_size_the_cache_holds_every_sequence() -> None:
    assert make_engine(max_model_len=64, max_num_seqs=3).blocks.num_blocks == 12
