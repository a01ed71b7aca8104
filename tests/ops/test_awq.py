"""AWQ's bits on disk, read and written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.config import QuantConfig
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.ops import awq, quantization, reference
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize, merge
from tests.ops.quantised_checkpoints import Allocations, awq_config, awq_state

K, N, GROUP = 64, 32, 16


def random_words(source: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=source).to(torch.int32)


def stored(k: int = K, n: int = N, group: int = GROUP, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random words: every code and every zero from 0 to 15 occurs."""
    source = torch.Generator().manual_seed(seed)
    return {
        "qweight": random_words(source, k, n // 8),
        "qzeros": random_words(source, k // group, n // 8),
        "scales": torch.randn(k // group, n, generator=source).half(),
        "bias": torch.randn(n, generator=source).half(),
    }


def unpack(tensors: dict[str, Any], **changes: Any) -> CanonicalWeight:
    given_tensors = [changes.pop(kind, tensors.get(kind)) for kind in ("qweight", "qzeros", "scales", "bias")]
    settings = {"group_size": GROUP, "in_features": K, "out_features": N, "name": "layers.0.mlp.up_proj"}
    return awq.unpack_awq(*given_tensors, **(settings | changes))


def by_definition(tensors: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    """W[n, k], one number at a time: bits 4i to 4i+3 of word c are of output 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales = tensors["scales"].double().tolist()
    out = torch.full((len(scales[0]), len(qweight)), float("nan"), dtype=torch.float64)
    for k, words in enumerate(qweight):
        g = k // group
        for c, word in enumerate(words):
            for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                code, zero = (word >> 4 * i) & 15, (qzeros[g][c] >> 4 * i) & 15
                n = 8 * c + column
                out[n, k] = scales[g][n] * (code - zero)
    return out


# ---- right files


def test_a_word_written_out_by_hand() -> None:
    """0x76543210 keeps 0 in its lowest nibble: the outputs in turn are nibbles 0, 4, 1, 5, 2, 6, 3, 7."""
    tensors = {
        "qweight": torch.tensor([[0x76543210], [-1]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x00000001]], dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    weight = unpack(tensors, group_size=2, in_features=2, out_features=8)
    assert weight.codes is not None and weight.zeros is not None
    assert weight.codes.tolist() == [[0, 4, 1, 5, 2, 6, 3, 7], [15] * 8]
    assert weight.zeros.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    assert dequantize(weight)[:2].tolist() == [[-0.5, 7.0], [2.0, 7.5]]


@settings(deadline=None, max_examples=50)
@given(
    groups=st.integers(1, 5),
    group=st.integers(1, 9),
    words=st.integers(1, 4),
    one_group=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_words_follow_the_definition_and_go_back_bit_for_bit(
    groups: int, group: int, words: int, one_group: bool, seed: int
) -> None:
    k, n = groups * group, 8 * words
    group = k if one_group else group
    tensors = stored(k, n, group, seed)
    weight = unpack(tensors, group_size=-1 if one_group else group, in_features=k, out_features=n)
    wanted = by_definition(tensors, group)
    assert torch.equal(dequantize(weight, torch.float64), wanted)
    assert (weight.bits, weight.group_size, weight.perm) == (4, group, None)
    assert (weight.in_features, weight.out_features) == (k, n)
    x = torch.randn(2, k, dtype=torch.float64)
    served = reference.linear(x, reference.pack(weight, torch.float64, torch.device("cpu")))
    near = x @ wanted.t() + tensors["bias"]
    assert torch.allclose(served, near, rtol=1e-3, atol=1e-2 * float(wanted.abs().max()))
    again = awq.pack_awq(weight)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[kind], tensors[kind]) for kind in tensors)


@settings(deadline=None, max_examples=30)
@given(groups=st.integers(1, 4), group=st.integers(1, 33), words=st.integers(1, 5), seed=st.integers(0, 1000))
def test_a_rounded_matrix_comes_back(groups: int, group: int, words: int, seed: int) -> None:
    w = torch.randn(8 * words, groups * group, generator=torch.Generator().manual_seed(seed))
    weight = quantization.quantize_dense(w, 4, group)
    again = unpack(awq.pack_awq(weight), group_size=group, in_features=w.shape[1], out_features=w.shape[0])
    assert weight.codes is not None and again.codes is not None
    assert torch.equal(again.codes, weight.codes)
    assert weight.zeros is not None and again.zeros is not None
    assert torch.equal(again.zeros, weight.zeros) and again.zeros.dtype == weight.zeros.dtype
    assert again.scales is not None and weight.scales is not None
    assert torch.equal(again.scales, weight.scales.half())
    assert again.bias is None


def test_other_float_scales_and_views_of_larger_tensors_are_read() -> None:
    tensors = stored()
    wanted = dequantize(unpack(tensors), torch.float64)
    wide = {
        "qweight": torch.cat([tensors["qweight"]] * 2, 1)[:, : N // 8],
        "scales": tensors["scales"].float(),
    }
    assert torch.equal(dequantize(unpack(tensors, **wide), torch.float64), wanted)
    assert unpack(tensors, bias=None).bias is None
    assert unpack(tensors, bias=torch.zeros(N)).bias is None


def test_parts_of_a_linear_merge() -> None:
    parts = [
        unpack(stored(n=n, seed=n) | bias, out_features=n)
        for n, bias in ((32, {"bias": None}), (8, {}), (16, {"bias": torch.zeros(16)}))
    ]
    merged = merge(parts)
    assert merged is not None and merged.bias is not None
    assert torch.equal(dequantize(merged), torch.cat([dequantize(part) for part in parts]))
    assert torch.equal(
        merged.bias, torch.cat([torch.zeros(32), stored(n=8, seed=8)["bias"], torch.zeros(16)]).half()
    )
    assert merge([parts[0], unpack(stored(group=32), group_size=32)]) is None


def test_unpacking_makes_nothing_larger_than_its_result() -> None:
    tensors = stored(256, 256, 64)
    with Allocations() as made:
        weight = unpack(tensors, group_size=64, in_features=256, out_features=256)
    assert weight.codes is not None
    assert torch.int64 not in made.largest or made.largest[torch.int64] <= 8
    assert max(made.largest.values()) <= weight.codes.nbytes


def test_a_checkpoint_of_awq_modules() -> None:
    dense = {"a.weight": torch.randn(24, 32), "a.bias": torch.randn(24), "norm.weight": torch.ones(32)}
    state, dequantised = awq_state(dense, ["a"], 16)
    assert state.keys() == {"a.qweight", "a.qzeros", "a.scales", "a.bias", "norm.weight"}
    tensors = {kind: state[f"a.{kind}"] for kind in ("qweight", "qzeros", "scales", "bias")}
    assert torch.equal(by_definition(tensors, 16), dequantised["a.weight"].double())
    assert float((dequantised["a.weight"] - dense["a.weight"]).norm() / dense["a.weight"].norm()) < 0.1
    quant = QuantConfig.from_dict(awq_config(16), "config.json")
    assert (quant.method, quant.bits, quant.group_size, quant.zero_offset) == ("awq", 4, 16, 0)


# ---- files that are wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qweight": torch.zeros(8, 32, dtype=torch.int32)},
            r"qweight has shape \[8, 32\], expected \[64, 4\]",
        ),
        ({"qweight": torch.zeros(64, 4)}, "qweight has dtype float32, expected int32.*AWQ tool"),
        ({"qweight": torch.zeros(64, 4, dtype=torch.int64)}, "qweight has dtype int64"),
        ({"qzeros": torch.zeros(4, 32, dtype=torch.int32)}, r"qzeros has shape \[4, 32\], expected \[4, 4\]"),
        ({"qzeros": torch.zeros(4, 4, dtype=torch.uint8)}, "qzeros has dtype uint8"),
        ({"scales": torch.ones(32, 4)}, r"scales has shape \[32, 4\], expected \[4, 32\].*group_size"),
        ({"scales": torch.ones(4, 32, dtype=torch.int32)}, "scales has dtype int32, expected float16 or"),
        ({"scales": torch.full((4, 32), float("inf"))}, "128 of 128 values of scales are not finite"),
        ({"bias": torch.zeros(31)}, r"bias has shape \[31\], expected \[32\]"),
        ({"bias": torch.full((32,), float("nan"))}, "32 of 32 values of bias are not finite"),
        ({"group_size": 32}, r"qzeros has shape \[4, 4\], expected \[2, 4\].*bits, group_size"),
        ({"group_size": -1}, r"expected \[1, 4\]"),
        ({"group_size": 0}, "a group has 0 inputs.*-1"),
        ({"group_size": -2}, "a group has -2 inputs"),
        ({"group_size": 48}, "64 inputs are no multiple of the group of 48"),
        ({"group_size": 128}, "64 inputs are no multiple of the group of 128"),
        ({"out_features": 36}, "36 outputs are no multiple of 8, the codes in one int32"),
        ({"out_features": 40}, r"qweight has shape \[64, 4\], expected \[64, 5\]"),
        ({"in_features": 128}, r"expected \[128, 4\]"),
        ({"in_features": 0}, "0 inputs"),
        ({"out_features": 0}, "0 outputs"),
    ],
)
def test_damaged_tensors_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        unpack(stored(), **changes)
    assert "layers.0.mlp.up_proj" in str(error.value) and error.value.remedy


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_tensors_are_read_or_refused(data: st.DataObject) -> None:
    """Shapes, dtypes and sizes drawn independently: a result of the right shape or CheckpointError, nothing else."""
    size = st.sampled_from([0, 1, 2, 8, 16])
    dtypes = st.sampled_from([torch.int32, torch.float16, torch.uint8, torch.int64, torch.bool])

    def tensor(wanted: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if data.draw(st.booleans()):
            return torch.ones(wanted, dtype=dtype)
        return torch.ones(data.draw(st.lists(size, max_size=3)), dtype=data.draw(dtypes))

    k, n = data.draw(size), data.draw(size)
    group = data.draw(st.sampled_from([-1, 0, 1, 2, 8, 10**9]))
    groups = 1 if group < 1 else k // group
    tensors = {
        "qweight": tensor((k, n // 8), torch.int32),
        "qzeros": tensor((groups, n // 8), torch.int32),
        "scales": tensor((groups, n), torch.float16),
    }
    try:
        weight = unpack(tensors, group_size=group, in_features=k, out_features=n)
    except CheckpointError:
        return
    assert dequantize(weight).shape == (n, k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "it has 8 bits, the format 4"),
        ({"perm": torch.arange(K, dtype=torch.int32)}, "activation order"),
        ({"zeros": torch.full((4, N), 16, dtype=torch.int16)}, "zeros from 16 to 16 do not fit in 4 bits"),
        ({"zeros": torch.full((4, N), -1, dtype=torch.int16)}, "zeros from -1 to -1"),
        ({"codes": torch.zeros(K, 31, dtype=torch.uint8)}, "31 outputs are no multiple of 8"),
        ({"group_size": 48}, "64 inputs are no multiple of the group of 48"),
        ({"scales": torch.full((4, N), 1e5)}, "128 of 128 scales do not fit in float16"),
        ({"scales": torch.full((4, N), 1e-9)}, "128 of 128 scales do not fit in float16"),
        ({"codes": None}, "it is dense"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(changes: dict[str, Any], message: str) -> None:
    weight = dataclasses.replace(unpack(stored()), **changes)
    with pytest.raises(ConfigError, match=message):
        awq.pack_awq(weight)
