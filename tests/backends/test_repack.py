"""Words of a GPTQ file straight into the kernels' layout: the same bits as by way of the canonical codes."""

from __future__ import annotations

import pytest
import torch

from qwenrt.backends.cpu.kernels import Kernels, KernelsUnavailable, pack_quantized
from qwenrt.config import QuantConfig
from qwenrt.ops.gptq import unpack_gptq
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import merge, with_codes


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return Kernels()
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))


def stored(inputs: int, outputs: int, bits: int, group: int, order: str, seed: int = 0) -> CanonicalWeight:
    """A linear of random bits as a file has it, its codes left in their words."""
    source = torch.Generator().manual_seed(seed)
    groups, per_word = -(-inputs // group), 32 // bits

    def words(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns), generator=source).to(torch.int32)

    g_idx = torch.arange(inputs) // group
    if order == "act":
        g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
    quant = QuantConfig(bits=bits, group_size=group, desc_act=order == "act")
    scales = torch.rand(groups, outputs, generator=source).half()
    return unpack_gptq(
        words(-(-inputs // per_word), outputs),
        words(groups, -(-outputs // per_word)),
        scales,
        g_idx,
        None,
        quant=quant,
        in_features=inputs,
        out_features=outputs,
        name="linear",
        keep_words=True,
    )


@pytest.mark.parametrize("order", ["file", "act"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group"),
    [(256, 64, 128), (256, 300, 64), (96, 5, 96), (100, 24, 100), (60, 40, 12), (72, 136, 20), (130, 9, 32)],
)
def test_words_are_packed_as_codes_are(
    kernels: Kernels, inputs: int, outputs: int, group: int, bits: int, order: str
) -> None:
    weight = stored(inputs, outputs, bits, group, order)
    assert weight.words and weight.codes is None
    assert (weight.out_features, weight.in_features) == (outputs, inputs)
    got, wanted = pack_quantized(kernels, weight), pack_quantized(kernels, with_codes(weight))
    assert got.data.keys() == wanted.data.keys()
    for name, tensor in wanted.data.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(got.data[name], tensor), name


@pytest.mark.parametrize("outputs", [(64, 64), (40, 24, 9), (12, 20)])
def test_parts_side_by_side_are_packed_without_being_joined(
    kernels: Kernels, outputs: tuple[int, ...]
) -> None:
    parts = [stored(128, rows, 4, 32, "act", seed) for seed, rows in enumerate(outputs)]
    joined, plain = merge(parts), merge([with_codes(part) for part in parts])
    assert joined is not None and plain is not None and len(joined.words) == len(outputs)
    got, wanted = pack_quantized(kernels, joined), pack_quantized(kernels, plain)
    assert all(
        torch.equal(got.data[name], wanted.data[name]) for name in ("words", "scales", "zeros", "perm")
    )


def test_words_merge_with_codes() -> None:
    parts = [stored(64, 16, 4, 32, "file", seed) for seed in (0, 1)]
    mixed, plain = merge([parts[0], with_codes(parts[1])]), merge([with_codes(part) for part in parts])
    assert mixed is not None and plain is not None and mixed.codes is not None and plain.codes is not None
    assert torch.equal(mixed.codes, plain.codes)
