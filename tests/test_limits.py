"""Limits of the process and its end: typed errors and silence, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwenrt.backends.cpu import resources

ROOT = Path(__file__).parents[1]

_LIMITED = """
import resource, sys
resource.setrlimit(resource.{limit}, ({size} << 20, {size} << 20))
from qwenrt.cli import main
sys.exit(main(["run", "demo", "What is the capital of France?", "--max-tokens", "8"]))
"""
_AT_EXIT = """
import threading, time
import qwenrt
llm = qwenrt.load({model!r}, progress=False)
begun = threading.Barrier(4)

def read():
    while True:
        stream = llm.stream(prompt_token_ids=[1, 2], max_tokens=400, ignore_eos=True)
        next(stream)
        begun.wait(60)
        for _ in stream:
            pass
        while True:  # asks again while the interpreter ends
            {again}

for _ in range(3):
    threading.Thread(target=read, daemon=True).start()
begun.wait(60)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce these limits")
@pytest.mark.parametrize(("limit", "size"), [("RLIMIT_AS", 100), ("RLIMIT_AS", 500), ("RLIMIT_DATA", 60)])
def test_too_little_memory_for_torch(limit: str, size: int) -> None:
    done = python(_LIMITED.format(limit=limit, size=size))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"importing torch: this process may use {size} MiB" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce these limits")
def test_limits_count_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    free, total = resources.memory()
    size = int((resources._read(Path("/proc/self/statm")) or "").split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (size + 2**20, -1))
    limited_free, limited_total = resources.memory()
    assert limited_free <= min(free, 2**20 + 2**24) and limited_total == min(total, size + 2**20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, -1))
    assert list(resources.process_limits()) == []


@pytest.mark.parametrize(
    "again", ["llm.generate(prompt_token_ids=[1, 2], max_tokens=1)", "llm.logits(list(range(100)) * 2)"]
)
def test_daemon_threads_that_use_a_model_end_in_silence(tiny_dir: Path, again: str) -> None:
    done = python(_AT_EXIT.format(model=str(tiny_dir), again=again))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
