"""`qwenrt bench --profile`: the table of speed and memory, on a tiny checkpoint."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenrt.cli import bench_profile, main
from tests.cli.test_real_model import GOLDEN

Qwenrt = Callable[..., Any]
MODEL = str(GOLDEN / "ntk_logn")
QUIET = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Rows are measured here, by the command lines that a process of its own would get."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(command[3:])
        return subprocess.CompletedProcess(command, code, out.getvalue())

    monkeypatch.setattr(bench_profile.subprocess, "run", run)
    return commands


def test_a_row(qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch) -> None:
    took = {(1, 8, False): 99.0, (1, 23, True): 4.0}  # a short answer, then the one that counts
    monkeypatch.setattr(
        bench_profile, "_generate", lambda llm, context, tokens, shown: took.pop((context, tokens, shown))
    )
    monkeypatch.setattr(bench_profile.machine, "peak_rss_bytes", lambda: 3 * 2**30)
    options = ("--profile", "--json", "--precisions", "int8", "--tokens", "23", *QUIET)
    done = qwenrt("bench", MODEL, *options)
    row = json.loads(done.out)
    assert done.code == 0
    assert (row["context"], row["tokens"], row["seconds"], row["tokens_per_s"]) == (1, 23, 4.0, 6.0)
    assert (row["memory_bytes"], row["memory_of"]) == (3 * 2**30, "process")
    assert (
        not took
        and row["precision"] == "int8"
        and row["label"].startswith("int8 (")
        and row["dtype"] == "float32"
    )


def test_the_table(in_this_process: list[list[str]], qwenrt: Qwenrt) -> None:
    done = qwenrt("bench", MODEL, "--profile", "--tokens", "4,6", "--context", "2", *QUIET)
    lines = done.out.splitlines()
    assert done.code == 0 and lines[1] == "|---|---|--:|--:|--:|--:|"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:8]]
    assert [cell[1].split()[0] for cell in cells] == ["stored", "int8", "int4"] * 2
    assert [cell[2:4] for cell in cells] == [["2", "4"]] * 3 + [["2", "6"]] * 3
    assert all(float(cell[4]) > 0 and cell[5].endswith("iB") for cell in cells)
    assert "process of its own" in done.out and "(context + generated) / seconds" in done.out
    assert all(command[-4:] == [*QUIET] for command in in_this_process) and len(in_this_process) == 6


def test_a_row_that_fails_leaves_the_others(in_this_process: list[list[str]], qwenrt: Qwenrt) -> None:
    done = qwenrt(
        "bench",
        MODEL,
        "--profile",
        "--quantize",
        "int8",
        "--tokens",
        "4,100",
        "--max-model-len",
        "64",
        *QUIET,
    )
    lines = done.out.splitlines()
    assert done.code == 1 and "| 1 | 4 | " in lines[2] and "iB |" in lines[2]
    assert lines[3].endswith("| int8 | 1 | 100 | failed: see its message | |")
    assert "1 tokens of context and 100 generated: this model's context is 64 tokens" in done.err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("--precisions", "int3"), 2, "use some of stored,int8,int4"),
        (("--tokens", "0"), 2, "use numbers of tokens"),
        (("--context", "0"), 1, "--context: got 0"),
        (("--plot", "table.doc"), 1, "its name has another end"),
    ],
)
def test_what_cannot_be_measured(argv: tuple[str, ...], code: int, said: str, qwenrt: Qwenrt) -> None:
    done = qwenrt("bench", MODEL, "--profile", *argv)
    assert done.code == code and done.out == "" and said in done.err


def test_a_table_is_drawn(in_this_process: list[list[str]], qwenrt: Qwenrt, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "table.svg"
    done = qwenrt(
        "bench",
        MODEL,
        "--profile",
        "--precisions",
        "stored,int4",
        "--tokens",
        "4",
        *QUIET,
        "--plot",
        str(path),
    )
    assert done.code == 0 and f"Drawn: {path}" in done.err
    drawn = path.read_text()
    assert "tokens a second" in drawn and "int4 (" in drawn and "stored (" in drawn
