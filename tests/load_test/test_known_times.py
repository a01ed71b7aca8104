"""A server whose times are known, read by this project's client and by an independent one."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("h11")
pytest.importorskip("msgspec")

from qwenrt.load_test.client import OpenAIServer
from qwenrt.load_test.connections import Address
from qwenrt.load_test.figures import figures
from qwenrt.load_test.pacing import ClosedLoop
from qwenrt.load_test.running import LoadRun
from qwenrt.load_test.workloads import Conversation, Turn
from tests.load_test.fake_openai import FakeOpenAI, fake_openai, paced
from tests.load_test.virtual_time import run_in_virtual_time

FIRST, GAP, TOKENS = 0.3, 0.04, 20
LOCUSTFILE = Path(__file__).parents[2] / "benchmarks" / "locustfile.py"


def test_the_clients_times_are_the_servers() -> None:
    """Over sockets and in virtual time: every figure is exact, of a first request as of later ones."""

    async def whole() -> LoadRun:
        fake = FakeOpenAI([paced(FIRST, GAP, TOKENS)])
        await fake.listen()
        server = OpenAIServer(Address.of(fake.url), model="m")
        asked = [Conversation([Turn("user", f"{i}.{t}", TOKENS) for t in range(3)]) for i in range(4)]
        run = LoadRun(asked, server, ClosedLoop(4))
        await run.go()
        server.close()
        fake.die()
        return run

    found = figures(run_in_virtual_time(whole()))
    ms = {
        name: found[f"{statistic}_{name}_ms"]
        for name in ("ttft", "itl", "tpot")
        for statistic in ("mean", "p99")
    }
    assert ms == {
        "ttft": pytest.approx(1000 * FIRST),
        "itl": pytest.approx(1000 * GAP),
        "tpot": pytest.approx(1000 * GAP),
    }
    assert found["mean_e2el_ms"] == pytest.approx(1000 * (FIRST + (TOKENS - 1) * GAP))
    assert found["completed"] == 12 and found["tokens_per_event"] == 1


@pytest.mark.slow
def test_locust_reads_the_same_times(tmp_path: Path) -> None:
    """In real time, so that nothing can come earlier than it was sent, and most of it not much later."""
    if importlib.util.find_spec("locust") is None:
        pytest.skip("locust is not installed: pip install locust (85 MB)")
    load = ["--headless", "-u", "4", "-r", "4", "--iterations", "16", "--csv", str(tmp_path / "run")]
    with fake_openai(paced(FIRST, GAP, TOKENS)) as server:
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "-H", server.url, *load]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert "16 answers, 320 tokens in 320 events" in done.stderr, done.stderr
    with (tmp_path / "run_stats.csv").open() as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    assert float(rows["TTFT"]["Min Response Time"]) >= 1000 * FIRST - 1
    assert 1000 * FIRST - 1 <= float(rows["TTFT"]["Median Response Time"]) <= 1500 * FIRST
    assert 500 * GAP <= float(rows["gap"]["Median Response Time"]) <= 2000 * GAP
    assert float(rows["gap"]["Average Response Time"]) == pytest.approx(1000 * GAP, rel=0.25)
