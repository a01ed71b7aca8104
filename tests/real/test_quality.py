"""What rounding weights may cost a released model: benchmarks/quality.py on fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import quality
from scripts.fetch_models import RELEASES
from tests.real.conftest import directory_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
TOKENS = 64  # of each of four texts


@pytest.fixture(scope="module", params=sorted(RELEASES))
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    torch.set_num_threads(2)
    directory = directory_of(request.param)
    ways = {name: quality.WAYS[name] for name in ("int8", "int4", "Q4_0")}
    figures: dict[str, Any] = quality.measure(directory, ways, quality.our_texts(directory, TOKENS), print)[
        "ways"
    ]
    return figures


def test_int4_is_better_than_q4_0_at_no_more_bytes(found: dict[str, Any]) -> None:
    ours, peer = found["int4"], found["Q4_0"]
    assert ours["bits"] <= peer["bits"] == 4.5
    assert ours["divergence"] < peer["divergence"]


def test_int8_costs_next_to_nothing(found: dict[str, Any]) -> None:
    assert found["int8"]["divergence"] < 2e-3 and found["int8"]["agreement"] > 0.97
