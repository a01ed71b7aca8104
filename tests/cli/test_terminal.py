"""qwenrt chat at a (pseudo-)terminal: typing, Ctrl-C, colours, and consoles that cannot show everything."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import stat
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
        private = {"QWENRT_HISTORY": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE if environment.get("STDERR_TO") == "pipe" else slave,
            env={**env, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **private, **environment},
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

    def finish_slow(self) -> None:
        """Let an answer to /slow end."""
        self.process.send_signal(signal.SIGUSR1)

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
    talk.until("Answer stopped; what there is of it is kept.", PROMPT)
    talk.type("again" + ENTER)
    talk.until("echo again (2 turns", PROMPT)
    talk.type(":his" + ENTER)
    talk.until("Qwen[1]: echo word", "[stopped]", PROMPT)
    talk.type(":undo" + ENTER)
    talk.until("Took back: again", PROMPT)
    talk.type(":undo" + ENTER)
    talk.until("Took back: /slow", PROMPT)
    talk.type(":q" + ENTER)
    assert talk.code() == 0


@both
def test_ctrl_c_twice_at_the_prompt_leaves_with_1(talk: Talk) -> None:
    talk.interrupt_prompt("Ctrl-C once more leaves", PROMPT)
    talk.type("still here" + ENTER)
    talk.until("echo still here", PROMPT)
    talk.interrupt_prompt("Ctrl-C once more leaves", PROMPT)
    talk.interrupt_prompt("Left with Ctrl-C")
    assert talk.code() == 1


def test_ctrl_c_raised_inside_the_model_is_the_same(talk: Talk) -> None:
    talk.type("/interrupt" + ENTER)
    talk.until("Answer stopped", PROMPT)
    talk.type(":his" + ENTER)
    talk.until("History (1)", "Qwen[0]: echo [stopped]")


def test_an_answer_stopped_before_it_began_is_not_kept(talk: Talk) -> None:
    talk.type("first" + ENTER)
    talk.until("(0 turns", PROMPT)
    talk.type("/never" + ENTER)
    talk.until("Qwen>")
    talk.type(CTRL_C)
    talk.until("Stopped before the answer began", PROMPT)
    talk.type(":his" + ENTER)
    talk.until("History (1)")


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


@both
def test_a_misspelt_command_is_not_sent(talk: Talk) -> None:
    talk.type(":hlep" + ENTER)
    talk.until('":hlep" is no command here', "Did you mean :help?", PROMPT)
    talk.type(":send :hlep" + ENTER)
    talk.until("echo :hlep (0 turns", PROMPT)


@both
def test_what_is_typed_while_a_model_writes_waits_unseen(talk: Talk) -> None:
    talk.type("/slow" + ENTER)
    talk.until("word word")
    talk.type("typed 你好")
    talk.until("word word word")
    assert "typed" not in talk.seen[talk.mark :].decode("utf-8", "replace")
    talk.finish_slow()
    talk.until("/slow (0 turns", PROMPT)
    talk.type(ENTER)
    talk.until("echo typed 你好 (1 turns", PROMPT)


def test_a_conversation_is_kept_and_reopened(tmp_path: Path) -> None:
    home = str(tmp_path / "kept")
    talk = Talk("chat", "some/model", QWENRT_HISTORY=home)
    try:
        talk.until(PROMPT)
        talk.type("hello" + ENTER)
        talk.until("echo hello (0 turns", PROMPT)
        talk.type("/interrupt" + ENTER)
        talk.until("Answer stopped", PROMPT)
        talk.type(CTRL_D)
        talk.until("qwenrt chat --continue goes on with it")
        assert talk.code() == 0
    finally:
        talk.close()
    [saved] = (tmp_path / "kept" / "conversations").iterdir()
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    talk = Talk("chat", "--continue", QWENRT_HISTORY=home)
    try:
        talk.until("Going on after 2 turns, the last of them: /interrupt", PROMPT)
        talk.type("\x1b[A")  # the key for what was typed before
        talk.until("/interrupt")
        talk.type(CTRL_C + ":his" + ENTER)
        talk.until("Qwen[0]: echo hello", "Qwen[1]: echo [stopped]", PROMPT)
        talk.type(":clh" + ENTER)
        talk.until("Forgot 2 turns", PROMPT)
        talk.type("/bye" + ENTER)  # as in Ollama
        assert talk.code() == 0
    finally:
        talk.close()
    assert not saved.exists(), "what was to be forgotten is not kept either"


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "dumb", "NO_COLOR": "1"}])
def test_a_dumb_terminal_gets_text_alone(environment: dict[str, str]) -> None:
    talk = Talk("chat", **environment)
    try:
        talk.until("This is fake.", PROMPT)
        for typed, answered in (
            ("/think", "think."),
            (":clear", "This is fake."),
            (":seed x", "must be an integer"),
        ):
            talk.type(typed + ENTER)
            talk.until(answered, PROMPT)
        talk.interrupt_prompt("Ctrl-C once more leaves", PROMPT)
        talk.type(CTRL_D)
        assert talk.code() == 0
        assert b"\x1b" not in talk.seen
    finally:
        talk.close()


def test_no_colour_where_none_is_wanted() -> None:
    talk = Talk("chat", NO_COLOR="1")
    try:
        talk.until(PROMPT)
        talk.type("/think" + ENTER)
        talk.until("think.", "echo /think", PROMPT)
        talk.type(":seed x" + ENTER)
        talk.until("must be an integer", PROMPT)
        coloured = re.findall(rb"\x1b\[([0-9;]+)m", talk.seen)
        assert set(coloured) <= {b"0"}, "a reset is all that the line editor sends"
    finally:
        talk.close()


def test_a_terminal_that_is_closed_ends_it_quietly() -> None:
    talk = Talk("chat", STDERR_TO="pipe")
    talk.until(PROMPT)
    os.close(talk.master)
    assert talk.code() in (0, 1, -signal.SIGHUP)
    assert talk.process.stderr is not None and talk.process.stderr.read() == b""


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
