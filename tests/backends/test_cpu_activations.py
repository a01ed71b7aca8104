"""Activations rounded to int16 and int8: against plain torch and against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwenrt import summary
from qwenrt.backends import selfcheck
from qwenrt.backends.cpu import CPUBackend, kernels
from qwenrt.config import Environment
from qwenrt.errors import BackendError, ConfigError
from qwenrt.load_options import LoadOptions
from qwenrt.loading import load_with
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize
from tests.backends.test_cpu_kernels import float64_linear, random_weight, summed
from tests.kernel_sets import SETS, needs_kernels

CPU = torch.device("cpu")
pytestmark = needs_kernels
BLOCK_INPUTS = {4: 32, 8: 128}  # by the bits of the codes
ROUNDED = ("int16", "int8")


def blocks_of(weight: CanonicalWeight) -> Iterator[tuple[slice, int]]:
    """The inputs of each block, and how many it is rounded with: vectors are filled with zeros."""
    group = weight.in_features if weight.group_size == -1 else weight.group_size
    for start in range(0, weight.in_features, group):
        end = min(start + group, weight.in_features)
        for first in range(start, end, BLOCK_INPUTS[weight.bits]):
            whole = -(-min(BLOCK_INPUTS[weight.bits], start + group - first) // 8) * 8
            yield slice(first, min(first + BLOCK_INPUTS[weight.bits], end)), whole


def residual_blocks(x: torch.Tensor, weight: CanonicalWeight) -> torch.Tensor:
    """Inputs [T, K] that are in a block with a value of more than 8 times the token's mean, beside which a quarter of
    the block, zeros aside, is more than 512 times smaller."""
    limit = 8 * x.abs().mean(1, keepdim=True)
    residual = torch.zeros(x.shape, dtype=torch.bool)
    for inputs, _ in blocks_of(weight):
        size = x[:, inputs].abs()
        largest = size.amax(1, keepdim=True)
        small = ((size > 0) & (size < largest / 512)).sum(1, keepdim=True)
        residual[:, inputs] = (largest > limit) & (small * 4 >= size.shape[1])
    return residual


def rounded_to(x: torch.Tensor, weight: CanonicalWeight, narrow: torch.Tensor) -> torch.Tensor:
    """x [T, K] with a scale of the largest value for each block, which is int8 where it is ``narrow``; in float64."""
    used = torch.empty(x.shape, dtype=torch.float64)
    for inputs, _ in blocks_of(weight):
        block = x[:, inputs]
        largest = block.abs().amax(dim=1, keepdim=True)
        limit = torch.where(narrow[:, inputs.start, None], 127.0, 32639.0)
        small = largest < 2.0**-100
        q = (block * (limit / largest.masked_fill(small, 1.0))).round()
        assert bool((q.abs().amax(1, keepdim=True) <= limit).all())
        scale = (largest / limit).masked_fill(small, 0.0)
        used[:, inputs] = q.double() * scale.double()
    return used


def rounded_linear(x: torch.Tensor, weight: CanonicalWeight, activations: str) -> torch.Tensor:
    """The definition: x rounded block by block to a scale of its largest value, then the product in float64.

    int8 beside 4-bit codes: blocks whose largest value is more than 4 times the token's root mean square or 5 times
    the block's mean are rounded to int16. What int16 leaves of residual_blocks is rounded again.
    """
    columns = x if weight.perm is None else x[:, weight.perm.long()]
    residual = residual_blocks(columns, weight)
    even = columns.double().masked_fill(residual, 0.0)
    rms = (even.square().sum(1, keepdim=True) / (~residual).sum(1, keepdim=True).clamp(1)).sqrt()
    narrow = ~residual & (activations == "int8" and weight.bits == 4)
    for inputs, whole in blocks_of(weight):
        block = columns[:, inputs].abs()
        largest = block.amax(1, keepdim=True)
        narrow[:, inputs] &= (largest <= 4 * rms) & (largest * whole <= 5 * block.sum(1, keepdim=True))
    used = rounded_to(columns, weight, narrow)
    rest = (columns.double() - used).float().masked_fill(~residual, 0.0)
    used += rounded_to(rest, weight, torch.zeros_like(residual))
    w = dequantize(dataclasses.replace(weight, perm=None), torch.float64)
    y = used @ w.t()
    return y if weight.bias is None else y + weight.bias.double()


def assert_close(y: torch.Tensor, wanted: torch.Tensor, x: torch.Tensor, weight: CanonicalWeight) -> None:
    """Sums within a block are exact. Each block of a group, each group and, around them, six more steps round once, by
    2^-24 of what is summed."""
    assert y.shape == wanted.shape
    blocks = -(-weight.group_size // BLOCK_INPUTS[weight.bits])
    most = (blocks + -(-weight.in_features // weight.group_size) + 6) * 2.0**-24
    assert bool(((y.double() - wanted).abs() <= most * summed(x, weight)).all())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.one_of(st.integers(1, 40), st.sampled_from([64, 201])),
    k=st.one_of(st.integers(1, 140), st.sampled_from([128, 259, 1300])),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 33, 130]),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([-1, 8, 20, 24, 32, 64, 128, 200]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    activations=st.sampled_from(ROUNDED),
)
# A last group of which whole blocks lie past the row's end: once they counted, less than nothing, among the values that
# say how large the others are.
@example(n=2, k=1300, tokens=5, bits=4, group_size=128, flags=(True, False, True), activations="int8")
def test_linears_of_any_shape_follow_the_definition(
    cpu: CPUBackend,
    n: int,
    k: int,
    tokens: int,
    bits: int,
    group_size: int,
    flags: tuple[bool, bool, bool],
    activations: str,
) -> None:
    sym, shuffle, bias = flags
    weight = random_weight(n, k, bits, group_size, sym=sym, shuffle=shuffle, bias=bias)
    x = torch.randn(tokens, k) * torch.rand(tokens, 1).mul(20).sub(10).exp2()
    x[:, k // 2] *= 300  # some blocks are wide beside narrow ones
    x[1::2, k // 3] *= 300
    x[::3, k // 4] *= 3000  # and some need a residual
    cpu.configure(activations=activations)
    w = cpu.pack_linear(weight, torch.float32)
    if w.kind != kernels.native_kind(bits):
        return
    y = cpu.linear(x, w)
    assert_close(y, rounded_linear(x, weight, activations), x, weight)
    for isa in SETS[1:]:
        cpu.configure(isa, activations=activations)
        assert torch.equal(cpu.linear(x, w), y), isa  # the same bits on every instruction set
    cpu.configure(activations=activations)
    alone = torch.cat([cpu.linear(row[None], w) for row in x[:5]])
    assert torch.equal(alone, y[:5])  # and in every batch


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ROUNDED)
def test_what_is_beside_an_outlier_keeps_its_digits(cpu: CPUBackend, bits: int, activations: str) -> None:
    """A value that W makes nothing of does not cost its block more than a digit of int16."""
    weight = random_weight(64, 1024, bits, 128, sym=True, bias=True)
    outliers = torch.tensor([5, 64, 67, 70, 73, 900])
    assert weight.codes is not None and weight.zeros is not None
    weight.codes[outliers] = int(weight.zeros[0, 0])
    x = torch.randn(6, 1024)
    alike = x.clone()
    x[:, outliers] = 1e3 * x[:, outliers].sign()
    cpu.configure(activations=activations)
    w = cpu.pack_linear(weight, torch.float32)
    with_, without = (cpu.linear(value, w) for value in (x, alike))
    wanted = float64_linear(x, weight)[0]
    errors = [float((y.double() - wanted).norm() / wanted.norm()) for y in (with_, without)]
    assert errors[0] < max(1.5 * errors[1], 1e-4)


@pytest.mark.parametrize(
    ("isa", "inputs", "bits", "group_size"),
    [*((isa, 33, 8, 128) for isa in SETS), ("auto", 20, 8, 128), ("auto", 161, 8, 128), ("auto", 33, 4, 128)],
)
def test_the_self_check_passes_a_group_longer_than_the_row(
    cpu: CPUBackend, isa: str, inputs: int, bits: int, group_size: int
) -> None:
    """What fills a block up to whole vectors counts for nothing where it is asked whether a block is uneven."""
    cpu.configure(isa, activations="int16")
    assert selfcheck.check(cpu, torch.float32, (2, 2, 32), [(64, inputs, bits, group_size)]) == {}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ROUNDED)
def test_batches_and_threads_change_no_bit(cpu: CPUBackend, bits: int, activations: str) -> None:
    weight = random_weight(200, 1152, bits, 128, shuffle=True)
    x = torch.randn(300, 1152)
    x[::7, 500] *= 5000
    cpu.configure(num_threads=2, activations=activations)
    w = cpu.pack_linear(weight, torch.float32)
    y = cpu.linear(x, w)
    for tokens in (1, 2, 3, 4, 5, 127, 129):
        assert torch.equal(cpu.linear(x[:tokens], w), y[:tokens])
    for threads in (1, 3):
        cpu.configure(num_threads=threads, activations=activations)
        assert torch.equal(cpu.linear(x, w), y)
    assert cpu.linear(x[:0], w).shape == (0, 200)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ROUNDED)
def test_no_sum_overflows(cpu: CPUBackend, isa: str, bits: int, activations: str) -> None:
    """Every code, zero and activation at its largest, in one group of 20000 inputs and in groups of 128."""
    cpu.configure(isa, activations=activations)
    for k, group in ((20000, -1), (256, 128), (40, 40)):
        size = k if group == -1 else group
        for code, zero in ((2**bits - 1, 0), (0, 2**bits), (2**bits - 1, 2**bits)):
            weight = CanonicalWeight(
                codes=torch.full((k, 9), code, dtype=torch.uint8),
                scales=torch.full((-(-k // size), 9), 2.0**-8, dtype=torch.float16),
                zeros=torch.full((-(-k // size), 9), zero, dtype=torch.int16),
                bits=bits,
                group_size=size,
            )
            for sign in (1.0, -1.0):
                x = torch.full((5, k), 1e6 * sign)
                y = cpu.linear(x, cpu.pack_linear(weight, torch.float32))
                assert_close(y, float64_linear(x, weight)[0], x, weight)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("activations", ROUNDED)
def test_zeros_tiny_and_huge_activations(cpu: CPUBackend, isa: str, activations: str) -> None:
    cpu.configure(isa, activations=activations)
    weight = random_weight(20, 300, 4, 64)
    w = cpu.pack_linear(weight, torch.float32)
    assert weight.bias is not None
    for nothing in (0.0, -0.0, 1e-45, 1e-38, 7e-31):
        x = torch.full((2, 300), nothing)
        assert torch.equal(cpu.linear(x, w), weight.bias.expand(2, 20))
    for factor in (1e-20, 1e20, 1e30):
        x = torch.randn(3, 300) * factor
        assert_close(cpu.linear(x, w), rounded_linear(x, weight, activations), x, weight)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("activations", ROUNDED)
@pytest.mark.parametrize("bad", [float("nan"), 3e38])
def test_what_cannot_be_rounded_follows_torch(
    cpu: CPUBackend, isa: str, activations: str, bad: float
) -> None:
    cpu.configure(isa, activations=activations)
    for bits, tokens in ((4, 2), (8, 2), (4, 9)):
        weight = random_weight(20, 64, bits, 32)
        x = torch.randn(tokens, 64)
        x[1, 3:6] = bad
        w = cpu.pack_linear(weight, torch.float32)
        y = cpu.linear(x, w)
        wanted = x @ dequantize(weight, torch.float32).t() + weight.bias
        assert torch.allclose(y[1], wanted[1], rtol=1e-3, atol=1e-3, equal_nan=True)
        for row in {0, tokens - 1} - {1}:  # the others of the batch do not notice
            assert torch.equal(y[row], cpu.linear(x[row : row + 1], w)[0])


# ---- how large the error is


def with_outliers(tokens: int, k: int) -> torch.Tensor:
    """Activations as some models have them: three inputs of every token are a thousand times the others."""
    x = torch.randn(tokens, k)
    x[:, torch.randint(0, k, (3,))] *= 1000.0
    return x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outliers", [False, True])
def test_errors_are_as_small_as_is_said(cpu: CPUBackend, bits: int, outliers: bool) -> None:
    weight = random_weight(128, 2048, bits, 128, bias=False)
    x = with_outliers(16, 2048) if outliers else torch.randn(16, 2048)
    w, (wanted, _) = cpu.pack_linear(weight, torch.float32), float64_linear(x, weight)
    int16, int8 = (3e-4, 3e-2) if outliers else (5e-5, 1e-2)
    for activations, most in {"exact": 2e-6, "int16": int16, "int8": int8 if bits == 4 else int16}.items():
        cpu.configure(activations=activations)
        error = float((cpu.linear(x, w).double() - wanted).norm() / wanted.norm())
        assert error < most


# ---- choosing


@pytest.mark.parametrize(
    ("quantize", "activations", "said"),
    [
        (None, "int8", ""),  # nothing is rounded beside dense weights
        ("int4", "auto", "exact"),  # its linears are small
        ("int4", "exact", "exact"),
        ("int4", "int16", "int16"),
        ("int4", "int8", "int8"),
        ("int8", "int8", "int16"),
    ],
)
def test_the_line_at_load_says_what_is_rounded(quantize: str | None, activations: str, said: str) -> None:
    words = {"": "", "exact": "activations float32, "}.get(said, f"activations {said}, ")
    options = LoadOptions(
        device="cpu", dtype="float32", quantize=quantize, activations=activations, progress=False
    )
    with load_with("demo", options, Environment.read({})) as llm:
        assert llm.stats()["activations"] == said
        assert words in llm.summary if said else "activations" not in llm.summary


def test_the_line_at_load_speaks_of_small_layers() -> None:
    assert summary.activations(["exact", "int16"], "float32") == "int16 (float32 in small layers)"
    assert summary.activations(["int16", "int8"], "float32") == "int16 and int8"


def test_choices_are_checked(cpu: CPUBackend) -> None:
    cpu.configure("scalar", num_threads=1)
    assert cpu.activations == "auto" and cpu.describe() == "portable kernels, 1 thread"
    with pytest.raises(BackendError, match=r"activations 'int4': no such choice. Use one of: auto, exact"):
        cpu.configure(activations="int4")
    with pytest.raises(ConfigError, match="activations='int4'"):
        LoadOptions(activations="int4")
    assert Environment.read({"QWENRT_ACTIVATIONS": "int8"}).activations == "int8"
    assert Environment.read({}).activations == "auto"


def test_auto_rounds_where_sums_are_long_enough_to_cost(cpu: CPUBackend) -> None:
    cpu.configure()
    large, small = (cpu.pack_linear(random_weight(n, 1024, 4, 128), torch.float32) for n in (1024, 1023))
    assert cpu.activations_of(large) == "int16" and cpu.activations_of(small) == "exact"
    x = torch.randn(2, 1024)
    auto = [cpu.linear(x, w) for w in (large, small)]
    for activations, same in (("int16", [True, False]), ("exact", [False, True])):
        cpu.configure(activations=activations)
        assert [torch.equal(cpu.linear(x, w), y) for w, y in zip((large, small), auto, strict=True)] == same


def test_int8_leaves_what_feels_rounding_most_at_int16(cpu: CPUBackend) -> None:
    w = cpu.pack_linear(random_weight(64, 64, 4, 32), torch.float32)
    cpu.configure(activations="int8")
    for role, wanted in {
        "qkv_proj": "int8",
        "o_proj": "int8",
        "gate_up_proj": "int8",
        "down_proj": "int8",
        "lm_head": "int16",
        "": "int8",
    }.items():
        w.role = role
        assert cpu.activations_of(w) == wanted
    w.bits = 8
    assert cpu.activations_of(w) == "int16"


@pytest.mark.parametrize(
    ("role", "largest", "wide"),
    [
        ("o_proj", 3.5, True),
        ("qkv_proj", 3.5, True),
        ("gate_up_proj", 3.5, False),
        ("gate_up_proj", 4.5, True),
        ("down_proj", 5.5, False),
        ("down_proj", 7.5, True),
    ],
)
def test_how_large_a_value_int8_bears_depends_on_the_linear(
    cpu: CPUBackend, role: str, largest: float, wide: bool
) -> None:
    weight = random_weight(64, 2048, 4, 128)
    w = cpu.pack_linear(weight, torch.float32)
    w.role = role
    x = torch.randn(1, 2048).sign()  # of root mean square 1, and of a size that int8 gives exactly
    x[0, 100] = largest
    wanted, size = float64_linear(x, weight)
    cpu.configure(activations="int8")
    error = float(((cpu.linear(x, w).double() - wanted).abs() / size).max())
    assert (error < 2e-5) == wide


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_values_have_int16_beside_int8_queries_and_keys(cpu: CPUBackend, tokens: int) -> None:
    w = cpu.pack_linear(random_weight(96, 256, 4, 64), torch.float32)
    w.role, w.value_rows = "qkv_proj", 32
    x = torch.randn(tokens, 256)
    cpu.configure(activations="int16")
    int16 = cpu.linear(x, w)
    cpu.configure(activations="int8")
    mixed = cpu.linear(x, w)
    assert torch.equal(mixed[:, 64:], int16[:, 64:])
    assert not bool((mixed[:, :64] == int16[:, :64]).any())
    w.value_rows = 96
    assert torch.equal(cpu.linear(x, w), int16)
