"""What csrc/ finds in rows of logits, and that the tokens drawn from it are those that torch draws."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.backends.base import Backend
from qwenrt.backends.cpu.backend import CPUBackend
from qwenrt.ops.steps import NOT_FINITE, Draw, Vocabulary

BACKEND = CPUBackend(torch.device("cpu"))
KERNELS: Any = BACKEND.kernels
pytestmark = pytest.mark.skipif(BACKEND.kernels is None, reason=BACKEND.unavailable or "built")


def random_row(seed: int, size: int, steps: float) -> torch.Tensor:
    """Logits [size]; with ``steps`` many are equal."""
    row = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
    return (row * steps).round() / steps if steps else row


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 3000), st.sampled_from([0.0, 2.0, 0.1]))
def test_the_likeliest_is_the_first_of_the_largest(seed: int, size: int, steps: float) -> None:
    rows = torch.stack([random_row(seed + i, size + 5, steps) for i in range(2)])[:, :size]
    seen = KERNELS.likeliest(rows)
    for row, (token, largest, finite) in zip(rows, seen, strict=True):
        assert (largest, finite) == (float(row.max()), True)
        assert token == row.tolist().index(largest)


@pytest.mark.parametrize("size", [1, 15, 16, 513, 5000])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_one_number_that_is_not_finite_is_seen_anywhere(size: int, bad: float) -> None:
    for place in {0, size // 2, size - 1}:
        rows = torch.full((1, size), 3e38)
        rows[0, place] = bad
        seen = KERNELS.likeliest(rows)
        assert not seen[0][2]
        assert 0 <= seen[0][0] < size


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from([0.0, 2.0, 0.1]),
    st.sampled_from([0.3, 1.0, 1.7]),
)
def test_top_is_a_stable_sort(seed: int, size: int, k: int, steps: float, heat: float) -> None:
    row, k = random_row(seed, size, steps), min(k, size)
    row[seed % size] = -torch.inf
    largest = float(row.max())
    if largest == -torch.inf:
        return
    found = KERNELS.top(row, largest, heat, k, True)
    assert found is not None
    values, ids, whole = found
    order = row.sort(descending=True, stable=True).indices[:k]
    scaled = (row - largest) / torch.tensor(heat)
    assert ids[0].tolist() == order.tolist()
    assert torch.equal(values[0], scaled[order])
    assert whole == pytest.approx(float(scaled.double().logsumexp(0)), rel=1e-6, abs=1e-6)


def test_top_refuses_a_row_with_too_few_numbers() -> None:
    assert KERNELS.top(torch.tensor([1.0, torch.nan, 0.0]), 1.0, 1.0, 3, True) is None


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 7, 40, 3000]),
    st.sampled_from([0.0, 2.0, 0.2]),
    st.sampled_from([0, 1, 5, 64]),
    st.sampled_from([0.05, 0.8, 0.999, 1.0]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    st.booleans(),
)
def test_the_same_tokens_as_torch(
    seed: int, size: int, steps: float, k: int, p: float, min_p: float, heat: float, gaps: bool
) -> None:
    rule = (heat, k, p, min_p) if heat else (0.0, 0, 1.0, 0.0)
    draws = [Draw(*rule, uniform) for uniform in (0.0, 0.31, 0.77, 0.999999)]
    unused = random.Random(seed).sample(range(size), size // 3) if gaps else []
    rows = torch.stack([random_row(seed + i // 2, size + 3, steps) for i in range(4)])
    rows[1, 0] = torch.nan
    vocabulary = Vocabulary(size, frozenset(unused))
    tokens = BACKEND.choose(rows.clone(), draws, vocabulary).tolist()
    assert tokens == Backend.choose(BACKEND, rows.clone(), draws, vocabulary).tolist()
    assert tokens[1] == NOT_FINITE and all(0 <= token < size for i, token in enumerate(tokens) if i != 1)
