"""What bounds a step: the figures from samples, and one real sample of small matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import bounds
from benchmarks.__main__ import main
from benchmarks.render import document
from tests.kernel_sets import needs_kernels


def a_sample(read: float, cache: float, memory: float) -> dict[str, float]:
    made = {"read": read * 1e9}
    for name in bounds.FORMATS:
        made |= {f"{name}_cache": cache * 1e9, f"{name}_memory": memory * 1e9}
    return made


SAMPLES = [a_sample(50, 30, 27), a_sample(30, 40, 27), a_sample(48, 32, 28), a_sample(32, 40, 32)]


def test_a_kernel_is_compared_with_the_lesser_of_its_limits() -> None:
    assert bounds.lesser(SAMPLES[0], "int4") == 30e9 and bounds.lesser(SAMPLES[1], "int8") == 30e9


def test_the_slower_and_the_faster_half_of_the_samples_stand_apart() -> None:
    lines = bounds.table(SAMPLES).splitlines()[2:]
    assert len(lines) == 2 * len(bounds.FORMATS)
    assert lines[0] == "| 30 to 32 | int4, activations int8 | 31.0 | 40.0 | 29.5 | 0.95 |"
    assert lines[3] == "| 48 to 50 | int4, activations int8 | 49.0 | 31.0 | 27.5 | 0.89 |"
    assert len(bounds.table(SAMPLES[:1]).splitlines()) == 2 + len(bounds.FORMATS)


def test_the_page_has_them_where_they_were_measured() -> None:
    machine = dict.fromkeys(("processor", "cores_usable", "memory_total_bytes", "system", "python"), 1)
    row = {"when": "2026-01-02", "commit": "abc", "threads": 2, "quick": False, "tiny": False}
    curve: dict[str, Any] = {"plot": "none", **row}
    results = {"machine": machine | {"instruction_sets": []}, "rows": {}, "curves": {"c": curve}}
    assert "What bounds it" not in document(results, {})
    page = document(results | {"bounds": {**row, "samples": SAMPLES}}, {"bounds": "performance/bounds.svg"})
    assert "4 times, one after the other, 2026-01-02, commit abc:" in page
    notes = "What a profile of these results showed."
    assert notes in document(results, {}, notes) and notes not in page
    assert "(performance/bounds.svg)" in page and page.index("What bounds it") < page.index(
        "How it is measured"
    )


def test_samples_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    assert draw({"curves": {}, "bounds": {"samples": SAMPLES}}, tmp_path) == {"bounds": "bounds.svg"}
    assert "int4, activations int8" in (tmp_path / "bounds.svg").read_text()


class _Memory:
    threads = 1

    def bytes_per_s(self) -> float:
        return 1e9


@needs_kernels
def test_a_sample_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("_ROWS", 1024), ("_CACHED_ROWS", 512), ("_MEMORY_BYTES", 1), ("_CACHED_SECONDS", 0)):
        monkeypatch.setattr(bounds, name, small)
    found = bounds.sample(_Memory())()  # type: ignore[arg-type]
    assert set(found) == set(SAMPLES[0]) and all(value > 1e6 for value in found.values())


def test_the_command_says_how_often_it_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--bounds" in capsys.readouterr().out
