"""The command line around a fake model."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from qwenrt.cli import main
from tests.cli import fake_llm


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """fake.llm answers instead of a model; fake.loaded are the arguments of each load."""
    return fake_llm.install(monkeypatch)


@pytest.fixture
def qwenrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """qwenrt("chat", stdin="...") -> exit code, stdout, stderr."""

    def run(*argv: str, stdin: str | bytes = "", encoding: str = "utf-8", history: bool = False) -> Done:
        if not history:
            monkeypatch.setenv("QWENRT_HISTORY", "0")
        raw = stdin.encode(encoding) if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding=encoding))
        try:
            code = main(list(argv))
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run
