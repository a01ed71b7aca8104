"""GPTQ's bits on disk, read and written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwenrt.config import QuantConfig
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.ops import gptq, quantization, reference
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def unpack(tensors: dict[str, Any], quant: QuantConfig, **changes: Any) -> CanonicalWeight:
    given_tensors = {name: tensors.get(name) for name in TENSORS} | changes
    shape = {"in_features": 64, "out_features": 32, "name": "layers.0.o_proj"}
    shape |= {name: given_tensors.pop(name) for name in list(given_tensors) if name in shape}
    return gptq.unpack_gptq(*(given_tensors[name] for name in TENSORS), quant=quant, **shape)


def packed(
    bits: int = 4, group_size: int = 16, **changes: Any
) -> tuple[dict[str, torch.Tensor], QuantConfig]:
    weight = quantization.quantize_dense(torch.randn(32, 64), bits, group_size)
    tensors: dict[str, torch.Tensor] = gptq.pack_gptq(dataclasses.replace(weight, **changes))
    return tensors, QuantConfig(bits, group_size)


def by_definition(tensors: dict[str, torch.Tensor], bits: int, zero_offset: int) -> torch.Tensor:
    """The formula of AutoGPTQ, one number at a time in Python integers and floats -> float64 [N, K]."""
    per_word, mask = 32 // bits, 2**bits - 1
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales, g_idx = tensors["scales"].double().tolist(), tensors["g_idx"].tolist()
    columns, rows = len(g_idx), len(scales[0])
    out = torch.empty(rows, columns, dtype=torch.float64)
    for k in range(columns):
        group = g_idx[k]
        for n in range(rows):
            code = (qweight[k // per_word][n] >> (k % per_word * bits)) & mask
            zero = ((qzeros[group][n // per_word] >> (n % per_word * bits)) & mask) + zero_offset
            out[n, k] = scales[group][n] * (code - zero)
    return out


# ---- what AutoGPTQ wrote


@pytest.mark.parametrize("folder", ["gptq_int4", "gptq_int8", "gptq_int4_act_order"])
def test_recorded_matrices_come_out_exactly_and_go_back_bit_for_bit(folder: str) -> None:
    golden, model = (load_file(GOLDEN / folder / f"{name}.safetensors") for name in ("golden", "model"))
    config = json.loads((GOLDEN / folder / "quantize_config.json").read_text())
    quant = QuantConfig(config["bits"], config["group_size"], config["desc_act"], config["sym"])
    names = [name.removeprefix("dequant.") for name in golden if name.startswith("dequant.")]
    assert len(names) == 2
    for name in names:
        wanted = golden[f"dequant.{name}"]
        tensors = {kind: model[f"{name}.{kind}"] for kind in TENSORS}
        rows, columns = wanted.shape
        weight = unpack(tensors, quant, in_features=columns, out_features=rows)
        assert torch.equal(dequantize(weight), wanted)
        assert (weight.perm is None) == (not quant.desc_act)
        for kind, tensor in gptq.pack_gptq(weight).items():
            assert torch.equal(tensor, tensors[kind]), kind


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([4, 8]),
    words=st.integers(1, 4),
    columns=st.integers(1, 3),
    group_size=st.sampled_from([-1, 1, 3, 8, 12, 32, 1000]),
    zero_offset=st.sampled_from([0, 1]),
    order=st.sampled_from(["plain", "absent", "empty", "shuffled", "any"]),
    seed=st.integers(0, 1000),
)
def test_any_bits_groups_zeros_and_orders_follow_the_definition(
    bits: int, words: int, columns: int, group_size: int, zero_offset: int, order: str, seed: int
) -> None:
    """Random words: every code and every stored zero, the all-ones field included, which makes 16 or 256."""
    source = torch.Generator().manual_seed(seed)
    per_word = 32 // bits
    k, n = words * per_word, columns * per_word
    group = k if group_size == -1 else min(group_size, k)
    groups = -(-k // group)

    def random_words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=source).to(torch.int32)

    g_idx = (torch.arange(k) // group).to(torch.int32)
    if order == "shuffled":
        g_idx = g_idx[torch.randperm(k, generator=source)]
    elif order == "any":
        g_idx = torch.randint(0, groups, (k,), generator=source).to(torch.int32)
        g_idx[0] = groups - 1
    tensors = {
        "qweight": random_words(k // per_word, n),
        "qzeros": random_words(groups, n // per_word),
        "scales": torch.randn(groups, n, generator=source).half(),
        "g_idx": g_idx,
        "bias": torch.randn(n, generator=source).half(),
    }
    quant = QuantConfig(bits, group_size, order in ("shuffled", "any"), sym=True, zero_offset=zero_offset)
    stored = {"absent": None, "empty": torch.empty(0, dtype=torch.int32)}.get(order, g_idx)
    weight = unpack(tensors, quant, in_features=k, out_features=n, g_idx=stored)
    wanted = by_definition(tensors, bits, zero_offset)
    assert torch.equal(dequantize(weight, torch.float64), wanted)
    assert weight.bias is not None
    assert (weight.in_features, weight.out_features) == (k, n)
    assert weight.scales is not None and weight.scales.shape[0] == -(-k // weight.group_size)
    x = torch.randn(2, k, generator=source, dtype=torch.float64)
    defined = reference.linear(x, reference.pack(weight, torch.float64, torch.device("cpu")))
    assert torch.allclose(
        defined, x @ wanted.t() + weight.bias, rtol=1e-3, atol=1e-2 * float(wanted.abs().max())
    )
    if order != "any":
        again = gptq.pack_gptq(weight, zero_offset=zero_offset)
        assert all(torch.equal(again[name], tensors[name]) for name in TENSORS)


def test_phantom_bias_is_dropped_and_a_real_one_kept() -> None:
    tensors, quant = packed()
    assert unpack(tensors, quant).bias is None
    assert unpack(tensors, quant, bias=None).bias is None
    kept = unpack(tensors, quant, bias=torch.ones(32)).bias
    assert kept is not None and bool((kept == 1).all())


def test_a_g_idx_of_zeros_is_a_placeholder_unless_the_order_was_changed() -> None:
    tensors, quant = packed()
    wanted = unpack(tensors, quant)
    got = unpack(tensors, quant, g_idx=torch.zeros(64, dtype=torch.int32))
    assert got.perm is None and torch.equal(dequantize(got), dequantize(wanted))
    ordered = unpack(
        tensors, dataclasses.replace(quant, desc_act=True), g_idx=torch.zeros(64, dtype=torch.int32)
    )
    assert ordered.scales is not None and bool((ordered.scales == ordered.scales[:1]).all())
    one_group, quant = packed(group_size=64)
    assert unpack(one_group, dataclasses.replace(quant, desc_act=True), g_idx=None).perm is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_zeros_under_sym(bits: int, zero_offset: int) -> None:
    """Either version's middle is the middle, a few groups of padding aside; many values are what they are."""
    middle = 2 ** (bits - 1)
    weight = quantization.quantize_dense(torch.randn(32, 64), bits, 4, sym=True)
    assert weight.zeros is not None and bool((weight.zeros == middle).all())
    quant = QuantConfig(bits, 4, sym=True, zero_offset=zero_offset)

    def read(stored: torch.Tensor, **changes: Any) -> torch.Tensor:
        tensors = gptq.pack_gptq(dataclasses.replace(weight, zeros=stored), zero_offset=0)
        zeros = unpack(tensors, dataclasses.replace(quant, **changes)).zeros
        assert zeros is not None
        return zeros

    for stored in (middle - 1, middle):
        zeros = torch.full_like(weight.zeros, stored)
        assert bool((read(zeros) == middle).all())
        assert bool((read(zeros, sym=False) == stored + zero_offset).all())
        zeros[0, :4] = 1  # 4 of 512
        assert (read(zeros) == middle).sum() == 508
    various = torch.arange(512).remainder(2**bits).view(16, 32).to(torch.int16)
    assert torch.equal(read(various), various + zero_offset)
    with pytest.raises(CheckpointError, match=f"every stored zero is 3, and sym: true means {middle}"):
        read(torch.full_like(weight.zeros, 3))


# ---- files that are wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qweight": torch.zeros(7, 32, dtype=torch.int32)},
            r"qweight has shape \[7, 32\], expected \[8, 32\]",
        ),
        ({"qzeros": torch.zeros(4, 8, dtype=torch.int32)}, r"qzeros has shape \[4, 8\], expected \[4, 4\]"),
        ({"scales": torch.ones(2, 32)}, r"scales has shape \[2, 32\], expected \[4, 32\].*group_size"),
        ({"qweight": torch.zeros(8, 32)}, "qweight has dtype float32, expected int32"),
        ({"scales": torch.ones(4, 32, dtype=torch.int32)}, "scales has dtype int32, expected float16 or"),
        ({"bias": torch.zeros(31)}, r"bias has shape \[31\], expected \[32\]"),
        ({"scales": torch.full((4, 32), float("nan"))}, "128 of 128 values of scales are not finite"),
        ({"g_idx": torch.full((64,), 4, dtype=torch.int32)}, "groups 4 to 4, but scales hold 0 to 3"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "groups -1 to -1"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx.*shape \[63\].*expected integers \[64\]"),
        ({"g_idx": torch.zeros(64)}, "dtype float32"),
        ({"in_features": 128}, r"qweight has shape \[8, 32\], expected \[16, 32\]"),
        ({"out_features": 40}, r"expected \[8, 40\]"),
    ],
)
def test_damaged_tensors_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    tensors, quant = packed()
    with pytest.raises(CheckpointError, match=message) as error:
        unpack(tensors, quant, **changes)
    assert "layers.0.o_proj" in str(error.value) and error.value.remedy


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (QuantConfig(3, 16), "3 bits: 4 and 8 bits are supported.*quantize='int4'"),
        (QuantConfig(2, 16), "2 bits"),
        (QuantConfig(4, 0), "group_size is 0.*-1"),
        (QuantConfig(4, -2), "group_size is -2"),
        (QuantConfig(8, 16), r"qweight has shape \[8, 32\], expected \[16, 32\].*bits, group_size"),
        (QuantConfig(4, 32), r"qzeros has shape \[4, 4\], expected \[2, 4\]"),
    ],
)
def test_a_config_that_does_not_describe_the_file_is_refused(quant: QuantConfig, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        unpack(packed()[0], quant)


def test_act_order_without_g_idx_is_refused() -> None:
    tensors, quant = packed()
    with pytest.raises(CheckpointError, match=r"activation order.*holds no g_idx"):
        unpack(tensors, dataclasses.replace(quant, desc_act=True), g_idx=None)


def test_what_the_format_cannot_hold_is_not_written() -> None:
    weight = quantization.quantize_dense(torch.randn(32, 64), 4, 16)
    assert weight.zeros is not None
    zero = dataclasses.replace(weight, zeros=torch.zeros_like(weight.zeros))
    with pytest.raises(
        ConfigError, match=r"zeros from 0 to 0 do not fit in 4 bits with offset 1.*zero_offset 0"
    ):
        gptq.pack_gptq(zero)
    assert int(gptq.pack_gptq(zero, zero_offset=0)["qzeros"].abs().max()) == 0
    with pytest.raises(ConfigError, match="multiples of 8"):
        gptq.pack_gptq(quantization.quantize_dense(torch.randn(31, 64), 4, 16))
    with pytest.raises(ConfigError, match="it is dense"):
        gptq.pack_gptq(CanonicalWeight(dense=torch.randn(8, 8)))
