"""Input of questions: from a terminal, or from a pipe with one question per line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from qwenrt.cli.terminal import Terminal

PROMPT = "User> "
CONTINUED = "... > "
FENCE = '"""'


class Undecodable(Exception):
    """The input was not text."""


class Lines:
    """Reads messages, with a prompt and line editing on a terminal, without either from a pipe."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self._ask = _editor() if terminal.interactive else None

    def message(self) -> str:
        r"""The next message: one line, lines that end in "\" joined, or everything between two \"\"\".

        Raises EOFError at the end of input, KeyboardInterrupt on Ctrl-C at an empty prompt, Undecodable.
        Ctrl-C or the end of input inside a longer message: the first drops it, the second ends it.
        """
        line = self._line(PROMPT)
        if line.lstrip().startswith(FENCE):
            return self._longer(line.lstrip()[len(FENCE) :], _until_fence)
        if line.endswith("\\"):
            return self._longer(line, _until_no_backslash)
        return line.strip()

    def _longer(self, line: str, split: Callable[[str], tuple[str, bool]]) -> str:
        parts = []
        try:
            while True:
                text, done = split(line)
                parts.append(text)
                if done:
                    break
                line = self._line(CONTINUED)
        except EOFError:
            pass
        except KeyboardInterrupt:
            self.terminal.remark("\n[INFO] This message was dropped.")
            return self.message()
        return "\n".join(parts).strip()

    def _line(self, prompt: str) -> str:
        try:
            if self._ask is not None:
                line = self._ask(prompt)
            elif self.terminal.interactive:
                line = input(prompt)
            else:
                line = _read_bytes()
            line.encode("utf-8")  # a lone surrogate stands for a byte that could not be decoded
        except UnicodeError as error:
            raise Undecodable from error
        return line


def _until_fence(line: str) -> tuple[str, bool]:
    closed = line.rstrip().endswith(FENCE)
    return (line.rstrip()[: -len(FENCE)], True) if closed else (line, False)


def _until_no_backslash(line: str) -> tuple[str, bool]:
    return (line[:-1], False) if line.endswith("\\") else (line, True)


def _read_bytes() -> str:
    """One line from a pipe."""
    source = getattr(sys.stdin, "buffer", sys.stdin)
    raw = source.readline()
    if not raw:
        raise EOFError
    return _decode(raw).rstrip("\r\n")


def read_all() -> str:
    """All of stdin. Raises Undecodable."""
    try:
        text = _decode(getattr(sys.stdin, "buffer", sys.stdin).read())
        text.encode("utf-8")
    except UnicodeError as error:
        raise Undecodable from error
    return text.replace("\r\n", "\n")


def _decode(raw: str | bytes) -> str:
    """UTF-8, or else what the locale says. A byte order mark, as PowerShell writes it, is dropped."""
    if isinstance(raw, bytes):
        try:
            return raw.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            raw = raw.decode(sys.stdin.encoding or "utf-8")
    return raw.removeprefix("\ufeff")


def _editor() -> Callable[[str], str] | None:
    """prompt_toolkit's line editor, with history and pasted blocks; None where it is not installed."""
    if (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        return None
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its editing keys)
        return None

    def newline(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    def interrupt(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    keys = KeyBindings()
    keys.add("escape", "enter")(newline)
    keys.add("c-c")(interrupt)
    session: Any = PromptSession(key_bindings=keys, reserve_space_for_menu=0)

    def ask(prompt: str) -> str:
        return str(session.prompt(prompt))

    return ask
