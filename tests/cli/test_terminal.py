"""qwenrt chat at a (pseudo-)terminal: typing, Ctrl-C, colours, and consoles that cannot show everything."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")
ROOT = Path(__file__).parents[2]
CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
PROMPT = "User>"


class NotYet(AssertionError):
    """What was waited for has not appeared in time."""


class Talk:
    """A process behind a pseudo-terminal."""

    def __init__(self, *argv: str, module: str = "tests.cli.fake_llm", **environment: str) -> None:
        self.master, slave = pty.openpty()
        env = {
            k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "PYTHONIOENCODING")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**env, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environment},
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(slave),
        )
        os.close(slave)
        self.seen = b""
        self.mark = 0

    def type(self, text: str, encoding: str = "utf-8") -> None:
        self.mark = len(self.seen)
        os.write(self.master, text.encode(encoding))

    def interrupt_prompt(self, *wanted: str) -> None:
        """Ctrl-C until it is heard: a signal just before input() begins to read waits for the next key."""
        mark = len(self.seen)
        for _ in range(20):
            self.type(CTRL_C)
            self.mark = mark
            with contextlib.suppress(NotYet):
                return self.until(*wanted, timeout=3)
        raise AssertionError(f"Ctrl-C was not heard, {wanted!r} did not appear")

    def until(self, *wanted: str, timeout: float = 200, encoding: str = "utf-8") -> None:
        """Wait until all of ``wanted`` have appeared, in this order, since the last ``type``."""
        deadline = time.monotonic() + timeout
        pattern = ".*".join(re.escape(text) for text in wanted)
        while True:
            plain = strip(self.seen[self.mark :].decode(encoding, "replace"))
            if re.search(pattern, plain, re.DOTALL):
                return
            if not select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]:
                raise NotYet(f"{wanted!r} did not appear in {plain!r}")
            self.seen += self._read(f"{wanted!r} did not appear before the end, only {plain!r}")

    def _read(self, otherwise: str) -> bytes:
        try:
            piece = os.read(self.master, 65536)
        except OSError:
            piece = b""
        if not piece:
            raise AssertionError(otherwise)
        if b"\x1b[6n" in piece:  # where is the cursor? (a terminal answers)
            os.write(self.master, b"\x1b[1;1R")
        return piece

    def code(self) -> int:
        return self.process.wait(timeout=200)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


def _take_terminal(slave: int) -> None:
    """Make the pseudo-terminal the process's own, so that Ctrl-C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


def strip(text: str) -> str:
    return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[=>])", "", text)


@pytest.fixture
def talk(request: pytest.FixtureRequest) -> Iterator[Talk]:
    """A chat at its prompt; with the parameter "plain" as if rich and prompt-toolkit were not installed."""
    plain = getattr(request, "param", "extras") == "plain"
    made = Talk("chat", WITHOUT_EXTRAS="1" if plain else "")
    made.until(PROMPT)
    yield made
    made.close()


both = pytest.mark.parametrize("talk", ["extras", "plain"], indirect=True)


@both
def test_a_conversation(talk: Talk) -> None:
    assert "This is fake." in strip(talk.seen.decode())
    talk.type("hello" + ENTER)
    talk.until("echo hello (0 turns, seed 1234, top_p 0.8)", PROMPT)
    talk.type("你好" + ENTER)
    talk.until("echo 你好 (1 turns", PROMPT)
    talk.type(CTRL_D)
    assert talk.code() == 0


@both
def test_ctrl_c_stops_the_answer_and_keeps_the_session(talk: Talk) -> None:
    talk.type("first" + ENTER)
    talk.until("(0 turns", PROMPT)
    talk.type("/slow" + ENTER)
    talk.until("word word")
    talk.type(CTRL_C)
    talk.until("Answer stopped; the history is unchanged.", PROMPT)
    talk.type("again" + ENTER)
    talk.until("echo again (1 turns", PROMPT)
    talk.type(":q" + ENTER)
    assert talk.code() == 0


@both
def test_ctrl_c_at_the_prompt_leaves_with_1(talk: Talk) -> None:
    talk.interrupt_prompt("Left with Ctrl-C")
    assert talk.code() == 1


def test_ctrl_c_raised_inside_the_model_is_the_same(talk: Talk) -> None:
    talk.type("/interrupt" + ENTER)
    talk.until("Answer stopped", PROMPT)
    talk.type(":his" + ENTER)
    talk.until("History (0)")


@both
def test_longer_messages_have_their_own_prompt(talk: Talk) -> None:
    talk.type('"""one' + ENTER)
    talk.until("... >")
    talk.type('two"""' + ENTER)
    talk.until("echo one\r\ntwo (0 turns", PROMPT)
    talk.type("dropped \\" + ENTER)
    talk.until("... >")
    talk.interrupt_prompt("This message was dropped.", PROMPT)
    talk.type(ENTER)
    talk.until("The question is empty")


def test_a_model_cannot_steer_the_terminal(talk: Talk) -> None:
    talk.type("/escape" + ENTER)
    talk.until("␛[2Jred␇")
    assert b"\x1b[2J" not in talk.seen[talk.mark :]


def test_a_thought_is_shown_before_the_answer_and_not_remembered(talk: Talk) -> None:
    talk.type("/think" + ENTER)
    talk.until("Let me think.\r\n\r\necho /think", PROMPT)
    talk.type(":his" + ENTER)
    talk.until("Qwen[0]: echo /think")


def test_a_misspelt_command_goes_to_the_model_and_is_said_to(talk: Talk) -> None:
    talk.type(":hlep" + ENTER)
    talk.until('":hlep" is not a command and goes to the model', "echo :hlep", PROMPT)


def test_clear_empties_the_screen(talk: Talk) -> None:
    talk.type(":clear" + ENTER)
    talk.until("This is fake.")
    assert b"\x1b[2J" in talk.seen[talk.mark :]


def test_a_gbk_console() -> None:
    talk = Talk("chat", PYTHONIOENCODING="gbk")
    try:
        talk.until(PROMPT, encoding="gbk")
        talk.type("你好" + ENTER, encoding="gbk")
        talk.until("echo 你好 (0 turns", PROMPT, encoding="gbk")
        talk.type("/smile" + ENTER)
        talk.until("echo ? (1 turns", PROMPT, encoding="gbk")
        talk.type(b"\xff\xff\n".decode("latin-1"), encoding="latin-1")
        talk.until("not readable text", PROMPT, encoding="gbk")
        talk.interrupt_prompt("Left with Ctrl-C")
        assert talk.code() == 1
    finally:
        talk.close()


def test_ctrl_c_ends_a_run_with_130() -> None:
    talk = Talk("run", "demo", "/slow")
    try:
        talk.until("word word")
        talk.type(CTRL_C)
        assert talk.code() == 130
        assert b"Traceback" not in talk.seen
    finally:
        talk.close()


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_a_pipe_in_any_locale(locale: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.fake_llm", "chat"],
        input="你好\n/smile\n".encode(),
        capture_output=True,
        env={**os.environ, "LC_ALL": locale},
        cwd=ROOT,
        timeout=200,
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"(1 turns" in done.stdout and b"\x1b" not in done.stdout


def test_the_optimised_interpreter_and_a_closed_stdin() -> None:
    command = [sys.executable, "-O", "-m", "tests.cli.fake_llm", "chat"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, cwd=ROOT, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
