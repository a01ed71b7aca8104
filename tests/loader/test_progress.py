"""The line that says what is waited for."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from qwenrt.loader import progress
from qwenrt.loader.progress import Waiting, tell


class Terminal(io.StringIO):
    """A stderr that is looked at, and tells when a second was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text.endswith(" s"):
            self.counted.set()
        return super().write(text)


def test_seconds_are_counted_in_one_line_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Waiting("trying the hub", None):
        assert terminal.getvalue().endswith("trying the hub ...")  # at once
        assert terminal.counted.wait(100)
    pieces = terminal.getvalue().split("\r")
    assert pieces[2] == "trying the hub ..." and pieces[4].startswith("trying the hub ... ")
    assert pieces[-1] == "" and set(pieces[-2]) == {" "} and len(pieces[-2]) == len(pieces[-3])
    assert "\n" not in terminal.getvalue() and "\x1b" not in terminal.getvalue()


def test_a_wait_in_vain_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(Waiting, "_seconds", lambda self: 30)
    for error, said in ((TimeoutError(), "no answer after 30 s\n"), (ValueError(), "")):
        with (
            pytest.raises(type(error)),
            Waiting("trying", None, lambda e: "no answer" * isinstance(e, OSError)),
        ):
            raise error
        assert terminal.getvalue().split("\r")[-1] == said


def test_where_nobody_looks_it_is_logged(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qwenrt")
    for show in (None, False):
        with Waiting("trying the hub", show):
            tell("found", show)
    assert capsys.readouterr() == ("", "") and caplog.messages == ["trying the hub ...", "found"] * 2
    with Waiting("trying the hub", True):  # asked for, and no terminal
        tell("found", True)
    assert capsys.readouterr().err == "trying the hub ...\nfound\n"


def test_a_stderr_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert not progress._is_terminal()
        tell("found")
