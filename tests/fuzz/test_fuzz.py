"""Each fuzzer for a few seconds; `python -m tests.fuzz` is the long form."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzzers import run

_PLAIN = {
    "deadline": None,
    "derandomize": True,  # the same on every machine
    "phases": (Phase.explicit, Phase.generate),  # a seed does not shrink
    "suppress_health_check": list(HealthCheck),
}
SEEDS = st.integers(0, 2**63)


@settings(max_examples=150, **_PLAIN)
@given(seed=SEEDS)
@pytest.mark.parametrize("name", ["config", "header", "arguments"])
def test_nothing_but_typed_errors(name: str, seed: int) -> None:
    run(name, seed)


@settings(max_examples=60, **_PLAIN)
@given(seed=SEEDS)
def test_nothing_but_typed_errors_from_the_files_of_a_tokenizer(seed: int) -> None:
    run("tokenizer", seed)


@settings(max_examples=60, **_PLAIN)
@given(seed=SEEDS)
def test_nothing_but_typed_errors_from_a_gguf_file(seed: int) -> None:
    run("gguf", seed)


@settings(max_examples=60, **_PLAIN)
@given(seed=SEEDS)
def test_nothing_but_typed_errors_from_an_adapter(seed: int) -> None:
    run("adapter", seed)


@settings(max_examples=8, **_PLAIN)
@given(seed=SEEDS)
def test_nothing_but_typed_errors_from_a_load(seed: int) -> None:
    run("load", seed)
