"""Released checkpoints, loaded once for all tests of a size; without them these tests skip and say how to get them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from scripts.fetch_models import CACHE, RELEASES, cache_directory
from tests.real.record import RECORDED


@dataclass(frozen=True)
class Released:
    """A checkpoint, what transformers answered, and the loaded model: float32 activations, rounded nowhere."""

    size: str
    directory: Path
    recorded: dict[str, dict[str, Any]]
    llm: qwenrt.LLM

    def answer(self, name: str) -> dict[str, Any]:
        """What was recorded for a prompt, or a skip."""
        if name not in self.recorded:
            pytest.skip(f"nobody recorded {name!r}: python -m tests.real.record {self.size} does")
        return self.recorded[name]


def directory_of(size: str) -> Path:
    """Where a checkpoint lies, or a skip."""
    directory = cache_directory() / RELEASES[size].name
    if not (directory / "config.json").exists():
        pytest.skip(
            f"{directory} is not there: python scripts/fetch_models.py {size} fetches it ({CACHE} says where to)"
        )
    return directory


@pytest.fixture(scope="module", params=sorted(RELEASES))
def released(request: pytest.FixtureRequest) -> Iterator[Released]:
    size: str = request.param
    directory = directory_of(size)
    path = RECORDED / f"{size}.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with qwenrt.load(
        str(directory), dtype="float32", activations="exact", max_model_len=8192, max_num_seqs=4
    ) as llm:
        yield Released(size, directory, recorded, llm)
