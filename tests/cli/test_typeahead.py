"""The terminal is as it was, however an answer ends: told by the terminal's own settings, without a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")
termios = pytest.importorskip("termios")

from qwenrt.cli.typeahead import unseen_keys  # noqa: E402

ROOT = Path(__file__).parents[2]
# Says what it is about to do, a word a line, and waits for a line in between.
PROGRAM = """
import signal, sys
from qwenrt.cli.typeahead import unseen_keys
with open(sys.argv[1]) as keys, unseen_keys(keys, by_key=True):
    print("hidden", flush=True)
    while sys.stdin.readline() == "go on\\n":
        print("awake", flush=True)
"""


@pytest.fixture
def keyboard() -> Iterator[tuple[int, str]]:
    """A pseudo-terminal: a file number of its keys' side, and its name."""
    master, slave = pty.openpty()
    yield slave, os.ttyname(slave)
    os.close(master)
    os.close(slave)


def flags(fd: int) -> tuple[bool, bool]:
    """Whether keys are shown, and kept by lines."""
    local = termios.tcgetattr(fd)[3]
    return bool(local & termios.ECHO), bool(local & termios.ICANON)


@pytest.mark.parametrize("by_key", [True, False])
def test_keys_are_hidden_within_the_block_alone(keyboard: tuple[int, str], by_key: bool) -> None:
    fd, name = keyboard
    before, handlers = termios.tcgetattr(fd), signal.getsignal(signal.SIGTSTP)
    with open(name, encoding="utf-8") as keys:
        with unseen_keys(keys, by_key=by_key):
            assert flags(fd) == (False, not by_key)
            assert termios.tcgetattr(fd)[3] & termios.ISIG, "Ctrl-C is still one"
        assert termios.tcgetattr(fd) == before
        with pytest.raises(ZeroDivisionError), unseen_keys(keys, by_key=by_key):
            raise ZeroDivisionError
    assert termios.tcgetattr(fd) == before and signal.getsignal(signal.SIGTSTP) == handlers


def test_a_pipe_and_a_closed_stream_are_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, unseen_keys(file, by_key=True):
        pass
    with unseen_keys(file, by_key=True):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_leaves_it_as_it_was(
    keyboard: tuple[int, str], number: signal.Signals
) -> None:
    fd, name = keyboard
    before = termios.tcgetattr(fd)
    with program(name) as process:
        assert process.stdout is not None and process.stdout.readline() == "hidden\n"
        assert flags(fd) == (False, False)
        process.send_signal(number)
        assert process.wait(timeout=200) == -number
    assert termios.tcgetattr(fd) == before


def test_a_stopped_process_shows_keys_and_hides_them_when_it_goes_on(keyboard: tuple[int, str]) -> None:
    fd, name = keyboard
    before = termios.tcgetattr(fd)
    with program(name) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "hidden\n"
        process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and termios.tcgetattr(fd) == before
        process.send_signal(signal.SIGCONT)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "awake\n"
        assert flags(fd) == (False, False)
        process.stdin.close()
        assert process.wait(timeout=200) == 0
    assert termios.tcgetattr(fd) == before


def program(keyboard: str) -> subprocess.Popen[str]:
    """A process in a group of its own, as a shell's job is."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, keyboard],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=os.setpgrp,
    )
