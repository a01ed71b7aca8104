"""The loads of docs/serving.md, against a server that answers by script."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("h11")
pytest.importorskip("msgspec")

from benchmarks import serving
from qwenrt.load_test.server_process import cpu_seconds, peak_rss_bytes
from tests.load_test import fake_openai as fake
from tests.load_test.fake_openai import fake_openai


def test_a_load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(serving, "INTRUDER_S", 0.0)
    path = tmp_path / "result.json"
    with fake_openai(fake.GOOD, fake.refuses("500 No", "oops"), fake.GOOD) as server:
        options = "--clients 2 --requests 3 --words 12 --shared 8 --new-tokens 5 --long-words 40 --grammar"
        argv = ["serving", "--url", server.url, *options.split(), "--json", str(path)]
        monkeypatch.setattr(sys, "argv", argv)
        serving.main()
    found = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == found
    prompts = [body["messages"][0]["content"].split() for body in server.bodies]
    long = [words for words in prompts if len(words) == 40]
    assert len(prompts) == 7 and len(long) == 1, "the long prompt is one more"
    questions = [words for words in prompts if len(words) == 12]
    assert (
        len({tuple(words[:8]) for words in questions}) == 1
        and len({tuple(words) for words in questions}) == 6
    )
    assert {(body["ignore_eos"], body["guided_regex"]) for body in server.bodies} == {
        (True, "[a-z0-9 ]{4000}")
    }
    assert (
        found["answers"] + len(found["errors"]) in (6, 7) and found["output_tokens"] == 6 * found["answers"]
    )
    assert (
        0 <= found["gap_s_p50"] <= found["gap_s_p99"]
        and found["first_token_s_p50"] <= found["first_token_s_max"]
    )


def test_what_a_process_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system has no /proc")
    used, most = cpu_seconds(os.getpid()), peak_rss_bytes(os.getpid())
    assert used is not None and used > 0 and most is not None and most > 2**20
    assert cpu_seconds(2**30) is None and peak_rss_bytes(2**30) is None


@pytest.mark.parametrize("head", [b"404 No", b"200 OK", b""], ids=["404", "200", "nothing"])
def test_a_server_without_health_has_no_figures_of_it(head: bytes) -> None:
    """Only a 200 is an answer that counts."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        asked = threading.Semaphore(0)

        def answer() -> None:
            with suppress(OSError):
                while True:
                    with listening.accept()[0] as connection:
                        connection.recv(1000)
                        if head:
                            connection.sendall(b"HTTP/1.1 " + head + b"\r\ncontent-length: 0\r\n\r\n")
                    asked.release()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        probe = serving.probing(f"http://127.0.0.1:{listening.getsockname()[1]}")
        for _ in range(3):
            assert asked.acquire(timeout=60)
        found = serving.probed(probe)
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    counts = head.startswith(b"200")
    assert (found["health"] != 0) is counts and (found["health_s_p50"] is not None) is counts
