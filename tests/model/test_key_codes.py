"""Where an int8 cache lays its codes over keys: offsets and factors from the weights, whatever form these have."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from qwenrt.backends.base import Backend
from qwenrt.config import read_model_config
from qwenrt.loader.weights import load_weights
from qwenrt.model import key_codes
from qwenrt.model.qwen import Qwen
from qwenrt.ops import quantization
from qwenrt.ops.steps import LayerKV
from qwenrt.ops.types import CanonicalWeight, Packed
from tests.model.tiny_models import build

CPU = Backend(torch.device("cpu"))
HEADS, KV_HEADS, HEAD_DIM, WIDTH = 6, 2, 16, 96


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen2, whose keys have biases, and Qwen3, whose keys are normed."""
    made = {}
    for kind in ("Qwen2", "Qwen3"):
        made[kind] = tmp_path_factory.mktemp(kind)
        shape = {"hidden_size": WIDTH, "head_dim": HEAD_DIM, "max_position_embeddings": 4096}
        build(kind, {**shape, "num_hidden_layers": 1}, made[kind])
    return made


def model_of(directory: Path, dtype: torch.dtype = torch.float32) -> Qwen:
    config = read_model_config(directory)
    model = Qwen(config, CPU, dtype)
    load_weights(model, directory, config, CPU, dtype, progress=False)
    model.bind()
    return model


def fitted(model: Qwen) -> LayerKV:
    """The first layer's cache."""
    c = model.config
    shape = (c.num_layers, 1, 16, c.num_kv_heads, c.head_dim)
    kv = CPU.alloc_kv(*shape, model.dtype, True)
    model.fit_key_codes(kv)
    return kv[0]


def with_qkv(model: Qwen, packed: Packed) -> Qwen:
    model.set_linear("layers.0.qkv_proj", packed)
    model.bind()
    return model


def dense_qkv(model: Qwen) -> tuple[torch.Tensor, torch.Tensor]:
    packed = model.weights.packed("layers.0.qkv_proj")
    assert packed.bias is not None
    return packed.data["weight"], packed.bias


def with_key_bias(directory: Path, bias: torch.Tensor) -> Qwen:
    """The model with ``bias`` [KVH, hd] on its keys."""
    model = model_of(directory)
    weight, old = dense_qkv(model)
    first = HEADS * HEAD_DIM
    new = old.clone()
    new[first : first + bias.numel()] = bias.flatten()
    return with_qkv(model, CPU.pack_linear(CanonicalWeight(dense=weight, bias=new), torch.float32))


def test_what_turns_slowly_is_taken_away_by_the_offset(directories: dict[str, Path]) -> None:
    """Theta is 1e6: up to position 4096 the last of eight pairs turns by 4096 / 1e6 ** (7 / 8) = 0.02."""
    bias = torch.zeros(KV_HEADS, HEAD_DIM)
    bias[0, 7], bias[1, 15] = 150, -90  # both of the last pair
    kv = fitted(with_key_bias(directories["Qwen2"], bias))
    assert kv.k_offset is not None and kv.k_factor is not None
    torch.testing.assert_close(kv.k_offset[0, 7], torch.tensor(150.0), rtol=2e-3, atol=0)
    torch.testing.assert_close(kv.k_offset[1, 15], torch.tensor(-90.0), rtol=2e-3, atol=0)
    assert kv.k_offset[:, :7].abs().max() < 1e-3  # no bias, no offset


def test_the_size_of_what_turns_is_taken_away_by_the_factor(directories: dict[str, Path]) -> None:
    bias = torch.zeros(KV_HEADS, HEAD_DIM)
    bias[0, 1] = 200  # turns 4096 / 1e6 ** (1 / 8) / 2 pi = 116 times
    kv = fitted(with_key_bias(directories["Qwen2"], bias))
    assert kv.k_offset is not None and kv.k_factor is not None
    assert kv.k_offset[0].abs().max() < 20  # a tenth of the bias: no place is its middle
    assert bool((kv.k_factor[0, [1, 9]] == 1).all()) and bool((kv.k_factor[0, 2:8] <= 1 / 4).all())


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_the_largest_factor_is_one_and_none_is_tiny(directories: dict[str, Path], kind: str) -> None:
    model = model_of(directories[kind])
    if kind == "Qwen3":
        norm = model.weights.tensor("layers.0.k_norm")
        norm[[3, 11]], norm[5] = 40.0, 0.0
    kv = fitted(model)
    assert kv.k_factor is not None
    assert torch.equal(kv.k_factor.amax(-1), torch.ones(KV_HEADS))
    assert bool((kv.k_factor >= kv.k_factor.median(-1, keepdim=True).values / 4).all())
    assert torch.equal(kv.k_factor[:, :8], kv.k_factor[:, 8:]), "both of a pair have one factor"
    if kind == "Qwen3":
        assert bool((kv.k_factor[:, 3] == 1).all()) and bool((kv.k_factor[:, [0, 1, 2, 5]] <= 1 / 8).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_every_form_of_weights_gives_the_same(directories: dict[str, Path], bits: int) -> None:
    dense = with_key_bias(directories["Qwen2"], 60 * torch.randn(KV_HEADS, HEAD_DIM))
    weight, bias = dense_qkv(dense)
    wanted = fitted(dense)
    coded = quantization.quantize_dense(weight, bits, 32, bias)
    got = fitted(with_qkv(model_of(directories["Qwen2"]), CPU.pack_linear(coded, torch.float32)))
    rows = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    parts = [
        CPU.pack_linear(CanonicalWeight(dense=part, bias=own), torch.float32)
        for part, own in zip(weight.split(rows), bias.split(rows), strict=True)
    ]
    packed = Packed("parts", sum(rows), WIDTH, {"parts": parts})
    in_parts = fitted(with_qkv(model_of(directories["Qwen2"]), packed))
    for kv in (got, in_parts):
        assert kv.k_factor is not None and wanted.k_factor is not None
        torch.testing.assert_close(kv.k_offset, wanted.k_offset, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(kv.k_factor, wanted.k_factor, rtol=0.2 if bits == 4 else 1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(directories: dict[str, Path], dtype: torch.dtype) -> None:
    wanted, got = fitted(model_of(directories["Qwen2"])), fitted(model_of(directories["Qwen2"], dtype))
    assert got.k_offset is not None and got.k_offset.dtype == torch.float32
    torch.testing.assert_close(got.k_offset, wanted.k_offset, rtol=2e-2, atol=2e-2)


def test_gptq(golden_dir: Path) -> None:
    kv = fitted(model_of(golden_dir / "gptq_int4_act_order"))
    assert kv.k_factor is not None and bool((kv.k_factor > 0).all())


def test_weights_that_are_not_finite_or_nothing_leave_keys_as_they_are(directories: dict[str, Path]) -> None:
    for value in (math.nan, 0.0):
        model = model_of(directories["Qwen2"])
        weight, bias = dense_qkv(model)
        keys = slice(HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM)
        weight, bias = weight.clone(), bias.clone()
        weight[keys], bias[keys] = value, value
        kv = fitted(with_qkv(model, CPU.pack_linear(CanonicalWeight(dense=weight, bias=bias), torch.float32)))
        assert kv.k_offset is None and kv.k_factor is None


def test_channels_that_are_not_rotated_have_their_own_size() -> None:
    squares = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    assert key_codes._of_pairs(squares, 4).tolist() == [[2.0, 3.0, 2.0, 3.0, 5.0, 6.0]]


def test_a_context_of_one_token(directories: dict[str, Path]) -> None:
    model = model_of(directories["Qwen2"])
    model.config = dataclasses.replace(model.config, max_position_embeddings=1)
    kv = fitted(model)
    assert kv.k_offset is not None and bool(torch.isfinite(kv.k_offset).all())
