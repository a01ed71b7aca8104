"""Clients in environments of their own, beside the scripted model in a network without a way out.

`make agents` makes the environments and runs these tests; without them they skip and say so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from scripts.client_envs import CACHE, cache_directory, made_of

ROOT = Path(__file__).parents[2]
PATIENCE = 270  # seconds for a program: only what hangs takes so long, on a machine with other work too
ALONE = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@dataclass(frozen=True)
class Done:
    """A program that ran: its exit code (-1: it took too long) and output, and what the server saw meanwhile."""

    code: int
    output: str
    seconds: float
    requests: list[dict[str, Any]]
    answers: list[dict[str, Any]]

    @property
    def refused(self) -> list[dict[str, Any]]:
        """Requests that were answered with 4xx or 5xx, or not at all."""
        return [request for request in self.requests if not 200 <= request["status"] < 400]


class Beside:
    """The server, and a way to run programs beside it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address: str = self._read()["address"]

    def run(
        self, command: Sequence[str | Path], cwd: Path, seconds: int = PATIENCE, **env: str | Path
    ) -> Done:
        """Run a program with this environment and no other; {address} in it is the server's."""
        usual = {"HOME": str(cwd), "LANG": "C.UTF-8", "PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"}
        program = {
            "command": [str(word) for word in command],
            "env": usual | {name: str(value) for name, value in env.items()},
            "cwd": str(cwd),
            "seconds": seconds,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(program) + "\n")
        self._process.stdin.flush()
        return Done(**self._read())

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server ended"
        return json.loads(line)


@cache
def network_alone() -> list[str]:
    """The command that runs another one in a network of its own; [] where this machine does not let us."""
    if (
        shutil.which("unshare")
        and not subprocess.run([*ALONE, "true"], check=False, stderr=subprocess.DEVNULL).returncode
    ):
        return ALONE
    return []


@contextmanager
def serving_beside(chat: str) -> Iterator[Beside]:
    """The server in a network of its own, with the scripted model that has this chat format, or with "demo"."""
    command = [*network_alone(), sys.executable, "-m", "tests.agents.inside", chat]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Beside(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # a test gave up while its program ran
            process.kill()
            process.wait(60)


@pytest.fixture(scope="package")
def beside() -> Iterator[Beside]:
    with serving_beside("qwen3") as running:
        yield running


@pytest.fixture(scope="module")
def beside_qwen1() -> Iterator[Beside]:
    with serving_beside("qwen1") as running:
        yield running


@pytest.fixture(scope="module")
def beside_demo() -> Iterator[Beside]:
    with serving_beside("demo") as running:
        yield running


def environment(name: str) -> Path:
    """An environment that scripts/client_envs.py made, or a skip."""
    if not made_of(name, cache_directory()):
        pytest.skip(f"not made: python scripts/client_envs.py {name} ({CACHE} says where to)")
    return cache_directory() / name
