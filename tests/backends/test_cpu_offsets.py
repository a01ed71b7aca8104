"""Weights with float offsets in the kernels' layout: GGUF's types with a minimum, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from qwenrt.backends.cpu import CPUBackend
from qwenrt.backends.cpu.kernels import dequantize_blocks, native_kind, restore_quantized
from qwenrt.ops import ggml, reference
from qwenrt.ops.ggml_types import CODED
from qwenrt.ops.weights import dequantize
from tests.kernel_sets import SETS, needs_kernels
from tests.ops.test_ggml import sane_rows

WITH_OFFSETS = [name for name, kind in CODED.items() if kind.offsets]


def backend_of(isa: str) -> CPUBackend:
    backend = CPUBackend(torch.device("cpu"))
    backend.configure(isa, 2, "exact")
    return backend


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", CODED)
def test_products_are_those_of_the_definition(isa: str, kind: str) -> None:
    backend = backend_of(isa)
    weight = ggml.unpack(kind, sane_rows(kind), torch.linspace(-1, 1, 48))
    packed = backend.pack_linear(weight, torch.float32)
    assert packed.kind == native_kind(weight.bits)
    x = torch.randn(40, packed.in_features)
    matrix = dequantize(weight, torch.float64)
    assert weight.bias is not None
    wanted = x.double() @ matrix.t() + weight.bias
    # codes and zeros are summed apart
    zeros = matrix.abs().amax(1) * 20
    allowed = 2e-6 * (x.double().abs().sum(1, keepdim=True) * zeros + 1)
    for tokens in (1, 3, 40):
        got = backend.linear(x[:tokens], packed)
        assert bool(((got - wanted[:tokens]).abs() <= allowed[:tokens]).all())


@needs_kernels
@pytest.mark.parametrize("kind", WITH_OFFSETS)
def test_the_layout_holds_the_values(kind: str) -> None:
    weight = ggml.unpack(kind, sane_rows(kind))
    packed = backend_of("auto").pack_linear(weight, torch.float32)
    assert packed.data["zeros"].dtype == torch.float32
    wanted = dequantize(weight, torch.float32)
    torch.testing.assert_close(
        dequantize_blocks(packed, 0, 6)[:48], wanted, rtol=0, atol=1e-6 * float(wanted.abs().max())
    )
    assert restore_quantized(packed) is None
    packed.data["zeros"] = packed.data["zeros"].double()
    assert restore_quantized(packed) is not None


@needs_kernels
def test_groups_without_a_scale_are_their_offsets() -> None:
    """A group of one value has scale 0, and a scale may be next to nothing beside its offset."""
    weight = ggml.unpack("Q4_1", sane_rows("Q4_1"))
    assert weight.scales is not None and weight.offsets is not None
    weight.scales[1], weight.offsets[1] = 0.0, 0.25
    weight.scales[2], weight.offsets[2] = 6e-8, -65504.0
    weight.scales[3], weight.offsets[3] = 0.0, 0.0
    packed = backend_of("auto").pack_linear(weight, torch.float32)
    got, wanted = dequantize_blocks(packed, 0, 6)[:48], dequantize(weight, torch.float32)
    assert bool(got.isfinite().all())
    for group in (1, 2, 3):
        part = slice(32 * group, 32 * group + 32)
        torch.testing.assert_close(got[:, part], wanted[:, part], rtol=1e-6, atol=0)


def test_plain_torch_has_them_too() -> None:
    """Stacked experts among them."""
    weights = [ggml.unpack("Q4_K", sane_rows("Q4_K", seed)) for seed in range(3)]
    packed = [reference.pack(weight, torch.float32, torch.device("cpu")) for weight in weights]
    from qwenrt.ops.types import stacked

    whole = stacked(packed)
    assert whole is not None and "offsets" in whole.data
    x = torch.randn(2, packed[0].in_features)
    which = torch.tensor([2, 0])
    got = reference.linear_of_each(x, whole, which)
    for row, number in enumerate(which.tolist()):
        wanted = x[row] @ dequantize(weights[number], torch.float32).t()
        torch.testing.assert_close(got[row], wanted, rtol=1e-4, atol=1e-4)
