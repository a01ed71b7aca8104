"""bfloat16 in 12 bits: nothing is lost, whatever the weights are, and products are those of the 16 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.backends.cpu import CPUBackend, dense12, kernels
from qwenrt.ops.types import CanonicalWeight, Packed
from tests.kernel_sets import KERNELS, SETS

pytestmark = [
    pytest.mark.skipif(
        KERNELS is None or not KERNELS.serves12,
        reason="nothing here gains from it",
    ),
]
EXACT = 2e-6  # of sum |x| |W|: float32 sums in any order
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 33)
SHAPES = ((1, 64), (3, 7), (17, 65), (37, 300), (130, 515), (515, 1024))


def served(threads: int = 2, isa: str = "auto") -> kernels.Kernels:
    assert KERNELS is not None
    return KERNELS.using(isa, threads)


def trained(n: int, k: int) -> torch.Tensor:
    """Weights as training leaves them, with a few that are far from the others."""
    weight = torch.randn(n, k) * 0.02
    weight[0, 0], weight[-1, -1] = 1000.0, 1e-30
    weight[n // 2, k // 2] = 0.0
    return weight.bfloat16()


def packed_anyway(weight: torch.Tensor, bias: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> Packed:
    monkeypatch.setattr(dense12, "_MOST_OTHERS", 1.0)
    packed = dense12.pack(served(), weight, bias)
    assert packed is not None
    return packed


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_near_float64_and_the_same_for_all_threads(
    shape: tuple[int, int], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = shape
    torch.manual_seed(n)
    weight, bias = trained(n, k), torch.randn(n)
    for added in (None, bias):
        packed = packed_anyway(weight, added, monkeypatch)
        assert len(packed.data["others"]) >= 2
        for tokens in TOKENS:
            x = torch.randn(tokens, k)
            wanted, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
            if added is not None:
                wanted, size = wanted + added, size + added.abs()
            y = served(2, isa).dense12_linear(x, packed)
            assert ((y - wanted).abs() <= EXACT * size).all(), f"{tokens} tokens"
            for threads in (1, 3):
                assert torch.equal(served(threads, isa).dense12_linear(x, packed), y), (
                    f"{tokens} tokens, {threads} threads"
                )


@pytest.mark.parametrize("isa", SETS)
def test_activations_that_may_be_rounded_keep_16_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before fixed point begins, which is at 32 tokens; the others of a tile are not there."""
    torch.manual_seed(0)
    weight = trained(130, 512)
    packed = packed_anyway(weight, None, monkeypatch)
    for tokens in (1, 7, 8, 9, 15, 16, 23, 24, 31):
        x = torch.randn(tokens, 512)
        wanted, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
        y = served(2, isa).dense12_linear(x, packed, True)
        assert ((y - wanted).abs() <= (EXACT + 2.0**-16) * size).all(), f"{tokens} tokens"
        assert torch.equal(served(1, isa).dense12_linear(x, packed, True), y), f"{tokens} tokens"


BITS = st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=150)


@given(st.integers(1, 5), BITS, st.integers(0, 0xFF), st.integers(0, 3))
@settings(deadline=None)
def test_any_finite_weights_come_back_as_they_were(
    rows: int, bits: list[int], upper: int, common: int
) -> None:
    """Of a few in four the upper byte is a common one; the others are any."""
    if common:
        bits = [b & 0xFF | upper << 8 if i % 4 < common else b for i, b in enumerate(bits)]
    weight = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).repeat(rows, 1)
    most, dense12._MOST_OTHERS = dense12._MOST_OTHERS, 1.0
    try:
        packed = dense12.pack(served(), weight, None)
    finally:
        dense12._MOST_OTHERS = most
    if not weight.isfinite().all():
        assert packed is None
    else:
        assert packed is not None and torch.equal(back(packed), weight.view(torch.int16))


def back(packed: Packed) -> torch.Tensor:
    return dense12.unpack(served(), packed, 0, packed.out_features).view(torch.int16)


def test_weights_that_would_gain_nothing_stay(cpu: CPUBackend) -> None:
    """Of every size alike, or not all finite."""
    wide = (torch.randn(1024, 1024) * torch.logspace(-12, 0, 1024)[:, None]).bfloat16()
    bad = trained(1024, 1024)
    bad[7, 9] = torch.nan
    for weight in (wide, bad):
        packed = cpu.pack_linear(CanonicalWeight(dense=weight), torch.float32)
        assert packed.kind == "dense16" and torch.equal(packed.data["weight"].isnan(), weight.isnan())


def test_which_weights_are_packed(cpu: CPUBackend) -> None:
    """Large bfloat16 ones that have no other use, beside float32 activations."""
    large = trained(1024, 1024)

    def kind(weight: torch.Tensor, dtype: torch.dtype = torch.float32, shared: bool = False) -> str:
        return cpu.pack_linear(CanonicalWeight(dense=weight, shared=shared), dtype).kind

    packed = cpu.pack_linear(CanonicalWeight(dense=large), torch.float32)
    assert packed.kind == dense12.KIND and packed.nbytes < 1.52 * large.numel()
    assert kind(large, shared=True) == kind(large.half()) == kind(large[:1023]) == "dense16"
    assert kind(large, torch.bfloat16) == "dense"
    cpu.configure("scalar")
    assert kind(large) == "dense16"


def test_no_memory_for_activations_is_an_error(cpu: CPUBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = cpu.pack_linear(CanonicalWeight(dense=trained(1024, 1024)), torch.float32)
    assert cpu.kernels is not None
    monkeypatch.setattr(cpu.kernels._library, "qwenrt_linear", lambda *_: 2)
    with pytest.raises(MemoryError, match="no memory for the activations of 20 tokens"):
        cpu.linear(torch.randn(20, 1024), packed)


@pytest.mark.parametrize("tokens", (1, 3, 20))
def test_what_is_not_finite_is_not_finite_after(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = trained(45, 77)
    packed = packed_anyway(weight, None, monkeypatch)
    x = torch.randn(tokens, 77)
    x[tokens - 1, 11] = torch.inf
    y = served().dense12_linear(x, packed)
    assert not y[-1].isfinite().any() and y[:-1].isfinite().all()


# ---- kept in a file


def kept(monkeypatch: pytest.MonkeyPatch) -> Packed:
    packed = packed_anyway(trained(40, 130), torch.randn(40), monkeypatch)
    data = {name: value for name, value in packed.data.items() if name != "native"}
    return Packed(packed.kind, 40, 130, data, packed.bias)


def test_a_kept_weight_serves_again(cpu: CPUBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = kept(monkeypatch)
    assert cpu.restore_packed(packed) is None
    weight, x = dense12.unpack(served(), packed, 0, 40), torch.randn(2, 130)
    wanted = F.linear(x.double(), weight.double(), None if packed.bias is None else packed.bias.double())
    assert torch.allclose(cpu.linear(x, packed).double(), wanted, rtol=1e-5, atol=1e-2)


def _first_of(rows: int, *values: int) -> torch.Tensor:
    first = torch.zeros(rows, dtype=torch.int32)
    first[-len(values) :] = torch.tensor(values, dtype=torch.int32)
    return first


DAMAGE = {
    "no chunks": ("chunks", None),
    "chunks of another shape": ("chunks", torch.zeros(40, 2, 96, dtype=torch.uint8)),
    "chunks in steps": ("chunks", torch.zeros(40, 3, 192, dtype=torch.uint8)[:, :, ::2]),
    "no smallest": ("smallest", None),
    "a smallest beyond": ("smallest", 121),
    "a smallest below": ("smallest", -1),
    "inputs of another type": ("inputs", torch.zeros(3, dtype=torch.int64)),
    "an input beyond": ("inputs", torch.tensor([0, 129, 130], dtype=torch.int32)),
    "an input below": ("inputs", torch.tensor([0, 1, -1], dtype=torch.int32)),
    "others of another number": ("others", torch.zeros(4, dtype=torch.bfloat16)),
    "rows that go back": ("first", _first_of(41, 2, 1, 3)),
    "rows that end elsewhere": ("first", _first_of(41, 1, 2, 9)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_kept_weight_that_does_not_fit_is_refused(
    cpu: CPUBackend, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = kept(monkeypatch)
    assert len(packed.data["others"]) == 3
    name, value = DAMAGE[damage]
    if value is None:
        del packed.data[name]
    else:
        packed.data[name] = value
    why = cpu.restore_packed(packed)
    assert why is not None and dense12.KIND in why
    assert "native" not in packed.data
