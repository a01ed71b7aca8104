"""The page of the benchmarks: every figure in it comes from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.__main__ import _file_name, chosen, main, newest
from benchmarks.render import document


def a_row(key: str, ours_s: float, peer_s: float, **more: Any) -> dict[str, Any]:
    row = next(r for r in rows.table() if r.key == key)
    about = {"version": "9.9", "weight_bytes_per_token": 10**9, "kv_bytes_per_token": 0, "left_out": []}
    about |= {"rounded": "int4 in groups of 32"}
    measured = {
        "ours_s": ours_s,
        "peer_s": peer_s,
        "ours_foreign": 0.01,
        "peer_foreign": 0.02,
        "read_bytes_per_s": 60e9,
    }
    work = {
        "kind": row.work.kind,
        "tokens": row.work.tokens,
        "new_tokens": row.work.new_tokens,
        "batch": row.work.batch,
    }
    return {
        "when": "2026-11-27T10:00:00+00:00",
        "commit": "abcdef0123",
        "threads": 2,
        "quick": False,
        "tiny": False,
        "work": work,
        "ours": row.ours.described() | {"about": about},
        "peer": row.peer.described() | {"about": {"version": "8.8"}},
        "rounds": [measured] * 3,
    } | more


MACHINE = {
    "processor": "Some CPU",
    "cores_usable": 2,
    "memory_total_bytes": 24 * 2**30,
    "system": "Linux",
    "instruction_sets": ["avx2"],
    "python": "CPython 3.11",
    "qwenrt": "9.9",
}


def a_page(plots: dict[str, str] | None = None, **results: Any) -> str:
    return document({"machine": MACHINE, "rows": results, "curves": {}}, plots or {})


def cells(page: str, start: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_decode_row_shows_rates_ratio_fraction_and_where_they_stand() -> None:
    page = a_page(**{"decode-int4": a_row("decode-int4", 1.0, 1.5)})
    assert cells(page, "decode (") == [
        "decode (Qwen-1_8B)",
        "int4, int8 head, activations int8",
        "llama.cpp Q4_0",
        "48.0",
        "32.0",
        "**1.50**",
        "1.4 / 1.7",
        "✓ floor",
        "0.80",
        "0.75 / 0.9",
        "✓ floor",
    ]


def test_a_setting_that_was_left_out_is_not_claimed() -> None:
    row = a_row("decode-int4", 1.0, 1.5)
    row["ours"]["about"]["left_out"] = ["quantize_head"]
    assert cells(a_page(**{"decode-int4": row}), "decode (")[1] == "int4, activations int8"


def test_seconds_to_the_first_token_are_better_when_less() -> None:
    page = a_page(start=a_row("start", 2.0, 1.0))
    assert cells(page, "process start")[3:8] == ["2.00 s", "1.00 s", "0.50", "2.5 s / 1.5 s", "✓ floor"]


@pytest.mark.parametrize("flag", ["quick", "tiny"])
def test_a_run_that_proves_the_harness_is_not_judged(flag: str) -> None:
    page = a_page(**{"decode-int4": a_row("decode-int4", 1.0, 9.0, **{flag: True})})
    assert "not judged" in page and "✓" not in page
    assert "only proves that the harness works" in page


def test_a_disturbed_row_is_not_judged() -> None:
    row = a_row("decode-int4", 1.0, 9.0)
    row["rounds"] = [dict(row["rounds"][0], peer_foreign=0.5)]
    page = a_page(**{"decode-int4": row})
    assert "not judged" in page and "✓" not in page


def test_the_page_names_machine_versions_commit_and_day() -> None:
    page = a_page({"batch": "performance/batch.svg"}, **{"decode-int4": a_row("decode-int4", 1.0, 1.5)})
    for word in ("Some CPU", "24 GiB", "qwenrt 9.9", "llama.cpp 8.8", "abcdef0123", "2026-11-27"):
        assert word in page
    assert "](performance/batch.svg)" in page


def test_rows_come_in_the_order_of_the_table() -> None:
    page = a_page(
        **{"prefill-int8": a_row("prefill-int8", 1.0, 1.5), "decode-int4": a_row("decode-int4", 1.0, 1.5)}
    )
    assert page.index("| decode-int4 |") < page.index("| prefill-int8 |")


def test_rows_without_a_result_are_named() -> None:
    page = a_page(**{"decode-int4": a_row("decode-int4", 1.0, 1.5)})
    missing = next(line for line in page.splitlines() if line.startswith("Not measured yet:"))
    assert "prefill-int4" in missing and "decode-int4)" not in missing


def test_every_row_has_a_key_of_its_own_and_something_to_reach() -> None:
    table = rows.table()
    assert len({row.key for row in table}) == len(table)
    assert all(row.ratio or row.start for row in table if row.peer.name != "onnxruntime-genai")


def test_peers_skip_the_contexts_that_take_them_too_long() -> None:
    curve = rows.curves(longest=32768, peer_longest=8192)[0]
    assert max(curve.values) == 32641 and max(curve.peer_values) == 8161
    assert max(rows.curves(longest=1000)[0].values) == 17


def test_an_unknown_row_is_named_beside_those_there_are() -> None:
    with pytest.raises(SystemExit, match=r"--rows nonsense: unknown\. There are: decode-int4, "):
        chosen("decode-int4,nonsense", rows.table(), "rows")


def test_rendering_reads_results_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {
        key: 1 for key in ("processor", "cores_usable", "memory_total_bytes", "system", "python", "qwenrt")
    }
    results = {
        "machine": machine | {"instruction_sets": []},
        "rows": {"prefill-bf16": a_row("prefill-bf16", 1.0, 1.1)},
        "curves": {},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    main(["--render", "--out", str(tmp_path / "results.json"), "--docs", str(tmp_path / "docs")])
    assert "**1.10**" in (tmp_path / "docs" / "performance.md").read_text()
    assert "performance.md" in capsys.readouterr().out


def test_without_results_rendering_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="measure first"):
        newest(tmp_path)


def test_results_are_named_after_the_processor() -> None:
    assert _file_name("AMD EPYC 7B13 (2 cores)").endswith("-amd-epyc-7b13-2-cores.json")


def test_rows_of_int4_that_do_not_say_their_groups_are_older_than_the_default() -> None:
    row = a_row("decode-int4", 1.0, 1.5)
    assert "older than the present default" not in a_page(**{"decode-int4": row})
    del row["ours"]["about"]["rounded"]
    page = a_page(**{"decode-int4": row})
    assert cells(page, "decode (")[1] == "int4 (groups of 128), int8 head, activations int8"
    assert "are older than the present default" in page


def test_what_rounding_costs_stands_beside_speed() -> None:
    quality = {"bits": 4.5, "divergence": 0.05, "error": 0.002, "agreement": 0.865, "perplexity": 30.05}
    found = {"model": "M", "tokens": 300, "when": "2026-11-30T10:00:00+00:00", "perplexity": 27.682}
    page = document(
        {"machine": MACHINE, "rows": {"decode-int4": a_row("decode-int4", 1.0, 1.5)}, "curves": {}},
        {},
        quality=[found | {"ways": {"int4": quality}}],
    )
    assert "M, 300 tokens of each text, 2026-11-30; perplexity 27.682 without rounding:" in page
    assert "| int4 | 4.50 | 0.0500 ± 0.0020 | 86.5 % | 30.050 |" in page
