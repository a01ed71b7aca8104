"""Dynamic NTK and LogN: the published values, and the formulas they come from."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.config import ModelConfig
from qwenrt.model.rotary import RotaryTables, logn_scale, ntk_alpha

CONFIG = ModelConfig(
    model_type="qwen",
    vocab_size=512,
    hidden_size=128,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=128,
    intermediate_size=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rotary_dim=128,
    train_length=8192,
    max_position_embeddings=32768,
    use_dynamic_ntk=True,
    use_logn_attn=True,
)


@pytest.mark.parametrize(
    ("length", "alpha"),
    [(1, 1), (8192, 1), (8193, 3), (16384, 3), (16385, 7), (32768, 7), (32769, 15), (65536, 15)],
)
def test_alpha_steps_at_the_doublings(length: int, alpha: int) -> None:
    assert ntk_alpha(length, CONFIG) == alpha


@given(st.integers(1, 10**7), st.integers(1, 10**5))
def test_alpha_is_the_published_formula(length: int, train_length: int) -> None:
    config = dataclasses.replace(CONFIG, train_length=train_length)
    # float log2 cannot be trusted next to a power of two, so the formula is checked on exact fractions
    doublings = 0
    while train_length * 2**doublings < length:
        doublings += 1
    assert ntk_alpha(length, config) == max(2 ** (doublings + 1) - 1, 1) if length > train_length else 1


def test_alpha_is_one_when_ntk_is_off() -> None:
    assert ntk_alpha(10**6, dataclasses.replace(CONFIG, use_dynamic_ntk=False)) == 1


@pytest.mark.parametrize(
    ("alpha", "base"), [(1, 10000.0), (3, 30527.7367), (7, 72195.8601), (15, 156588.3235)]
)
def test_tables_use_the_scaled_base(alpha: int, base: float) -> None:
    cos, sin = RotaryTables(CONFIG, torch.device("cpu")).rows([(1, 2, alpha)])
    expected = torch.tensor([1 / base ** (2 * j / 128) for j in range(64)] * 2)
    torch.testing.assert_close(torch.atan2(sin, cos)[0], expected, rtol=2e-5, atol=1e-7)


def test_each_sequence_gets_its_own_table() -> None:
    tables = RotaryTables(CONFIG, torch.device("cpu"))
    cos, sin = tables.rows([(5, 7, 1), (5, 6, 7)])
    for row, position, alpha in ((0, 5, 1), (1, 6, 1), (2, 5, 7)):
        one_cos, one_sin = tables.rows([(position, position + 1, alpha)])
        assert torch.equal(cos[row], one_cos[0])
        assert torch.equal(sin[row], one_sin[0])
    together = tables.rows([(5, 7, 1), (300, 301, 1)])
    alone = [tables.rows([span]) for span in ((5, 7, 1), (300, 301, 1))]
    for side in (0, 1):
        assert torch.equal(together[side], torch.cat([one[side] for one in alone]))


@pytest.mark.parametrize(
    ("train_length", "count", "factor"),
    [
        (8192, 8193, 1.0000135461),
        (8192, 16384, 1.0769230769),
        (8192, 32767, 1.1538427671),
        (2048, 8192, 1.1818181818),
        (8192, 8192, 1.0),
        (8192, 1, 1.0),
        (8192, 200_000, math.log(200_000, 8192)),  # past any published table
    ],
)
def test_logn_counts_from_one(train_length: int, count: int, factor: float) -> None:
    config = dataclasses.replace(CONFIG, train_length=train_length)
    scale = logn_scale(torch.tensor([count - 1]), config)
    assert scale is not None and scale.dtype == torch.float32
    assert scale.item() == pytest.approx(factor, abs=1e-7)


def test_logn_can_be_off() -> None:
    assert logn_scale(torch.tensor([9000]), dataclasses.replace(CONFIG, use_logn_attn=False)) is None
