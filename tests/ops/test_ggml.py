"""GGUF's blocks against the package that defines them, on random bytes: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize as defined

from qwenrt.errors import CheckpointError
from qwenrt.ops import ggml, reference
from qwenrt.ops.ggml_types import BY_ID, CODED, NOT_READ
from qwenrt.ops.types import Packed
from qwenrt.ops.weights import dequantize

ROWS, BLOCKS = 48, 8
# Where a block has its float16 factors; MXFP4 has none.
FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2)}
FACTORS |= {"Q5_1": (0, 2), "MXFP4": ()}


def random_rows(kind: str, seed: int = 0) -> torch.Tensor:
    """Any bytes: scales may be anything, infinite, NaN and -0 among them."""
    source = torch.Generator().manual_seed(seed)
    shape = (ROWS, BLOCKS * CODED[kind].nbytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)


def sane_rows(kind: str, seed: int = 0) -> torch.Tensor:
    """The same with finite factors of a usual size."""
    rows = random_rows(kind, seed)
    source = torch.Generator().manual_seed(seed)
    blocks = rows.view(-1, CODED[kind].nbytes)
    for at in FACTORS.get(kind, (0,)):
        factor = (torch.rand(len(blocks), 1, generator=source) * 0.01 + 0.001).half()
        blocks[:, at : at + 2] = factor.view(torch.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = blocks[:, 0] % 8 + 118
    return rows


def as_defined(kind: str, rows: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(defined(rows.numpy(), GGMLQuantizationType[kind]))


def same_bits(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal bit for bit; of NaN only that both are."""
    nan = wanted.isnan()
    return torch.equal(nan, got.isnan()) and torch.equal(
        got[~nan].view(torch.int32), wanted[~nan].view(torch.int32)
    )


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_package(kind: str, seed: int) -> None:
    rows = random_rows(kind, seed)
    assert same_bits(ggml.dequantize(kind, rows), as_defined(kind, rows))


@pytest.mark.parametrize("kind", CODED)
def test_the_canonical_form_has_the_same_values(kind: str) -> None:
    rows = sane_rows(kind)
    wanted = as_defined(kind, rows)
    weight = ggml.unpack(kind, rows)
    assert torch.equal(dequantize(weight, torch.float32), wanted)
    assert weight.scales is not None
    assert weight.scales.dtype == (torch.float32 if CODED[kind].wide else torch.float16)
    packed: Packed = reference.pack(weight, torch.float32, torch.device("cpu"))
    assert torch.equal(reference.dequantize(packed, torch.float32), wanted.t())


def test_sizes_and_numbers_are_those_of_the_package() -> None:
    for number, kind in BY_ID.items():
        named = GGMLQuantizationType(number)
        assert (named.name, GGML_QUANT_SIZES[named]) == (kind.name, (kind.block, kind.nbytes))
    for number, (name, _) in NOT_READ.items():
        if number in GGMLQuantizationType._value2member_map_:
            assert GGMLQuantizationType(number).name == name
    assert {kind.value for kind in GGMLQuantizationType} <= BY_ID.keys() | NOT_READ.keys()


def test_a_block_written_out_by_hand() -> None:
    """Q4_0: d = 0.5, value i = d (q - 8); low nibbles are the first half of the values."""
    row = torch.cat((torch.tensor([0.5]).half().view(torch.uint8), torch.arange(16, dtype=torch.uint8) * 17))
    half = [0.5 * (q - 8) for q in range(16)]
    assert ggml.dequantize("Q4_0", row[None]).tolist() == [half + half]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_scales_that_are_not_finite_are_an_error(kind: str) -> None:
    rows = sane_rows(kind)
    rows[5, :2] = torch.tensor([float("inf")]).half().view(torch.uint8)
    with pytest.raises(CheckpointError, match=r"layer 3 \(.*scales of its rows 0 to 47 are NaN or infinite"):
        ggml.unpack(kind, rows, name="layer 3")


def test_rounding_to_16_bits_happens_once() -> None:
    rows = sane_rows("Q6_K")
    assert torch.equal(ggml.dequantize("Q6_K", rows, torch.float16), as_defined("Q6_K", rows).half())
